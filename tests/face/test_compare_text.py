"""Comparing sides of a model over a text: divergence, tokens, artifacts, files of logits, llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from wasat.ir import ArrayParam, Program, WasatError

import wasat as ws
from wasat.comparison import Side, compare
from wasat.testing import random_program


@pytest.fixture
def model() -> Program:
    words = {w: i for i, w in enumerate(["a", "model", "says", "what", "comes", "next"])}
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    program = random_program("""
graph @forward(%tokens: i64[b, s]) {
  param %embed.weight: f32[6, 8]
  param %head.weight: f32[6, 8]
  %e: f32[b, s, 8] = embedding(%embed.weight, %tokens)
  %logits: f32[b, s, 6] = linear(%e, %head.weight)
  return %logits
}
""")
    program.origin = dataclasses.replace(program.origin, texts={"tokenizer.json": t.to_str()})
    return program


TEXT = "what says a model next what comes a model says"


def test_over_a_text(model, tmp_path):
    ids = np.array([3, 2, 0, 1, 5, 3, 4, 0, 1, 2])
    logits = model.load("embed.weight")[ids] @ model.load("head.weight").T
    np.save(tmp_path / "same.npy", logits)
    np.save(tmp_path / "other.npy", logits * 1.5)
    same = compare(model, tmp_path / "same.npy", text=TEXT, window=4)
    assert same.ok
    assert same.text is not None
    assert (same.text.tokens, same.text.same_top) == (10, 1.0)
    assert abs(same.text.kl) < 1e-6
    other = compare(model, tmp_path / "other.npy", text=TEXT, window=4, max_kl=0.01)
    assert other.text is not None
    assert other.text.kl > 0.01
    assert other.text.same_top == 1.0
    assert not other.ok
    assert compare(model, tmp_path / "other.npy", text=TEXT, window=4, max_kl=2 * other.text.kl).ok


def test_logits_of_another_text(model, tmp_path):
    np.save(tmp_path / "short.npy", np.zeros((9, 6), np.float32))
    with pytest.raises(WasatError, match=r"holds float32\[9, 6\]; of this text it must be logits, floats \[10, vocabulary\]"):
        compare(model, tmp_path / "short.npy", text=TEXT)
    np.save(tmp_path / "narrow.npy", np.zeros((10, 5), np.float32))
    with pytest.raises(WasatError, match=r"window 1: the sides give log-probabilities \[10, 6\] and \[10, 5\]"):
        compare(model, tmp_path / "narrow.npy", text=TEXT)
    with pytest.raises(WasatError, match="only what it says of a text can be compared: give a text"):
        compare(model, tmp_path / "narrow.npy")


def test_nan_on_the_first_side_is_no_small_divergence(model, tmp_path):
    logits = np.zeros((10, 6), np.float32)
    np.save(tmp_path / "fine.npy", logits)
    logits[4] = np.nan
    np.save(tmp_path / "nan.npy", logits)
    for a, b in ((model, "nan.npy"), (tmp_path / "nan.npy", None)):
        found = compare(a, model if b is None else tmp_path / b, text=TEXT, max_kl=1e3)
        assert found.text is not None
        assert np.isnan(found.text.kl)
        assert not found.ok


def test_one_number_is_one_token_on_both_sides(model):
    other, again = model.copy(), model.copy()
    written = json.loads(model.origin.texts["tokenizer.json"])
    words = written["model"]["vocab"]
    words["says"], words["next"] = words["next"], words["says"]
    other.origin = dataclasses.replace(other.origin, texts={"tokenizer.json": json.dumps(written)})
    with pytest.raises(WasatError, match="have different tokens: 2 is 'says' in one, 'next' in the other"):
        compare(model, other, text=TEXT)
    assert compare(model, again, text=TEXT).ok


def test_an_artifact_is_read_token_by_token(model, tmp_path):
    deep = random_program("""
graph @forward(%tokens: i64[b, s]) {
  param %embed.weight: f32[6, 8]
  %e: f32[b, s, 8] = embedding(%embed.weight, %tokens)
  %c: f32[b, s, 8] = cumsum(%e) {axis=1}
  %t: f32[b, s, 8] = tanh(%c)
  %logits: f32[b, s, 6] = linear(%t, %embed.weight)
  return %logits
}
""")
    deep.origin = model.origin
    ws.compile(deep, tmp_path / "m.wasat", kv_cache=True)
    found = compare(deep, tmp_path / "m.wasat", text=TEXT, window=4, max_kl=1e-9)
    assert found.ok, str(found)
    assert found.text is not None
    assert (found.text.tokens, found.text.same_top) == (10, 1.0)
    deep.params["embed.weight"] = ArrayParam(deep.load("embed.weight") * np.float32(1.1), deep.params["embed.weight"].type)
    assert not compare(deep, tmp_path / "m.wasat", text=TEXT, window=4, max_kl=1e-9).ok


def test_llama_cpp_is_asked_for_every_position(model, tmp_path, monkeypatch):
    """Of its package only what is called: windows one by one, from an empty context."""
    embed, head = model.load("embed.weight"), model.load("head.weight")

    class Llama:
        def __init__(self, path, n_ctx, n_batch, logits_all, verbose):
            assert (path, n_ctx, n_batch, logits_all) == (str(tmp_path / "m.gguf"), 4, 4, True)
            self.scores, self.n_tokens = np.zeros((n_ctx, 6), np.float32), 0

        def reset(self):
            self.n_tokens = 0

        def eval(self, tokens):
            self.scores[self.n_tokens : self.n_tokens + len(tokens)] = embed[tokens] @ head.T
            self.n_tokens += len(tokens)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    peer = Side("theirs", path=tmp_path / "m.gguf", peer="llama.cpp")
    found = compare(model, peer, text=TEXT, window=4)
    assert found.text is not None
    assert found.text.tokens == 10
    assert abs(found.text.kl) < 1e-6
