"""Embeddings and scores, compiled: equal to the references', whatever the batch; the command line; what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from wasat.runtime import InputError, Model, load
from wasat.runtime.embedding import Texts

import wasat as ws

GOLDEN = Path(__file__).parents[1] / "golden" / "sentence"
WORDS = [f"w{i}" for i in range(80)]
RNG = np.random.default_rng(3)


def text(n: int) -> str:
    return " ".join(RNG.choice(WORDS, n))


TEXTS = [text(n) for n in (3, 30, 1, 12, 12, 80, 0, 25, 7, 3, 2)]


def tokenizer() -> Tokenizer:
    """BERT's form: [CLS] a [SEP] b [SEP]."""
    vocabulary = {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "[UNK]": 4, "q:": 5, **{w: i + 6 for i, w in enumerate(WORDS)}}
    t = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    t.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    t.enable_padding(length=50)  # as files often say, and which is not for us
    return t


def compiled(name: str, folder: Path, files: dict[str, Any] | None = None) -> Model:
    source = Path(shutil.copytree(GOLDEN / name, folder / name))
    tokenizer().save(str(source / "tokenizer.json"))
    for file, content in (files or {}).items():
        (source / file).write_text(json.dumps(content))
    ws.compile(ws.from_pretrained(source), folder / "m.wasat")
    return load(folder / "m.wasat")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    prompts = {"prompts": {"query": "q: ", "none": ""}, "default_prompt_name": None}
    return compiled("bert_skip", tmp_path_factory.mktemp("embed"), {"config_sentence_transformers.json": prompts})


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return compiled("bert_score", tmp_path_factory.mktemp("score"))


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("embeddinggemma", "qwen3_last", "xlmr_score", "modernbert_cls")]


@pytest.mark.parametrize("name", ["mpnet_mean", *SLOW])
def test_equal_to_the_reference(name: str) -> None:
    program = ws.from_pretrained(GOLDEN / name)
    golden = dict(np.load(GOLDEN / name / "golden.npz"))
    wanted = golden.pop("wanted")
    optimized, _ = ws.optimize(program)
    (got,) = ws.Executable(optimized)(program.interface.embedder.entry, **golden).values()  # type: ignore[union-attr]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def expected(model: Model, prompt: str, *texts: str) -> np.ndarray:
    """One text, by the interpreter, from tokens that are cut by hand."""
    folder = model.folder.parent / ("bert_score" if len(texts) == 2 else "bert_skip")
    program = ws.from_pretrained(folder)
    ids = [[tokenizer().token_to_id(w) for w in (prompt + t).split()] for t in texts]
    limit = 48 - 3 if len(texts) == 2 else 32 - 2
    while sum(map(len, ids)) > limit:
        max(reversed(ids), key=len).pop()
    if len(texts) == 2:
        tokens, types = [2, *ids[0], 3, *ids[1], 3], [0] * (len(ids[0]) + 2) + [1] * (len(ids[1]) + 1)
        given: dict[str, Any] = {"types": np.array([types])}
    else:
        tokens, given = [2, *ids[0], 3], {"skip": np.array([1 + len(prompt.split())]) if prompt else np.array([0])}
    return ws.run(program, program.interface.embedder.entry, tokens=np.array([tokens]),  # type: ignore[union-attr]
                  lengths=np.array([len(tokens)]), **given).popitem()[1][0]  # fmt: skip


@pytest.mark.parametrize("prompt, before", [(None, ""), ("query", "q: "), ("none", ""), ("q: w3 ", "q: w3 ")])
def test_embeddings_of_texts(embedder: Model, prompt: str | None, before: str) -> None:
    texts = [t for t in TEXTS if t]
    got = embedder.embed(texts, prompt=prompt)
    assert got.shape == (len(texts), 4 * 32)
    for row, t in zip(got, texts):
        np.testing.assert_allclose(row, expected(embedder, before, t), rtol=1e-4, atol=1e-5)


def test_a_text_does_not_depend_on_its_batch(embedder: Model) -> None:
    want = embedder.embed(TEXTS)
    np.testing.assert_allclose([embedder.embed(t) for t in TEXTS], want, rtol=1e-4, atol=1e-5)
    order = RNG.permutation(len(TEXTS))
    for batch in (1, 2, 5):
        got = embedder.embed([TEXTS[i] for i in order], batch=batch)
        np.testing.assert_allclose(got, want[order], rtol=1e-4, atol=1e-5)
    assert embedder.embed([]).shape == (0, 128)


