"""MiniLM's real weights, from the command line: the embeddings of sentence-transformers. ``make real`` runs this."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from wasat.runtime import load

sys.path.insert(0, str(Path(__file__).parent))
import fetch

pytestmark = pytest.mark.real
GOLDEN = Path(__file__).parents[1] / "golden" / "sentence" / "minilm.npz"


def wasat(*args: object) -> None:
    done = subprocess.run([Path(sys.executable).parent / "wasat", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_embeddings_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    with zipfile.ZipFile(fetch.fetch("minilm.zip")) as z:
        z.extractall(tmp_path / "minilm")
    golden = np.load(GOLDEN)
    texts = golden["texts"].tolist()
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    wasat("compile", tmp_path / "minilm", "-o", tmp_path / "m.wasat")
    wasat("embed", tmp_path / "m.wasat", "--file", tmp_path / "t.jsonl", "-o", tmp_path / "e.npy")
    got = np.load(tmp_path / "e.npy")
    np.testing.assert_allclose(got, golden["wanted"], atol=1e-5)
    model = load(tmp_path / "m.wasat")
    for row, text in zip(got, texts):
        np.testing.assert_allclose(model.embed(text), row, atol=1e-5)
    wasat("compile", tmp_path / "minilm", "-o", tmp_path / "q.wasat", "--quantize", "int8")
    small = load(tmp_path / "q.wasat").embed(texts)
    assert (small * golden["wanted"]).sum(-1).min() > 0.99
    ranks = np.argsort(-(golden["wanted"] @ golden["wanted"].T), axis=1)[:, :2]
    assert (np.argsort(-(small @ small.T), axis=1)[:, :2] == ranks).all()
