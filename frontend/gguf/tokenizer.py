"""The tokenizer that a GGUF file describes, rebuilt as a ``tokenizer.json``."""

from __future__ import annotations

import base64
import bisect
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from wasat.frontend.weights.gguf import Gguf
from wasat.ir import CheckpointError, Generation

from ..fields import brief
from .charsmap import check_charsmap

_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>",
    "[EOT]", "< EOT >", "_< EOT >", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
})  # fmt: skip
"""Tokens that end an answer, by how they are written: most files name only one of theirs."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORDS = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_NEWER = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_CASES = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+%s"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*%s"
    "|\\p{N}%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_MARKED = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
"""DeepSeek 3's: marks go with the letters behind them."""
_TEKKEN, _O200K = _CASES % ("", "", ""), _CASES % (_SHORT, _SHORT, "{1,3}")


@dataclass(frozen=True)
class _Pre:
    """How a text is cut before pairs are merged: each pattern in turn, within the pieces of the one before."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token is that token, whatever its merges."""
    bos: bool = False
    """Whether a text begins with BOS where the file does not say."""
    joined: bool = False
    """Of encoders: two texts are put between one beginning and one end."""


@dataclass(frozen=True)
class _Ends:
    """Which tokens stand around a text where the file does not say."""

    bos: bool = False
    eos: bool = False
    sep: bool = False
    first: bool = False
    """They are BERT's, of a class before and a separator behind."""
    joined: bool = False
    """Two texts have one beginning."""
    kinds: bool = False
    """The tokens of the second are of another kind."""


