"""`model.generate`, unchanged in what it takes and gives, with fastllm's loop where that can do the work."""

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode
from transformers.generation import stopping_criteria as hf

from .cache import KVCache
from .graph import Compiled, Graphs, capture_cuda, run_graph
from .loop import State, run
from .sampling import Sampler

logger = logging.getLogger("fastllm")

AHEAD = 1024  # tokens beyond the prompt that a cache has room for at once; an answer may end long before its limit
NO_GRAPH, OUTSIDE = "a step that cannot be captured in a CUDA graph", "processors that a graph cannot hold"
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
# What starts in another way than sampling and beam search do, or needs more than they are given.
SETTINGS = ("prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers", "force_words_ids")
ARGUMENTS = (*SETTINGS, "custom_generate", "assistant_model", "negative_prompt_ids", "synced_gpus", "position_ids")
TAKEN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


class _OtherMode(Exception):
    """A mode of generation that starts in another way than sampling and beam search do."""


class FastGenerate:
    """Stands in for the `generate` of one model.

    reasons: why calls went to transformers' own loop or, NO_GRAPH and OUTSIDE, without a graph; each once, in order.
    """

    def __init__(self, model: Any, kv_cache: str | None = None, compiled: bool = False):
        """kv_cache: the format of the caches that it makes, None: dense. ValueError if the model cannot have such."""
        self.model, self.kv_cache = model, kv_cache
        self.reasons: list[str] = []
        self.compiled = compiled
        self.graphs = Graphs(model, kv_cache, Compiled if compiled else capture_cuda)
        KVCache(model.config, kv_cache)  # complains of layers that it cannot serve

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.GenerationMixin.generate`."""
        original: Callable = type(self.model).generate
        why = self._why_not(kwargs)
        if why:
            self._note(why)
            return original(self.model, *args, **self._with_cache(kwargs))
        streamer = kwargs.get("streamer")

        def decode(model: Any, input_ids: Tensor, **given: Any) -> Any:
            return self._decode(input_ids, streamer, **given)

        try:
            return original(self.model, *args, custom_generate=decode, **_with_stop_strings(kwargs))
        except _OtherMode as mode:
            self._note(str(mode))
        return original(self.model, *args, **kwargs)

    def replays(self, ids: Tensor) -> bool:
        """Whether steps are to be replayed as a CUDA graph, where that can be."""
        return (ids.is_cuda or self.compiled) and {p.device for p in self.model.parameters()} == {ids.device}

    def _note(self, why: str) -> None:
        if why not in self.reasons:
            self.reasons.append(why)

    def _why_not(self, kwargs: dict[str, Any]) -> str:
        """What of this call needs transformers' loop, as far as the arguments tell; empty if nothing."""
        if self.model.training:
            return "training mode"
        if found := [name for name in ARGUMENTS if kwargs.get(name) is not None and kwargs[name] is not False]:
            return found[0]
        for config in (kwargs.get("generation_config"), self.model.generation_config):
            if found := [name for name in SETTINGS if getattr(config, name, None)]:
                return found[0]
        if self.model.generation_config.stop_strings:
            return "stop_strings of the model's own settings"
        cache = kwargs.get("past_key_values")
        return "" if cache is None or isinstance(cache, KVCache) else f"a cache of the kind {type(cache).__name__}"

    def _with_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with a quantized cache if one was asked for and none is given."""
        mine = self.kv_cache is not None and kwargs.get("use_cache") is not False
        if not mine or any(kwargs.get(name) is not None for name in ("past_key_values", "cache_implementation")):
            return kwargs
        return {**kwargs, "past_key_values": KVCache(self.model.config, self.kv_cache)}

    def _decode(
        self,
        input_ids: Tensor,
        streamer: Any,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Any:
        """The part of `generate` that comes after all preparation."""
        starts = _starts(inputs.get("attention_mask"), input_ids)
        # a mask of nothing but ones may have been dropped, after its length was noted
        if (getattr(generation_config, "_mask_length", None) or input_ids.shape[1]) != input_ids.shape[1]:
            starts = None
        why = self._why_not_prepared(generation_config, input_ids, starts, inputs, streamer)
        if why:
            self._note(why)
            return self._hand_on(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **inputs
            )
        most, eos, stops = _sort_criteria(stopping_criteria, input_ids.shape[1])
        eos = None if eos is None else eos.to(input_ids.device)
        assert starts is not None
        cache, pad = inputs.get("past_key_values"), generation_config._pad_token_tensor
        if not any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            pad = None
        extra = {"logits_to_keep": 1} if "logits_to_keep" in inputs else {}
        sampler = Sampler(logits_processor, generation_config.do_sample)
        steps = most - input_ids.shape[1] - 1  # after the prompt
        if steps and self.replays(input_ids) and not isinstance(cache, KVCache):
            # what is kept serves calls in inference mode and out of it; kernels go to the current device
            with torch.inference_mode(False), torch.no_grad(), _current(input_ids.device):
                ids = self._replay(input_ids, most, starts, eos, pad, sampler, extra, stops, streamer)
            if ids is not None:
                return ids
        if not isinstance(cache, KVCache):
            cache = KVCache(self.model.config, self.kv_cache, slots=min(most, input_ids.shape[1] + AHEAD))
        for layer in cache.layers:
            layer.record_past = False  # from here on nothing is taken back
        state = State(input_ids, most, starts, eos, pad)
        return run(self.model, state, cache, input_ids.shape[1], sampler, stops, streamer, extra).clone()

    def _replay(
        self,
        ids: Tensor,
        columns: int,
        starts: Tensor,
        eos: Tensor | None,
        pad: Tensor | None,
        sampler: Sampler,
        extra: dict[str, Any],
        stops: list[Any],
        streamer: Any,
    ) -> Tensor | None:
        """The tokens, by a CUDA graph; None while another call uses it, and where there can be none."""
        if NO_GRAPH in self.reasons or not self.graphs.busy.acquire(blocking=False):
            return None
        try:
            steps = self.graphs.steps(ids, columns, starts, eos, pad, sampler, extra)
            if steps is None:
                self._note(OUTSIDE)
                return None
            if steps.graph is None:
                with torch.random.fork_rng([ids.device] if ids.is_cuda else []):  # what follows draws as if it was not
                    steps.prefill(ids.shape[1])
                    steps.capture(self.graphs.capture)
                self.graphs.make_room()
                steps.state.begin(ids, starts)
                self.graphs.place = self.graphs.where()  # weights may have been merged on the way
        except torch.OutOfMemoryError:
            steps = None
            self.graphs.kept.clear()  # caches of other sizes; this call does without
            torch.cuda.empty_cache()
        except RuntimeError as error:
            steps = None
            self.graphs.kept.clear()
            self._note(NO_GRAPH)
            logger.warning("%s: %s; steps are launched one by one", NO_GRAPH, error)
        else:
            return run_graph(steps, ids.shape[1], columns, stops, streamer).clone()
        finally:
            self.graphs.busy.release()
        return None

    def _why_not_prepared(
        self, config: Any, input_ids: Tensor, starts: Tensor | None, inputs: dict[str, Any], streamer: Any
    ) -> str:
        """What of this call needs transformers' loop, now that all settings are known; empty if nothing."""
        mode = config.get_generation_mode()
        if mode in BEAMS and streamer is None:
            return "beam search"
        if mode not in MODES:
            raise _OtherMode(str(mode.value).replace("_", " "))
        for name in ("return_dict_in_generate", "prefill_chunk_size", "token_healing", "is_assistant"):
            if getattr(config, name, None):
                return name
        if config.cache_implementation not in (None, "dynamic"):
            return f"cache_implementation={config.cache_implementation!r}"
        if not inputs.get("use_cache"):
            return "use_cache=False"
        if others := sorted(name for name, value in inputs.items() if value is not None and name not in TAKEN):
            return f"the inputs {', '.join(others)}"
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            return "no prompt"
        return "a mask of something else than padding on the left" if starts is None else ""

    def _hand_on(self, input_ids: Tensor, processors: Any, criteria: Any, config: Any, **inputs: Any) -> Any:
        """transformers' loop for the mode of `config`."""
        kind: Any = type(self.model)
        method = kind._beam_search if config.get_generation_mode() in BEAMS else kind._sample
        if inputs.get("streamer") is None:
            inputs.pop("streamer", None)
        if self.kv_cache is not None and inputs.get("use_cache") and config.cache_implementation is None:
            if not isinstance(inputs.get("past_key_values"), KVCache):
                inputs["past_key_values"] = KVCache(self.model.config, self.kv_cache)
        return method(
            self.model,
            input_ids,
            logits_processor=processors,
            stopping_criteria=criteria,
            generation_config=config,
            **inputs,
        )


def _current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _with_stop_strings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with stopping strings as a criterion: transformers loses the tokenizer that they need on the way
    to a decoding function of one's own."""
    settings, tokenizer = kwargs.get("generation_config"), kwargs.get("tokenizer")
    strings = kwargs.get("stop_strings") or getattr(settings, "stop_strings", None)
    if not strings or tokenizer is None:
        return kwargs
    kwargs = {name: value for name, value in kwargs.items() if name != "stop_strings"}
    if settings is not None and getattr(settings, "stop_strings", None):
        kwargs["generation_config"] = settings = copy.deepcopy(settings)
        settings.stop_strings = None
    criteria = [*(kwargs.get("stopping_criteria") or ()), hf.StopStringCriteria(tokenizer, strings)]
    return {**kwargs, "stopping_criteria": hf.StoppingCriteriaList(criteria)}


def _starts(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Padding before each row, int32 [B]; None if some is elsewhere."""
    if mask is None:
        return torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    if mask.ndim != 2 or mask.shape != ids.shape:
        return None
    starts = (mask == 0).sum(1, dtype=torch.int32)
    left = torch.arange(mask.shape[1], device=mask.device) >= starts[:, None]
    return starts.to(ids.device) if bool((left == (mask != 0)).all()) else None


def _sort_criteria(criteria: Any, prompt: int) -> tuple[int, Tensor | None, list[Any]]:
    """(columns, end tokens, the criteria that remain to be asked after each token). One token there is in any case."""
    most, eos, rest = [], None, []
    for criterion in criteria:
        if type(criterion) is hf.MaxLengthCriteria:
            most.append(criterion.max_length)
        elif type(criterion) is hf.EosTokenCriteria and eos is None:
            eos = criterion.eos_token_id
        else:
            rest.append(criterion)
    return max(min(most), prompt + 1), eos, rest
