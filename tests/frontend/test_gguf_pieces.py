"""Tokenizers of GGUF files that are not of pairs: Unigram is SentencePiece's, WordPiece a BERT folder's; damage is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from wasat.frontend import CheckpointError
from wasat.frontend.gguf.charsmap import check_charsmap
from wasat.frontend.gguf.tokenizer import tokenizer_json
from wasat.frontend.weights.gguf import Gguf

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gguf_unigram.json").read_text(encoding="utf-8"))["cases"]
CHARSMAP = base64.b64decode(GOLDEN["plain"]["charsmap"])


def described(**keys: Any) -> Gguf:
    """A file of nothing but a tokenizer."""
    arrays = {"scores": np.float32, "token_type": np.int32}
    found = {k: np.asarray(v, arrays[k]) if k in arrays else v for k, v in keys.items()}
    return Gguf(Path("m.gguf"), {f"tokenizer.ggml.{k}": v for k, v in found.items()}, {})


def unigram(name: str, **more: Any) -> Gguf:
    case = GOLDEN[name]
    if case["charsmap"]:
        more.setdefault("precompiled_charsmap", np.frombuffer(base64.b64decode(case["charsmap"]), np.uint8))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return described(**{"model": "t5", **case["keys"], **ids, **more})


@pytest.mark.parametrize("name", GOLDEN)
def test_unigram_is_sentencepiece(name: str) -> None:
    found = Tokenizer.from_str(tokenizer_json(unigram(name)))
    for text, ids, back in GOLDEN[name]["texts"]:
        assert found.encode(text, add_special_tokens=False).ids == ids, text
        if 0 not in ids:  # which SentencePiece writes in a way of its own
            assert found.decode(ids) == back
    assert len({tuple(ids) for _, ids, _ in GOLDEN[name]["texts"]}) > 20


def test_what_stands_around_a_text() -> None:
    plain = Tokenizer.from_str(tokenizer_json(unigram("plain")))
    assert plain.encode("the").ids[-1] == 2
    assert plain.encode("the", "fox").tokens.count("</s>") == 2  # T5's
    both = Tokenizer.from_str(tokenizer_json(unigram("plain", add_bos_token=True, add_sep_token=True, seperator_token_id=2)))
    tokens = both.encode("the", "fox").tokens  # XLM-RoBERTa's
    assert (tokens[0], tokens.count("<s>"), tokens.count("</s>")) == ("<s>", 1, 3)
    assert set(both.encode("the", "fox").type_ids) == {0}


@pytest.mark.parametrize("keys, message", [
    ({"precompiled_charsmap": np.zeros(3, np.uint8)}, "precompiled_charsmap is damaged: it has 3 bytes"),
    ({"precompiled_charsmap": "abc"}, "precompiled_charsmap is no array of bytes"),
    ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is true"),
    ({"remove_extra_whitespaces": 1}, "remove_extra_whitespaces is 1; expected true or false"),
])  # fmt: skip
def test_unigram_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_json(unigram("plain", **keys))


def test_unigram_without_an_unknown_token() -> None:
    g = unigram("identity")
    g.metadata["tokenizer.ggml.token_type"][0] = 3
    del g.metadata["tokenizer.ggml.unknown_token_id"]
    with pytest.raises(CheckpointError, match="unknown_token_id is missing"):
        tokenizer_json(g)


def test_damaged_tables_are_refused_or_harmless() -> None:
    """What is not refused can be followed by every text: the package that does so stops the process if it leaves a table."""
    check_charsmap(CHARSMAP)
    size = int.from_bytes(CHARSMAP[:4], "little")
    rng, refused = np.random.default_rng(0), 0
    text = "".join(map(chr, range(1, 1200))) + "½ａe\u0301Ⅷ🙂"
    for _ in range(300):
        data = np.frombuffer(CHARSMAP, np.uint8).copy()
        if rng.random() < 0.2:
            data = data[: rng.integers(len(data))]
        else:
            used = np.flatnonzero(data[4 : 4 + size]) + 4
            data[rng.choice(used, rng.integers(1, 4))] = rng.integers(0, 256)
            data[rng.choice(len(data))] ^= 1 << rng.integers(8)
        try:
            made = tokenizer_json(unigram("plain", precompiled_charsmap=data))
        except CheckpointError as e:
            refused += "precompiled_charsmap is damaged" in str(e)
        else:
            Tokenizer.from_str(made).encode(text)
    assert 50 < refused < 290


@pytest.mark.parametrize("change, message", [
    ((0, 2**31 - 4), "its array would take"), ((0, 3), "its array would take"),
    ((1, 0xFFFFFE00), "lie outside its array"),
])  # fmt: skip
def test_tables_that_lead_outside(change: tuple[int, int], message: str) -> None:
    data = np.frombuffer(CHARSMAP, "<u4", 257).copy()
    data[change[0]] = change[1]
    with pytest.raises(ValueError, match=message):
        check_charsmap(data.tobytes() + CHARSMAP[257 * 4 :])


def test_an_array_that_is_shorter_than_the_letters() -> None:
    with pytest.raises(ValueError, match="lie outside its array"):
        check_charsmap(np.array([16, 1 << 10, 0, 0, 0], "<u4").tobytes() + b"\0")


def test_a_string_that_begins_inside_a_letter() -> None:
    size = int.from_bytes(CHARSMAP[:4], "little")
    units = np.frombuffer(CHARSMAP, "<u4", size // 4, 4).copy()
    place = CHARSMAP[4 + size :].index("\u00e9".encode())
    (leaf,) = np.flatnonzero(units == 2**31 + place)
    units[leaf] += 1
    with pytest.raises(ValueError, match="begins inside a letter"):
        check_charsmap(CHARSMAP[:4] + units.tobytes() + CHARSMAP[4 + size :])


@pytest.mark.parametrize("end, message", [(b"\xff\0", "no UTF-8"), (b"ab", "has no end")])
def test_strings_of_tables(end: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_charsmap(CHARSMAP + end)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "fox", "jump", "##s", "##ed", "un", "##the", "caf", "##e", "日", "-", "##9"]


def marked(words: list[str]) -> list[str]:
    """As llama.cpp's converter writes them."""
    return [w if w.startswith("[") else w[2:] if w.startswith("##") else f"▁{w}" for w in words]


