"""The tokenizer of a GGUF file, from its metadata alone (keys `tokenizer.*`, see the GGUF specification).

Two kinds are supported. "llama" is SentencePiece BPE: tokens with scores, no merge list; adjacent symbols merge while
their concatenation is a token, the best score first (Kudo and Richardson 2018), so the merges can be written out from
the scores. "gpt2" is byte-level BPE: the merge list is stored, the splitting regular expression is only named
(`tokenizer.ggml.pre`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of the token types; 2 unknown, 5 unused, 6 byte
SPACE = "▁"  # what SentencePiece writes for a space
MODELS = ("llama", "gpt2")

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How a byte-level tokenizer cuts text before merging."""

    pattern: str | None = None  # None: GPT-2's own
    digits: bool = False  # cut at every digit first
    nfc: bool = False
    ignore_merges: bool = False  # a whole piece that is a token is taken as it is
    add_bos: bool = False  # where the file does not say


SPLITS = {
    "gpt-2": Split(),
    "smollm": Split(digits=True),
    "qwen2": Split(f"{CONTRACTIONS}|{LETTERS}|\\p{{N}}|{OTHERS}", nfc=True),
    "llama-bpe": Split(f"{CONTRACTIONS}|{LETTERS}|\\p{{N}}{{1,3}}|{OTHERS}", ignore_merges=True, add_bos=True),
}


def build_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that `metadata` (of `read_header`) describes, ready for `save_pretrained`.

    Control tokens are special; user-defined ones match verbatim before any merging. Where the file asks for a space in
    front of the text, each piece of text after such a token gets one as well, as in llama.cpp. The beginning- and
    end-of-sequence tokens are added as the file says (default: beginning for "llama"). Raises ValueError for an
    unsupported kind, naming those that are, and for missing or contradictory keys.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in MODELS:
        raise ValueError(f"unsupported tokenizer.ggml.model {kind!r}; supported: {', '.join(MODELS)}")
    vocabulary = _Vocabulary(metadata)
    tokenizer = _sentencepiece(vocabulary) if kind == "llama" else _byte_level(vocabulary)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type == CONTROL)
            for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if token_type in (CONTROL, USER_DEFINED) and token
        ]
    )
    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or vocabulary.split.add_bos)
    before = {"bos": bos} if bos is not None and add_bos else {}
    after = {"eos": eos} if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False) else {}
    if before or after:
        first = [f"{part}:0" for part in (*before, "$A", *after)]
        second = [f"{part}:1" for part in (*before, "$B", *after)]
        added = [{"id": role, "ids": [vocabulary.ids[t]], "tokens": [t]} for role, t in {**before, **after}.items()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first, pair=first + second, special_tokens=added
        )
    extra: dict[str, Any] = {}
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(context, int):
        extra["model_max_length"] = context
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=vocabulary.special("unknown"),
        pad_token=vocabulary.special("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **extra,
    )


class _Vocabulary:
    """The vocabulary keys, checked: `tokens`, `types`, `ids`, the special tokens by role, and the optional lists."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self.tokens: list[str] = self.array("tokens", str)
        if not self.tokens:
            raise ValueError("tokenizer.ggml.tokens is missing or empty")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ValueError(f"tokenizer.ggml.tokens repeats {len(self.tokens) - len(self.ids)} of its tokens")
        self.types: list[int] = self.array("token_type", int) or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise ValueError(f"{len(self.types)} token types for {len(self.tokens)} tokens")

    @property
    def split(self) -> Split:
        name = self.metadata.get("tokenizer.ggml.pre")
        if name not in SPLITS:
            raise ValueError(f"unsupported tokenizer.ggml.pre {name!r}; supported: {', '.join(SPLITS)}")
        return SPLITS[name]

    def array(self, name: str, element: type) -> list[Any]:
        """The array `tokenizer.ggml.<name>`, or an empty list."""
        values = self.metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(values, list) or (values and not isinstance(values[0], element)):  # arrays have one type
            raise ValueError(f"tokenizer.ggml.{name} is not an array of {element.__name__}")
        return values

    def special(self, role: str) -> str | None:
        """The token of `role` ("bos", "eos", "unknown", "padding"), or None where the file names none."""
        key = f"tokenizer.ggml.{role}_token_id"
        index = self.metadata.get(key)
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise ValueError(f"{key} is {index!r}, the vocabulary has {len(self.tokens)} tokens")
        return self.tokens[index]


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    scores = vocabulary.array("scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise ValueError(f"{len(scores)} tokenizer.ggml.scores for {len(vocabulary.tokens)} tokens")
    merges = merges_from_scores(vocabulary.tokens, scores, vocabulary.types)
    unknown = vocabulary.special("unknown")
    tokenizer = Tokenizer(BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if prefix else decode)
    return tokenizer


def merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int] | None = None
) -> list[tuple[str, str]]:
    """Every way to write a token as two tokens, best score of the result first; only normal tokens take part.

    The two halves of one token have the same score whichever way it is cut, so among these any order is faithful; the
    longer left half comes first, as in the tokenizer files that are published for such models.
    """
    normal = {
        token: score
        for index, (token, score) in enumerate(zip(tokens, scores, strict=True))
        if types is None or types[index] == NORMAL
    }
    merges: list[tuple[str, str]] = []
    for token in sorted(normal, key=normal.__getitem__, reverse=True):  # stable: equal scores stay in vocabulary order
        for cut in range(len(token) - 1, 0, -1):
            left = token[:cut]
            if left in normal and token[cut:] in normal:
                merges.append((left, token[cut:]))
    return merges


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    split = vocabulary.split
    merges = [tuple(merge.split(" ")) for merge in vocabulary.array("merges", str)]
    if not merges:
        raise ValueError("tokenizer.ggml.merges is missing or empty, which a gpt2 tokenizer needs")
    for index, merge in enumerate(merges):
        if len(merge) != 2 or not all(part in vocabulary.ids for part in (*merge, "".join(merge))):
            raise ValueError(f"tokenizer.ggml.merges[{index}] is {merge!r}, not two tokens that make a third")
    tokenizer = Tokenizer(BPE(vocabulary.ids, merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
