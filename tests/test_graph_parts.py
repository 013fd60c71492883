"""What a CUDA graph is known by, and how many tokens it serves."""

from transformers import LogitsProcessor
from transformers.generation import logits_process as hf

from fastllm.decode.graph import SLOTS, signature, slots_for


def test_slots_and_signatures():
    assert [slots_for(n) for n in (1, 256, 257, 131072, 131073)] == [256, 256, 512, 131072, 262144]
    assert list(SLOTS) == sorted(SLOTS)
    greedy = signature([], False)
    assert greedy is not None and greedy != signature([], True)
    hot, cold = (signature([hf.TemperatureLogitsWarper(t)], True) for t in (1.5, 0.5))
    assert hot != cold and hot == signature([hf.TemperatureLogitsWarper(1.5)], True)
    assert signature([hf.RepetitionPenaltyLogitsProcessor(1.1)], False) is not None
    assert signature([hf.RepetitionPenaltyLogitsProcessor(1.1, prompt_ignore_length=3)], False) is None
    assert signature([hf.NoRepeatNGramLogitsProcessor(2)], False) is None

    class Own(LogitsProcessor):
        pass

    assert signature([Own()], False) is None