def wordpiece(words: list[str] = WORDS, **more: Any) -> Gguf:
    keys = {"model": "bert", "tokens": marked(words), "token_type": [3] * 4 + [1] * (len(words) - 4)}
    keys |= {"bos_token_id": 2, "seperator_token_id": 3, "unknown_token_id": 1, "padding_token_id": 0}
    return described(**{k: v for k, v in {**keys, **more}.items() if v is not None})


@pytest.mark.parametrize("lower", [True, False, None])
@pytest.mark.parametrize("names", [{}, {"bos_token_id": None, "unknown_token_id": None, "seperator_token_id": None}])
def test_wordpiece_is_berts(lower: bool | None, names: dict[str, Any]) -> None:
    from tokenizers.implementations import BertWordPieceTokenizer

    want = BertWordPieceTokenizer({w: i for i, w in enumerate(WORDS)}, lowercase=lower is not False)
    more = {} if lower is None else {"normalizer.lowercase": lower}
    found = Tokenizer.from_str(tokenizer_json(wordpiece(**names, **more)))
    for text in ("the foxes", "The Fox jumped-jumps", "un9 unthe café CAFÉ", "日the日 [SEP] the", "", " \t\n", "a\u0300 ▁the"):
        a, b = want.encode(text), found.encode(text)
        assert (a.tokens, a.type_ids) == (b.tokens, b.type_ids), text
        a, b = want.encode(text, "the fox"), found.encode(text, "the fox")
        assert (a.tokens, a.type_ids) == (b.tokens, b.type_ids), text


def test_an_end_where_no_separator_is_wanted() -> None:
    """Newer converters write it so."""
    found = Tokenizer.from_str(tokenizer_json(wordpiece(add_sep_token=False, add_eos_token=True, eos_token_id=3)))
    assert found.encode("the fox").tokens == ["[CLS]", "the", "fox", "[SEP]"]


def test_wordpiece_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="unknown_token_id is missing"):
        tokenizer_json(wordpiece(["[PAD]", "[OOV]", *WORDS[2:]], unknown_token_id=None))
    g = wordpiece()
    g.metadata["tokenizer.ggml.token_type"][7] = 3  # "s", as it is, and "▁s", without its mark
    g.metadata["tokenizer.ggml.tokens"] += ["▁s"]
    g.metadata["tokenizer.ggml.token_type"] = np.append(g.metadata["tokenizer.ggml.token_type"], 1)
    with pytest.raises(CheckpointError, match=r"two entries .* mean the part of a word 's'"):
        tokenizer_json(g)