def test_scores_of_pairs(reranker: Model) -> None:
    pairs = [(TEXTS[0], t) for t in TEXTS] + [(TEXTS[5], TEXTS[1])]
    got = reranker.score(pairs)
    assert got.shape == (len(pairs),)
    for score, pair in zip(got, pairs):
        np.testing.assert_allclose(score, expected(reranker, "", *pair), rtol=1e-4)
    np.testing.assert_allclose(reranker.score(pairs[::-1], batch=1), got[::-1], rtol=1e-4)
    np.testing.assert_allclose(reranker.rerank(TEXTS[0], TEXTS), got[:-1], rtol=1e-4)


@pytest.mark.parametrize("call, said", [
    (lambda e, r: e.score([("a", "b")]), "the model embeds texts: embed"),
    (lambda e, r: r.embed(["a"]), "the model scores pairs of texts: score"),
    (lambda e, r: e.rerank("a", ["b"]), "the model embeds texts: embed"),
    (lambda e, r: r.rerank("a", ["b"], instruct="c"), "instruct is for language models"),
    (lambda e, r: e.embed(3), "texts must be a list"),
    (lambda e, r: e.embed([3]), "a text must be text, not int"),
    (lambda e, r: e.embed(["\ud800"]), "half a character"),
    (lambda e, r: e.embed(["a"], prompt=3), "prompt must be text"),
    (lambda e, r: e.embed(["a"], batch=0), "batch is 0"),
    (lambda e, r: r.score(["ab"]), "pair 0 must be a list"),
    (lambda e, r: r.score([("a", "b", "c")]), "pair 0 has 3 texts: a pair is"),
    (lambda e, r: r.score("ab"), "pairs must be a list"),
    (lambda e, r: r.score([("a", 1)]), "pair 0 must be text, not int"),
])  # fmt: skip
def test_what_cannot_be(embedder: Model, reranker: Model, call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(embedder, reranker)


def test_a_text_of_which_the_tokenizer_makes_nothing(embedder: Model) -> None:
    bare = Texts(embedder)
    bare.library.post_processor = processors.TemplateProcessing("$A", None, [])
    with pytest.raises(InputError, match="text 1 has no tokens: ''"):
        bare.embed(["w1", ""], None, 32)


def test_command_line(run: Run, embedder: Model, reranker: Model, tmp_path: Path) -> None:
    lines, objects = tmp_path / "t.txt", tmp_path / "t.jsonl"
    last = "w3\u2028w4"  # no end of a line
    lines.write_text(f"w1 w2\n{last}\n", encoding="utf-8")
    objects.write_text(f'"w1 w2"\n{{"text": "{last}"}}\n', encoding="utf-8")
    want = embedder.embed(["w5", "w1 w2", last], prompt="query")
    code, out, err = run("embed", embedder.folder, "w5", "--file", lines, "--prompt", "query", "-o", tmp_path / "e.npy")
    assert code == 0, err
    assert "3 texts, 3×128" in out
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), want)
    code, out, err = run("embed", embedder.folder, "-", "--file", objects, "--prompt", "query", stdin="w5\n")
    assert code == 0, err
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [x["text"] for x in found] == ["w5", "w1 w2", last]
    np.testing.assert_allclose([x["embedding"] for x in found], want, rtol=1e-6)
    code, out, err = run("embed", reranker.folder, "w5", "--file", lines, "-o", tmp_path / "s.jsonl")
    assert code == 0, err
    scores = [json.loads(line)["score"] for line in (tmp_path / "s.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    np.testing.assert_allclose(scores, reranker.score([("w5", "w1 w2"), ("w5", last)]), rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.npy", "s.jsonl", "t.jsonl", "t.txt"]


@pytest.mark.parametrize("which, arguments, said", [
    ("embedder", [], "give texts, or --file"),
    ("reranker", ["w1"], "give texts, or --file: a query, and documents"),
    ("reranker", ["w1", "w2", "--prompt", "query"], "a reranker has none"),
    ("embedder", ["w1", "-o", "x.csv"], "--output x.csv: write .npy or .jsonl"),
    ("embedder", ["--file", "none.txt"], "none.txt"),
])  # fmt: skip
def test_command_line_refuses(request: pytest.FixtureRequest, run: Run, which: str, arguments: list[str], said: str) -> None:
    code, _, err = run("embed", request.getfixturevalue(which).folder, *arguments)
    assert code == 1
    assert said in err
