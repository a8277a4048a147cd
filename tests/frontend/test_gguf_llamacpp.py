"""GGUF files against llama.cpp: log-probabilities of small models, and tokens of texts (tests/golden/gguf_llamacpp.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf_files as files
from tokenizers import Tokenizer
from wasat.frontend.gguf import from_gguf
from wasat.frontend.gguf.tokenizer import tokenizer_json
from wasat.frontend.weights.gguf import read_gguf
from wasat.ir import evaluate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gguf_llamacpp.json").read_text(encoding="utf-8"))
BOUND = 0.03
"""llama.cpp keeps scores of attention in f16."""


@pytest.mark.parametrize("name", GOLDEN["logprobs"])
def test_log_probabilities(name: str, tmp_path: Path) -> None:
    case: dict[str, Any] = files.LLAMACPP[name]
    files.write(tmp_path / "m.gguf", case["arch"], keys=case["keys"], tensors=files.strong(case))
    program = from_gguf(tmp_path / "m.gguf")
    g = program["forward"]
    x = np.asarray(evaluate(g, {"tokens": np.array([files.PROMPT])}, {n: program.load(n) for n in g.params})[0])[0]
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    logprobs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    found = GOLDEN["logprobs"][name]
    assert len(found) >= 2
    for n, wanted in found.items():
        for token, logprob in wanted.items():
            assert abs(logprobs[int(n) - 1, int(token)] - logprob) < BOUND, (n, token)


def test_cases_differ_by_more_than_the_bound() -> None:
    """What a case is about shows in its numbers."""
    probs, alike = GOLDEN["logprobs"], []
    for name, other in (("llama", "llama, another base"), ("llama", "llama, linear"), ("llama", "llama, yarn"),
                        ("llama", "llama, frequencies"), ("llama", "llama, biases"), ("qwen2", "qwen2, yarn"),
                        ("gemma3", "gemma3, local base"), ("gemma3", "gemma3, softcap")):  # fmt: skip
        both = [(probs[name][n], probs[other][n]) for n in probs[name].keys() & probs[other].keys()]
        gap = max(abs(a[t] - b.get(t, -99.0)) for a, b in both for t in a)
        alike += [other] if gap < 2 * BOUND else []
    assert not alike


@pytest.mark.parametrize("name", [n for n in GOLDEN["tokens"] if not n.endswith(".gguf")])  # tests/real has the others
def test_tokens(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if name.startswith("spm"):
        options = {"add_space_prefix": False} if "without" in name else {}
        files.write(path, "llama", tokenizer="llama", tokens=options, tensors={})
    else:
        files.write(path, "llama", tokens=files.merged(name, GOLDEN["merges"]), tensors={})
    t = Tokenizer.from_str(tokenizer_json(read_gguf(path)))
    differ = [text for text, ids in GOLDEN["tokens"][name] if t.encode(text, add_special_tokens=False).ids != ids]
    assert not differ
