"""The tokenizer of a GGUF file cuts text as SentencePiece or byte-level BPE does, and survives saving."""

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
from gguf_files import CHARACTERS, CONTROL, NORMAL, PIECES, gguf_tensors, tiny_llama, vocabulary, write_gguf
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from fastllm.checkpoints.gguf import load_gguf
from fastllm.checkpoints.gguf_tokenizer import SPLITS, build_tokenizer, merges_from_scores

PRE = "tokenizer.ggml."
SIZE = len(vocabulary()[0])
GGUF_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def sentencepiece(**changes: Any) -> PreTrainedTokenizerFast:
    tokens, scores, types = vocabulary()
    keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **changes}
    return build_tokenizer({PRE + key: value for key, value in keys.items() if value is not None})


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    """All bytes, and merges of digits, of spaces and letters, and of a contraction."""
    merges = ["1 2", "12 3", "Ġ a", "' L", "'L L", "h e", "l l", "he ll", "hell o"]
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), "Ġhello", "<|end|>"]
    keys = {"model": "gpt2", "tokens": tokens, "merges": merges, "pre": "gpt-2"}
    keys |= {"token_type": [NORMAL] * (len(tokens) - 1) + [CONTROL], "eos_token_id": len(tokens) - 1, **changes}
    return build_tokenizer({PRE + key: value for key, value in keys.items() if value is not None})


def merge_greedily(text: str) -> list[str]:
    """SentencePiece's rule, literally: of all neighbours that make a normal token the best merge, leftmost first."""
    score = {token: value for token, value, kind in zip(*vocabulary(), strict=True) if kind == NORMAL}
    symbols = list(text)
    while True:
        found = [
            (-score[left + right], place)
            for place, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in score
        ]
        if not found:
            return [
                part
                for symbol in symbols
                for part in ([symbol] if symbol in score else [f"<0x{byte:02X}>" for byte in symbol.encode()])
            ]
        place = min(found)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]


def test_text_is_cut_as_sentencepiece_cuts_it() -> None:
    tokenizer = sentencepiece(add_space_prefix=False)
    generator = random.Random(0)
    alphabet = [*CHARACTERS.replace("▁", " "), "é", "😀", *(piece.replace("▁", " ") for piece in PIECES)]
    multiple = 0
    for _ in range(500):
        text = "".join(generator.choice(alphabet) for _ in range(generator.randint(1, 40)))
        expected = merge_greedily(text.replace(" ", "▁"))
        assert tokenizer.tokenize(text) == expected, text
        multiple += sum(len(token) > 2 and not token.startswith("<0x") for token in expected)
    assert multiple > 1000  # the comparison met merged tokens


def test_a_few_cuts_by_hand() -> None:
    tokenizer = sentencepiece()
    assert tokenizer.tokenize("the rest") == ["▁the", "▁", "rest"]
    assert tokenizer.tokenize("é the") == ["▁", "<0xC3>", "<0xA9>", "▁the"]
    assert sentencepiece(add_space_prefix=False).tokenize("the rest") == ["the", "▁", "rest"]