_DEFAULT = _Pre(("[\\p{P}\\$\\+<=>\\^~\\|]+", _WORDS, "\\p{N}+", "[0-9][0-9][0-9]"))
_LLAMA3 = _Pre((_NEWER % "\\p{N}{1,3}",), ignore_merges=True, bos=True)
_QWEN2 = _Pre((_NEWER % "\\p{N}",))
_DIGITS = _Pre(("\\p{N}", _WORDS))
_DEEPSEEK3 = _Pre(("\\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _MARKED))
_THREES = _Pre((_NEWER % "\\p{N}{1,3}",))
_SENTENCES = " ?[^(\\s|.,!?…。，、।۔،)]+"
PRE_TOKENIZERS = {
    "default": _DEFAULT, "gpt-2": _Pre((_WORDS,)), "phi-2": _Pre((_WORDS,)),
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "falcon3": _LLAMA3, "pixtral": _LLAMA3,
    "dbrx": _Pre(_LLAMA3.patterns), "smaug-bpe": _Pre(_LLAMA3.patterns), "olmo": _Pre((_WORDS,)),
    "mpt": _Pre((_WORDS,)), "gpt-4o": _Pre((_O200K,)),
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "stablelm2": _QWEN2, "megrez": _QWEN2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS, "exaone": _DIGITS,
    **dict.fromkeys(("roberta-bpe", "modern-bert", "jina-v1-en", "jina-v2-code"), _Pre((_WORDS,), joined=True)),
    "tekken": _Pre((_TEKKEN,), ignore_merges=True, bos=True),
    **dict.fromkeys(("lfm2", "falcon-h1", "midm-2.0"), _LLAMA3),
    "glm4": _Pre(_THREES.patterns, ignore_merges=True), "chatglm-bpe": _THREES,
    "deepseek-v3": _DEEPSEEK3, "hunyuan-dense": _DEEPSEEK3,
    **dict.fromkeys(("exaone4", "gigachat", "jais", "trillion", "granite-docling", "mellum", "a.x-4.0"), _Pre((_WORDS,))),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v2-es", "jina-v2-de"), _Pre((_WORDS,), joined=True)),
    **dict.fromkeys(("kormo", "hunyuan", "solar-open"), _QWEN2), "minerva-7b": _DIGITS, "mellum2": _DIGITS,
    "llama4": _Pre((_O200K,)), "kanana2": _Pre((_O200K,)), "minimax-m2": _Pre((_O200K,)),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _Pre((_SENTENCES,))), "viking": _Pre((_SENTENCES, "\\p{N}")),
    "falcon": _Pre(("[\\p{P}\\$\\+<=>\\^~\\|`]+", _WORDS, "[0-9][0-9][0-9]")),
    "seed-coder": _Pre((_NEWER.replace("\\p{N}]+[\\r\\n]*", "\\p{N}\\r\\n]+") % "\\p{N}",)),
}  # fmt: skip
"""By the name in ``tokenizer.ggml.pre``."""


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file, their kinds, and its other keys ``tokenizer.ggml.*``."""

    where: str
    keys: dict[str, Any]
    tokens: list[str]
    kinds: np.ndarray

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")

    def id(self, name: str) -> int | None:
        """A token id that the file may give."""
        value = self.keys.get(f"{name}_token_id")
        if value is None or (isinstance(value, int) and value == 2**32 - 1):  # -1 is how some writers say none
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.tokens):
            raise self.fail(f"tokenizer.ggml.{name}_token_id is {brief(value)}, and there are {len(self.tokens)} tokens")
        return value

    def named(self, name: str, written: str) -> int | None:
        """A token id that the file gives, or that of the token which is written so."""
        given = self.id(name)
        return given if given is not None or written not in self.tokens else self.tokens.index(written)

    def unknown(self) -> int | None:
        """The token that stands for what no other does."""
        given = self.id("unknown")
        return given if given is not None else next((int(i) for i in np.flatnonzero(self.kinds == UNKNOWN)), None)

    def scores(self) -> np.ndarray:
        """One of each token."""
        scores = self.keys.get("scores")
        if not isinstance(scores, np.ndarray) or scores.shape != (len(self.tokens),) or scores.dtype.kind != "f":
            raise self.fail(f"tokenizer.ggml.scores is no score for each of {len(self.tokens)} tokens")
        if not np.isfinite(scores).all():
            raise self.fail("tokenizer.ggml.scores holds numbers that are not finite")
        return scores

    def flag(self, name: str, default: bool) -> bool:
        value = self.keys.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"tokenizer.ggml.{name} is {value!r}; expected true or false")
        return value


def _vocabulary(g: Gguf) -> _Vocabulary:
    prefix = "tokenizer.ggml."
    keys = {k.removeprefix(prefix): v for k, v in g.metadata.items() if k.startswith(prefix)}
    tokens = keys.get("tokens")
    v = _Vocabulary(str(g.path), keys, tokens if isinstance(tokens, list) else [], np.asarray(keys.get("token_type", ())))
    if not v.tokens:
        raise v.fail("tokenizer.ggml.tokens is missing: the file holds no tokenizer")
    if not v.kinds.size:
        v = _Vocabulary(v.where, keys, v.tokens, np.full(len(v.tokens), NORMAL))
    if v.kinds.shape != (len(v.tokens),) or v.kinds.dtype.kind not in "iu":
        raise v.fail(f"tokenizer.ggml.token_type has {v.kinds.size} entries for {len(v.tokens)} tokens")
    if len(set(v.tokens)) < len(v.tokens):
        (twice, _), = Counter(v.tokens).most_common(1)
        raise v.fail(f"the token {brief(twice)} stands twice in tokenizer.ggml.tokens")
    return v


def special_ids(g: Gguf) -> Generation:
    """``eos`` lists all that end an answer: of a text, a turn, a message, named by the file or written as such are."""
    v = _vocabulary(g)
    ends = [v.id(name) for name in ("eos", "eot", "eom")]
    ends += [i for i, t in enumerate(v.tokens) if t in _ENDS and v.kinds[i] != NORMAL]
    return Generation(v.id("bos"), tuple(dict.fromkeys(i for i in ends if i is not None)), v.id("padding"))


def special_tokens(g: Gguf) -> dict[str, str]:
    """How the tokens are written that chat templates name."""
    v = _vocabulary(g)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    return {f"{k}_token": v.tokens[i] for k, name in names.items() if (i := v.id(name)) is not None}


def tokenizer_json(g: Gguf) -> str:
    """The text of a ``tokenizer.json``. Raises CheckpointError for a kind of tokenizer that is not known."""
    v = _vocabulary(g)
    kind = v.keys.get("model")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise v.fail(f"the tokenizer is of kind {brief(kind)}; there are {', '.join(_KINDS)}")
    parts, ends = _KINDS[kind](v)
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(v),
        "post_processor": _template(v, ends), **parts,
    }, ensure_ascii=False)  # fmt: skip


def _added(v: _Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in a text as they are written; those of control are no text."""
    return [
        {"id": int(i), "content": v.tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": bool(v.kinds[i] != USER_DEFINED)}
        for i in np.flatnonzero(np.isin(v.kinds, (CONTROL, USER_DEFINED, UNKNOWN))) if v.tokens[i]
    ]  # fmt: skip


def _template(v: _Vocabulary, ends: _Ends) -> dict[str, Any] | None:
    """What is put around a text, and between two."""
    first = v.id("bos") if v.flag("add_bos_token", ends.bos) else None
    if ends.first:
        first = first if first is not None else v.named("cls", "[CLS]")
    last = v.id("eos") if v.flag("add_eos_token", ends.eos) else None
    between = v.flag("add_sep_token", ends.sep)
    if ends.first:
        last, between = v.named("seperator", "[SEP]") if between else last, False  # the key is spelt so
    if first is None and last is None:
        return None

    def token(i: int | None, type: int) -> list[dict[str, Any]]:
        return [] if i is None else [{"SpecialToken": {"id": v.tokens[i], "type_id": type}}]

    def text(id: str, type: int) -> list[dict[str, Any]]:
        return [{"Sequence": {"id": id, "type_id": type}}]

    second = 1 if ends.kinds else 0
    if ends.joined:
        sep = v.id("seperator") if between else None
        sep = last if between and sep is None else sep
        pair = [
            *token(first, 0), *text("A", 0), *token(last, 0), *token(sep, 0), *text("B", second), *token(last, second),
        ]  # fmt: skip
    else:
        pair = [
            *token(first, 0), *text("A", 0), *token(last, 0), *token(first, 1), *text("B", 1), *token(last, 1),
        ]  # fmt: skip
    used = {next(iter(part["SpecialToken"].values())) for part in pair if "SpecialToken" in part}
    ids = {t: v.tokens.index(t) for t in sorted(used)}
    return {
        "type": "TemplateProcessing", "single": [*token(first, 0), *text("A", 0), *token(last, 0)], "pair": pair,
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in ids.items()},
    }  # fmt: skip


def _bpe(v: _Vocabulary, merges: list[str], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {t: i for i, t in enumerate(v.tokens)},
        "merges": merges, **options,
    }  # fmt: skip


def _gpt2(v: _Vocabulary) -> tuple[dict[str, Any], _Ends]:
    """Pairs of bytes, merged in the order that the file gives, within pieces that a pattern cuts."""
    name = v.keys.get("pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise v.fail(f"tokenizer.ggml.pre is {brief(name)}: how it cuts a text is not known; known are {known}")
    pre, merges = PRE_TOKENIZERS[name], v.keys.get("merges")
    if not isinstance(merges, list) or any(m.count(" ") != 1 for m in merges):
        raise v.fail("tokenizer.ggml.merges is no list of pairs")
    tokens = set(v.tokens)
    for m in merges:
        left, right = m.split(" ")
        if not tokens.issuperset((left, right, left + right)):
            raise v.fail(f"tokenizer.ggml.merges has {brief(m)}, and not all of its parts are tokens")
    split = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in pre.patterns]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
        "decoder": byte_level, "model": _bpe(v, merges, ignore_merges=pre.ignore_merges),
    }, _Ends(bos=pre.bos, sep=pre.joined, joined=pre.joined)  # fmt: skip


