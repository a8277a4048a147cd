"""Tokenizers of every kind that the C host reads, trained on this repository's own documents, and texts that try them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = Path(__file__).parents[2]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = GPT4.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'ſ", "'S", "'T", "K"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _text() -> str:
    return "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/runtime.md", "docs/nn.md"))


def _trained(model: models.Model, kind: type, parts: dict[str, object], **options: object) -> Tokenizer:
    t = Tokenizer(model)
    for name, part in parts.items():
        setattr(t, name, part)
    t.train_from_iterator([_text()], kind(vocab_size=700, show_progress=False, **options))
    return t


def byte_level(pattern: str | None = None, **parts: object) -> Tokenizer:
    """GPT-2, or with a pattern: Llama 3, Qwen, DeepSeek, o200k."""
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    before = bare if pattern is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bare])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t = _trained(models.BPE(), trainers.BpeTrainer, {"pre_tokenizer": before, "decoder": decoders.ByteLevel(), **parts},
                 initial_alphabet=alphabet, special_tokens=["<|end|>", "<|start|>"])  # fmt: skip
    t.add_tokens(["hello world", AddedToken("<tool>", lstrip=True, rstrip=True), AddedToken("ab", single_word=True)])
    t.post_processor = processors.TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", t.token_to_id("<|start|>"))])
    return t


def byte_fallback(normalizer: normalizers.Normalizer, before: pre_tokenizers.PreTokenizer | None, first: bool) -> Tokenizer:
    """Llama 2, Mistral, Gemma."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if first:
        steps.append(decoders.Strip(" ", 1, 0))
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    t.train_from_iterator([line[i : i + 40] for line in _text().splitlines() for i in range(0, len(line), 40)],
                          trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *BYTES],
                                              show_progress=False))  # fmt: skip
    t.normalizer, t.pre_tokenizer, t.decoder = normalizer, before, decoders.Sequence(steps)
    data = json.loads(t.to_str())
    data["pre_tokenizer"] = json.loads(before.__getstate__()) if before is not None else None
    data["added_tokens"] = [a for a in data["added_tokens"] if a["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(data))


def _word_piece() -> Tokenizer:
    t = _trained(
        models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer,
        {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
         "decoder": decoders.WordPiece()}, special_tokens=["[UNK]", "[CLS]", "[SEP]"],
    )  # fmt: skip
    t.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return t


def _unigram(scheme: str, **parts: object) -> Tokenizer:
    mark = {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme=scheme),
            "decoder": decoders.Metaspace(prepend_scheme=scheme)}  # fmt: skip
    t = _trained(models.Unigram(), trainers.UnigramTrainer, {**mark, **parts}, unk_token="<unk>",
                 special_tokens=["<unk>", "</s>"])  # fmt: skip
    t.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return t


def _word_level() -> Tokenizer:
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(), pre_tokenizers.Punctuation("merged_with_next")]
    return _trained(models.WordLevel(unk_token="?"), trainers.WordLevelTrainer,
                    {"normalizer": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(),
                                                         normalizers.Lowercase()]),
                     "pre_tokenizer": pre_tokenizers.Sequence(steps)}, special_tokens=["?"])  # fmt: skip


def _suffixed() -> Tokenizer:
    """GPT and CLIP: a mark at each word's end."""
    steps = [pre_tokenizers.Split(Regex(r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)]
    return _trained(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"), trainers.BpeTrainer,
                    {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                                         normalizers.Lowercase(), normalizers.Strip()]),
                     "pre_tokenizer": pre_tokenizers.Sequence(steps), "decoder": decoders.BPEDecoder()},
                    end_of_word_suffix="</w>", special_tokens=["<unk>"])  # fmt: skip


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(GPT4),
    "qwen": lambda: byte_level(QWEN, normalizer=normalizers.NFC()),
    "o200k": lambda: byte_level(O200K),
    "deepseek": lambda: byte_level(DEEPSEEK),
    "llama2": lambda: byte_fallback(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True
    ),
    "gemma": lambda: byte_fallback(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    "mistral": lambda: byte_fallback(
        normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True
    ),
    "unigram": lambda: _unigram("always"),
    "unigram nfkc": lambda: _unigram("first", normalizer=normalizers.NFKC()),
    "wordpiece": _word_piece,
    "wordlevel": _word_level,
    "suffix": _suffixed,
    "whitespace": lambda: byte_level(None, pre_tokenizer=pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)])),
}  # fmt: skip


class Texts:
    """Texts that try a tokenizer: its own tokens, words, spaces, marks, every plane of Unicode."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        added = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
        vocab, words = list(tokenizer.get_vocab()), _text()

        def piece() -> str:
            at = rng.randrange(len(words))
            return words[at : at + rng.randrange(30)]

        def among(*ranges: tuple[int, int]) -> Callable[[], str]:
            return lambda: chr(rng.randrange(*rng.choice(ranges)))

        self.makers = [
            among((32, 127)), lambda: rng.choice(" \t\n\r  \u00a0\u3000\u2028\u0085\x1c"), among((0xA0, 0x600)), piece,
            lambda: rng.choice(ENDINGS), among((0, 0xD800), (0xE000, 0x110000)),
            lambda: rng.choice(added) if added else "", lambda: rng.choice(vocab), among((0x300, 0x370)),
            among((0x1100, 0x1200), (0xAC00, 0xD7A4)), lambda: rng.choice("é́가각🎉👩‍👩‍👧ﬁ½①ǅİıßΣς"), among((0x4E00, 0x9FFF)),
            lambda: str(rng.randrange(10**6)), among((0, 0x20)), among((0x900, 0xE00)),
        ]  # fmt: skip

    def text(self) -> str:
        weights = [self.rng.random() ** 3 for _ in self.makers]
        return "".join(self.rng.choices(self.makers, weights)[0]() for _ in range(self.rng.randrange(25)))
