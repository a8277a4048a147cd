"""Text that streams is the text of the whole, for three kinds of tokenizers and prompts cut anywhere; special stops."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library
from wasat.runtime import Tokenizer
from wasat.runtime.tokenizer import StopStrings

BYTES = {f"<0x{i:02X}>": -9.0 for i in range(256)}
LETTERS = ["▁", *map(chr, range(33, 127)), "▁a", "▁b", "é"]


def _byte_level() -> Library:
    """GPT-2's kind."""
    made = Library(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _byte_fallback() -> Library:
    """Llama 2's, Mistral's and Gemma's kind."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", *BYTES, *LETTERS])}
    made = Library(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _unigram() -> Library:
    """T5's kind."""
    pieces = [("<unk>", 0.0), *((c, -1.0) for c in LETTERS), *BYTES.items()]
    made = Library(models.Unigram(pieces, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return made


KINDS = {"byte-level": _byte_level, "byte-fallback": _byte_fallback, "unigram": _unigram}


@functools.cache
def _tokenizer(kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        made = KINDS[kind]()
        made.add_special_tokens([AddedToken("<turn>", special=True), AddedToken("<end>", special=True)])
        made.save(f"{folder}/tokenizer.json")
        return Tokenizer(Path(folder) / "tokenizer.json")


def _streamed(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    stream = tokenizer.stream(prompt)
    text = "".join([stream.push(t) for t in answer])
    assert "\ufffd" not in text or "\ufffd" in tokenizer.decode(prompt + answer)
    return text + stream.flush()


TEXT = st.text(st.sampled_from([*"ab  é漢\u0301\u200d\ua984👩👧🙂\n"]), max_size=24)


@pytest.mark.parametrize("kind", KINDS)
@given(TEXT, st.integers(0, 100), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_prompt_may_be_cut_anywhere(kind: str, text: str, cut: int, begun: bool) -> None:
    """What the prompt holds whole is its own; a character that it only begins is the answer's."""
    tokenizer = _tokenizer(kind)
    turn = [next(iter(tokenizer.special))] if begun else []
    tokens = [*turn, *tokenizer.encode(text, special=False)]
    cut = min(cut, len(tokens))
    whole = tokenizer.decode(tokens)
    own = 0  # characters that are whole in the prompt: the most that both texts begin with, at any earlier cut
    for n in range(cut + 1):
        part = tokenizer.decode(tokens[:n])
        if whole.startswith(part) and "\ufffd" not in part:
            own = len(part)
    assert _streamed(tokenizer, tokens[:cut], tokens[cut:]) == whole[own:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_random_tokens_add_up(kind: str, seed: int) -> None:
    """Bytes that are no UTF-8, special tokens and unknown ids among them, from the beginning of a text."""
    tokenizer, rng = _tokenizer(kind), random.Random(seed)
    ids = [*range(tokenizer.library.get_vocab_size()), 10**6, *tokenizer.special]
    good = tokenizer.encode("é 漢🙂 x", special=False)
    for _ in range(60):
        tokens = [t for _ in range(rng.randint(0, 12)) for t in rng.choice([[rng.choice(ids)], good, good[:3]])]
        assert _streamed(tokenizer, [], tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["byte-fallback", "unigram"])
def test_a_run_of_bytes_that_is_no_text(kind: str) -> None:
    """One byte that fits nowhere makes U+FFFD of each byte beside it; of the prompt's own, the answer shows none."""
    tokenizer = _tokenizer(kind)
    a, b, bad = (tokenizer.library.token_to_id(f"<0x{x}>") for x in ("C3", "A9", "80"))
    x = tokenizer.library.token_to_id("x")
    assert _streamed(tokenizer, [x, a, b], [bad, x]) == "\ufffdx"
    assert _streamed(tokenizer, [x, a], [b, x]) == "éx"
    assert _streamed(tokenizer, [x, a], [x]) == "x"
    assert _streamed(tokenizer, [x, a, b, a], [b, x]) == "éx"
    stream = tokenizer.stream([x])
    assert [stream.push(t) for t in (a, b, x)] == ["", "", "éx"]
    stream.push(a)
    assert stream.settle() == ""
    stream.push(b)
    assert (stream.settle(), stream.flush()) == ("é", "")


def test_bytes_that_become_nothing_do_not_pile_up() -> None:
    tokenizer = _tokenizer("byte-level")
    half = tokenizer.encode("漢", special=False)[:1]
    stream = tokenizer.stream()
    text = "".join(stream.push(half[0]) for _ in range(500))
    assert len(stream._window) < 20
    assert text + stream.flush() == "\ufffd" * 500


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    """A prompt is neither cut nor filled up without a word."""
    library = _byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path / "tokenizer.json").encode("abcde")) == 5


@pytest.mark.parametrize("stop, pieces, shown", [
    ("<turn>", ["ab", "<turn>"], "ab"),
    ("b<turn>", ["a", "b", "<turn>"], "a"),
    ("<turn>x", ["ab", "<turn>", "xy"], "ab"),
    ("<turn><end>", ["ab", "<turn>", "<end>"], "ab"),
    ("turn", ["ab", "<turn>"], "ab"),
    ("bc", ["ab", "<turn>", "cd"], "a"),  # the text reads "abcd"
    ("n>c", ["ab", "<turn>", "cd"], "ab"),
])  # fmt: skip
def test_stop_strings_and_special_tokens(stop: str, pieces: list[str], shown: str) -> None:
    watcher, text = StopStrings([stop, "never"]), ""
    for piece in pieces:
        out, hit = watcher.push(piece, hidden=piece.startswith("<"))
        text += out
    assert (text, hit) == (shown, True)


def test_special_tokens_that_are_no_stop_are_not_shown() -> None:
    watcher = StopStrings(["<turn>!"])
    out = [watcher.push(p, hidden=p.startswith("<")) for p in ("a", "<turn>", "b", "<turn>")]
    assert out == [("a", False), ("", False), ("b", False), ("", False)]
    assert watcher.push("", last=True) == ("", False)


@pytest.mark.parametrize("kind", ["byte-fallback", "unigram"])
def test_special_tokens_between_prompt_and_answer_are_no_context(kind: str) -> None:
    """However many: the space after them stands between words, and is not the first of a text."""
    tokenizer = _tokenizer(kind)
    x, b = (tokenizer.library.token_to_id(t) for t in ("x", "▁b"))
    assert _streamed(tokenizer, [x, *[next(iter(tokenizer.special))] * 20], [b]) == " b"
