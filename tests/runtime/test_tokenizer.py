"""Text that arrives token by token, and stop strings in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import KINDS
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models
from wasat.runtime import ArtifactError, Tokenizer
from wasat.runtime.tokenizer import StopStrings


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file)


def test_there_and_back(tokenizer: Tokenizer) -> None:
    text = "naïve 漢字 🙂\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("a"), 256]) == "a"  # special tokens are no text


def test_a_stream_shows_whole_characters_only(tokenizer: Tokenizer) -> None:
    text = "aé漢🙂b"
    stream = tokenizer.stream()
    assert [stream.push(t) for t in tokenizer.encode(text)] == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "b"]
    assert stream.flush() == ""


def test_bytes_that_never_become_a_character_show_at_the_end(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("漢")[:2]
    stream = tokenizer.stream()
    assert [stream.push(t) for t in half] == ["", ""]
    assert stream.flush() == tokenizer.decode(half)
    assert stream.flush() == ""


@pytest.mark.parametrize("seed", range(20))
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, seed: int) -> None:
    """For random bytes, most of which are no UTF-8."""
    rng = np.random.default_rng(seed)
    tokens = [int(t) for t in rng.integers(0, 256, 60)]
    tokens[20:20] = tokenizer.encode("ordinary text, naïve 🙂")
    stream = tokenizer.stream()
    assert "".join([stream.push(t) for t in tokens] + [stream.flush()]) == tokenizer.decode(tokens)


def test_a_stream_goes_on_where_the_prompt_ends(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("漢")[:1], tokenizer.encode("漢")[1:]
    stream = tokenizer.stream(a)  # the character began in the prompt and is completed by what follows
    assert "".join(stream.push(t) for t in b) == "漢"


def test_the_space_of_the_first_word_is_kept(tmp_path: Path) -> None:
    """A decoder that drops the space at the beginning of a text must not drop it at the beginning of a continuation."""
    library = Library(models.WordLevel({"▁def": 0, "▁main": 1}, "▁def"))
    library.decoder = decoders.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode([1]) == "main"
    stream = tokenizer.stream([0])
    assert [stream.push(1), stream.push(1)] == [" main", " main"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path / "tokenizer.json")


def _cut(text: str, stops: list[str], size: int) -> tuple[str, bool]:
    watcher, shown = StopStrings(stops), ""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for i, piece in enumerate(pieces):
        out, hit = watcher.push(piece, last=i == len(pieces) - 1)
        shown += out
        assert not any(s in shown for s in stops)
        if hit:
            return shown, True
    return shown, False


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_strings_cut_before_the_first(text: str, stops: list[str], size: int) -> None:
    shown, hit = _cut(text, stops, size)
    assert text.startswith(shown)
    assert hit == any(s in text for s in stops)
    if not hit:
        assert shown == text
    elif size == 1:  # the stop string that is complete first; of several, the longest
        end = min(text.find(s) + len(s) for s in stops if s in text)
        assert shown == text[: min(end - len(s) for s in stops if text[:end].endswith(s))]
    else:
        assert any(text[len(shown) :].startswith(s) for s in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    watcher = StopStrings(["\n\ndef", "END"])
    assert watcher.push("a\n") == ("a", False)
    assert watcher.push("b") == ("\nb", False)
    assert watcher.push(" EN\n\nde") == (" EN", False)
    assert watcher.push("fg") == ("", True)
    assert watcher.push("more", last=True) == ("", True)


def test_what_was_held_back_shows_when_nothing_more_comes() -> None:
    watcher = StopStrings(["END"])
    assert watcher.push("EN") == ("", False)
    assert watcher.push("", last=True) == ("EN", False)


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
@pytest.mark.parametrize("prefix", ["a", "##", "\u00e9"])
def test_merges_without_the_prefix_that_they_should_have(kind: str, prefix: str, tmp_path: Path) -> None:
    """The library ended the process. Merges are lists, and in older files texts."""
    data = json.loads(KINDS[kind]().to_str())
    for merges in (data["model"]["merges"], [" ".join(m) for m in data["model"]["merges"]]):
        data["model"] |= {"continuing_subword_prefix": prefix, "merges": merges}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read .continuing_subword_prefix is "):
            Tokenizer(tmp_path / "tokenizer.json")


def test_merges_that_have_their_prefix(tmp_path: Path) -> None:
    vocabulary = {c: i for i, c in enumerate(["a", "b", "##a", "##b", "ab"])}
    Library(models.BPE(vocabulary, [("a", "##b")], continuing_subword_prefix="##")).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").encode("ab") == [4]
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = ["a ##b"]  # as older files have them
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer(tmp_path / "tokenizer.json").encode("ab") == [4]
