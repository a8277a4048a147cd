"""Rerankers that are language models: the probability of yes, of prompts put together by hand; what cannot be."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from conftest import Run
from tokenizers import Tokenizer, models, pre_tokenizers
from wasat.ir import Program
from wasat.runtime import InputError, Model, load
from wasat.runtime.rerank import QWEN3, Form

import wasat as ws
from wasat.testing import random_program

WORDS = [*QWEN3.marks, "yes", "no", "?", *[f"w{i}" for i in range(20)], "Given", "<Document>:", "<Query>:", "<Instruct>:"]
DOCUMENTS = ["w1 w2 w3", "w4", "", "w5 " * 30, "w3 w3 w1 w2"]

TEXT = """
graph @forward(%tokens: i64[b, s]) {
  param %embed.weight: f32[32, 16]
  %x: f32[b, s, 16] = embedding(%embed.weight, %tokens)
  %c: f32[b, s, 16] = cumsum(%x) {axis=1}
  %t: f32[b, s, 16] = tanh(%c)
  %logits: f32[b, s, 32] = linear(%t, %embed.weight)
  return %logits
}
"""


def tokenizer(words: list[str]) -> Tokenizer:
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, "?"))
    t.add_special_tokens([w for w in words if w in QWEN3.marks])
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t


@pytest.fixture(scope="module")
def program() -> Program:
    made = random_program(TEXT)
    made.origin = dataclasses.replace(made.origin, texts={"tokenizer.json": tokenizer(WORDS).to_str()})
    made.declare(context=80)
    return made


@pytest.fixture(scope="module")
def reranker(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("rerank") / "m.wasat"
    ws.compile(program, folder, kv_cache=True)
    return load(folder)


def expected(program: Program, query: str, document: str, instruct: str = QWEN3.instruct) -> float:
    """By the interpreter, of the model card's prompt."""
    t = tokenizer(WORDS)
    parts = [QWEN3.before, f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}", QWEN3.after]
    before, body, after = ([i for i in t.encode(p, add_special_tokens=False).ids] for p in parts)
    tokens = np.array([[*before, *body[: 80 - len(before) - len(after)], *after]])
    last = np.asarray(ws.run(program, tokens=tokens)["logits"])[0, -1].astype(np.float64)
    e = np.exp(last[[t.token_to_id("no"), t.token_to_id("yes")]])
    return float(e[1] / e.sum())


def test_probability_of_yes(program: Program, reranker: Model) -> None:
    got = reranker.rerank("w7 w8", DOCUMENTS)
    want = [expected(program, "w7 w8", d) for d in DOCUMENTS]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert np.ptp(want) > 0.05, "documents differ"
    np.testing.assert_allclose(reranker.rerank("w7 w8", DOCUMENTS[::-1], batch=1), got[::-1], rtol=1e-4, atol=1e-6)


def test_instructions(program: Program, reranker: Model) -> None:
    [got] = reranker.rerank("w7", ["w1"], instruct="w9 w9")
    assert got == pytest.approx(expected(program, "w7", "w1", "w9 w9"), rel=1e-4)
    assert got != pytest.approx(expected(program, "w7", "w1"), rel=1e-2)
    assert reranker.rerank("w7", []).shape == (0,)


def test_another_form(program: Program, reranker: Model) -> None:
    form = Form("w0 ", "{query} w1 {document}", " w2", "", yes="w3", no="w4")
    [got] = reranker.rerank("w7", ["w8"], form=form)
    ids = tokenizer(WORDS).encode("w0 w7 w1 w8 w2").ids
    last = np.asarray(ws.run(program, tokens=np.array([ids]))["logits"])[0, -1]
    no, yes = (last[tokenizer(WORDS).token_to_id(w)] for w in ("w4", "w3"))
    assert got == pytest.approx(1 / (1 + np.exp(no - yes)), rel=1e-4)


def test_what_cannot_be(reranker: Model) -> None:
    with pytest.raises(InputError, match="documents must be a list"):
        reranker.rerank("w1", "w2")
    with pytest.raises(InputError, match="a document must be text, not int"):
        reranker.rerank("w1", [3])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"is no reranker of this form: its tokenizer has no token '<\|user\|>'"):
        reranker.rerank("w1", ["w2"], form=dataclasses.replace(QWEN3, before="<|user|>"))
    with pytest.raises(InputError, match="has no token 'maybe'"):
        reranker.rerank("w1", ["w2"], form=dataclasses.replace(QWEN3, no="maybe"))
    with pytest.raises(InputError, match="takes 20 tokens, and the form alone has"):
        reranker.rerank("w1", ["w2"], form=dataclasses.replace(QWEN3, limit=20))
    with pytest.raises(InputError, match="batch is 0"):
        reranker.rerank("w1", ["w2"], batch=0)


def test_command_line(run: Run, reranker: Model) -> None:
    code, out, err = run("embed", reranker.folder, "--rerank", "w7 w8", *DOCUMENTS[:2])
    assert (code, err) == (0, "")
    got = [json.loads(x)["score"] for x in out.splitlines()]
    np.testing.assert_allclose(got, reranker.rerank("w7 w8", DOCUMENTS[:2]), rtol=1e-5)
    code, out, err = run("embed", reranker.folder, "w7", "--instruct", "x")
    assert code == 1
    assert "--instruct goes with --rerank" in err