def test_user_defined_and_control_tokens_match_verbatim() -> None:
    tokenizer = sentencepiece(add_space_prefix=False)
    assert tokenizer.tokenize("the\n\n\nthe<tool>in<|end|>") == [
        "the",
        "\n\n",
        "<0x0A>",
        "the",
        "<tool>",
        "in",
        "<|end|>",
    ]
    ids = tokenizer("the<tool><|end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>"
    assert "<0x41>" not in tokenizer.tokenize("<0x41>")  # a byte token is no text


@pytest.mark.parametrize("prefix", [True, False])
def test_decoding_gives_the_text_back(prefix: bool) -> None:
    tokenizer = sentencepiece(add_space_prefix=prefix)
    for text in ("the rest", " the  rest ", "é😀 and\nx", "in<tool>"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_space_in_front_returns_after_a_user_defined_token() -> None:
    assert sentencepiece().tokenize("the<tool>the") == ["▁the", "<tool>", "▁the"]  # as in llama.cpp
    assert sentencepiece(add_space_prefix=False).tokenize("the<tool>the") == ["the", "<tool>", "the"]


@pytest.mark.parametrize("keys", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_begin_and_end(keys: dict[str, bool]) -> None:
    tokenizer = sentencepiece(**keys)
    plain = tokenizer("the", add_special_tokens=False).input_ids
    before = [1] if keys.get("add_bos_token", True) else []
    after = [2] if keys.get("add_eos_token", False) else []
    assert plain == tokenizer.convert_tokens_to_ids(["▁the"])
    assert tokenizer("the").input_ids == before + plain + after
    assert tokenizer("the", "the").input_ids == 2 * (before + plain + after)


def test_a_bos_that_the_file_does_not_name() -> None:
    tokenizer = sentencepiece(bos_token_id=None, add_bos_token=True)
    assert tokenizer.bos_token is None and tokenizer("the").input_ids == tokenizer.convert_tokens_to_ids(["▁the"])


def test_merges() -> None:
    merges = merges_from_scores(["a", "b", "c", "ab", "bc", "abc", "<s>"], [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0])
    assert merges == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    types = [NORMAL, NORMAL, NORMAL, CONTROL, NORMAL, NORMAL, CONTROL]
    assert merges_from_scores(["a", "b", "c", "ab", "bc", "abc", "<s>"], [0.0] * 7, types) == [("b", "c"), ("a", "bc")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_and_read_back(tmp_path: Path, kind: str) -> None:
    tokenizer = (sentencepiece if kind == "llama" else byte_level)(add_bos_token=True)
    tokenizer.chat_template = GGUF_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        again = reader.from_pretrained(tmp_path)
        for text in ("the rest é😀\n\n<tool>", "hello 123 <|end|>", "", "  and"):
            assert again(text).input_ids == tokenizer(text).input_ids
            assert again.decode(again(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.chat_template == GGUF_TEMPLATE
        assert again.model_max_length == tokenizer.model_max_length


def test_from_a_file(tmp_path: Path) -> None:
    """Chat template, special tokens and context length go all the way from a file."""
    keys = {"chat_template": GGUF_TEMPLATE, "ggml.padding_token_id": 3, "ggml.add_space_prefix": False}
    _, tokenizer = load_gguf(write_gguf(tmp_path / "a.gguf", gguf_tensors(tiny_llama()), tokenizer=keys))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<unk>", "<|end|>")
    assert tokenizer.model_max_length == 128
    chat = [{"role": "user", "content": "the rest"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "user: the rest\n"


@pytest.mark.parametrize(
    ("pre", "numbers", "contraction"),
    [
        ("gpt-2", ["123", "4"], ["h", "'", "L", "L"]),  # digits stay together, and only lower-case contractions count
        ("smollm", ["1", "2", "3", "4"], ["h", "'", "L", "L"]),
        ("qwen2", ["1", "2", "3", "4"], ["h", "'LL"]),
        ("llama-bpe", ["123", "4"], ["h", "'LL"]),
    ],
)
def test_byte_level_splits(pre: str, numbers: list[str], contraction: list[str]) -> None:
    tokenizer = byte_level(pre=pre)
    assert tokenizer.tokenize("1234") == numbers
    assert tokenizer.tokenize("h'LL") == contraction
    assert tokenizer.decode(tokenizer("hello é\n\n  a 12345 😀").input_ids) == "hello é\n\n  a 12345 😀"
    assert tokenizer.tokenize(" hello<|end|>") == (["Ġhello"] if pre == "llama-bpe" else ["Ġ", "hello"]) + ["<|end|>"]


def test_digits_are_cut_in_threes_or_not_at_all() -> None:
    assert byte_level(pre="llama-bpe").tokenize("0123") == ["0", "12", "3"]
    assert byte_level(pre="gpt-2").tokenize("0123") == ["0", "123"]


def test_the_regular_expressions_are_the_published_ones() -> None:
    assert SPLITS["qwen2"].pattern == PRETOKENIZE_REGEX
    assert SPLITS["llama-bpe"].pattern == inspect.signature(TikTokenConverter).parameters["pattern"].default


def test_composed_characters() -> None:
    assert byte_level(pre="qwen2")("e\u0301").input_ids == byte_level(pre="qwen2")("é").input_ids
    assert byte_level(pre="gpt-2")("e\u0301").input_ids != byte_level(pre="gpt-2")("é").input_ids


def test_begin_for_byte_level() -> None:
    assert byte_level(bos_token_id=3)("a").input_ids == byte_level()("a").input_ids  # gpt-2: none unless asked for
    assert byte_level(bos_token_id=3, add_bos_token=True)("a").input_ids[0] == 3
    assert byte_level(bos_token_id=3, pre="llama-bpe")("a").input_ids[0] == 3


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "no_vocab", None])
def test_other_kinds(kind: str | None) -> None:
    with pytest.raises(ValueError, match=f"unsupported tokenizer.ggml.model {kind!r}; supported: llama, gpt2"):
        sentencepiece(model=kind)


@pytest.mark.parametrize("pre", ["tekken", "default", None])
def test_other_splits(pre: str | None) -> None:
    with pytest.raises(ValueError, match=f"tokenizer.ggml.pre {pre!r}; supported: gpt-2, smollm, qwen2, llama-bpe"):
        byte_level(pre=pre)


CONTRADICTIONS = {
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "tokens that are numbers": ({"tokens": [1, 2]}, "tokens is not an array of str"),
    "tokens that are one string": ({"tokens": "abc"}, "tokens is not an array of str"),
    "a token twice": ({"tokens": ["a", "b", "a"]}, "repeats 1 of its tokens"),
    "no scores": ({"scores": None}, f"0 tokenizer.ggml.scores for {SIZE} tokens"),
    "too few scores": ({"scores": [1.0]}, f"1 tokenizer.ggml.scores for {SIZE} tokens"),
    "too few types": ({"token_type": [1]}, f"1 token types for {SIZE} tokens"),
    "a bos beyond": ({"bos_token_id": SIZE}, f"bos_token_id is {SIZE}, the vocabulary has {SIZE}"),
    "an eos that is text": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    "a negative one": ({"padding_token_id": -1}, "padding_token_id is -1"),
}


@pytest.mark.parametrize(("keys", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sentencepiece(**keys)


@pytest.mark.parametrize("merges", [None, [], ["a"], ["1 2", "a b c"], ["x y"], ["1 9"]])
def test_bad_merges(merges: list[str] | None) -> None:
    with pytest.raises(ValueError, match="tokenizer.ggml.merges"):
        byte_level(merges=merges)