def _sentencepiece(v: _Vocabulary) -> tuple[dict[str, Any], _Ends]:
    """SentencePiece's pairs: of all neighbours that make a token, those of the highest score are merged first."""
    scores = v.scores()
    ids = {t: i for i, t in enumerate(v.tokens)}
    pairs: list[tuple[float, int, int, int]] = []
    lengths = sorted({len(t) for t in ids if t})  # a token may have a million letters: only what may begin it is tried
    for token, i in ids.items():
        for cut in lengths[: bisect.bisect_left(lengths, len(token))]:
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((-float(scores[i]), i, left, right))
    pairs.sort()
    unknown = v.unknown()
    unk = None if unknown is None else v.tokens[unknown]
    model = _bpe(
        v, [[v.tokens[left], v.tokens[right]] for _, _, left, right in pairs],  # type: ignore[misc]
        unk_token=unk, fuse_unk=True, byte_fallback=bool((v.kinds == BYTE).any()),
    )  # fmt: skip
    return {**_spaces(v, []), "model": model}, _Ends(bos=True)


def _spaces(v: _Vocabulary, first: list[dict[str, Any]]) -> dict[str, Any]:
    """SentencePiece's way with spaces: marks stand for them, one more before a text; steps ``first`` come before."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    steps = [*first, replace]
    if v.flag("add_space_prefix", True):
        steps.insert(-1, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if len(steps) > 1 else replace, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }  # fmt: skip


def _wordpiece(v: _Vocabulary) -> tuple[dict[str, Any], _Ends]:
    """BERT's words: the longest tokens from the left; in GGUF, those that begin a word have a mark, and the others none."""
    plain = {CONTROL, UNKNOWN, USER_DEFINED}
    names = [
        t if k in plain else t[1:] if t.startswith("▁") else f"##{t}" for t, k in zip(v.tokens, v.kinds.tolist())
    ]  # fmt: skip
    vocab = {t: i for i, t in enumerate(names)}
    if len(vocab) < len(names):
        (twice, _), = Counter(names).most_common(1)
        raise v.fail(f"two entries of tokenizer.ggml.tokens mean the part of a word {brief(twice)}")
    unknown = v.named("unknown", "[UNK]")
    if unknown is None:
        raise v.fail("tokenizer.ggml.unknown_token_id is missing: what stands for words that have no tokens is not known")
    lower = v.flag("normalizer.lowercase", True)
    accents = v.flag("normalizer.strip_accents", lower)
    normalizer = {
        "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": accents,
        "lowercase": lower,
    }  # fmt: skip
    return {
        "normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": names[unknown], "continuing_subword_prefix": "##", "vocab": vocab,
            "max_input_chars_per_word": 100,
        },
    }, _Ends(bos=True, sep=True, first=True, joined=True, kinds=True)  # fmt: skip


def _unigram(v: _Vocabulary) -> tuple[dict[str, Any], _Ends]:
    """SentencePiece's other kind: of all ways to cut a text into tokens, the one with the highest sum of scores."""
    unknown = v.unknown()
    if unknown is None:
        raise v.fail("tokenizer.ggml.unknown_token_id is missing: what stands for letters that have no tokens is not known")
    steps: list[dict[str, Any]] = []
    if (given := v.keys.get("precompiled_charsmap")) is not None:
        if not isinstance(given, np.ndarray) or given.dtype.itemsize != 1 or given.dtype.kind not in "iu":
            raise v.fail("tokenizer.ggml.precompiled_charsmap is no array of bytes")
        try:
            check_charsmap(given.tobytes())
        except ValueError as e:
            raise v.fail(f"tokenizer.ggml.precompiled_charsmap is damaged: {e}") from None
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(given.tobytes()).decode()})
    if v.flag("remove_extra_whitespaces", False):
        steps += [
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
            for pattern, content in (("\\A +| +\\z", ""), (" {2,}", " "))
        ]
    if v.flag("treat_whitespace_as_suffix", False):
        raise v.fail("tokenizer.ggml.treat_whitespace_as_suffix is true: marks behind words are not implemented")
    vocab = [[t, float(s)] for t, s in zip(v.tokens, v.scores().astype(np.float64))]
    model = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": bool((v.kinds == BYTE).any())}
    return {**_spaces(v, steps), "model": model}, _Ends(eos=True, joined=True)


_KINDS = {"gpt2": _gpt2, "llama": _sentencepiece, "bert": _wordpiece, "t5": _unigram}
"""By ``tokenizer.ggml.model``."""
