"""Quantized checkpoints, compiled: sessions and generation are what the interpreter computes from the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from wasat.ir import evaluate

import wasat as ws

sys.path.append(str(Path(__file__).parent.parent / "frontend"))
from test_quantized_folders import FORMATS, GPTQ, in_order, quantized


@pytest.mark.parametrize(("name", "activation"), [("act_order", "int8"), ("awq", None), ("w8a8", "int8")])
def test_compiled_it_computes_what_the_interpreter_does(tmp_path: Path, name: str, activation: str | None) -> None:
    """Merged, with a cache, by kernels that read the weights as they are, in chunks, one token and several rows at a time."""
    config, pack = FORMATS.get(name, ({**GPTQ, "desc_act": True}, in_order(True)))
    program = ws.from_pretrained(quantized(tmp_path, config, pack)[0])
    report = ws.compile(program, tmp_path / "out", activation=activation, chunk=4, threads=1)
    assert "is dequantized as it is read" not in report.explain()
    whole, _ = ws.optimize(program, activation=activation, kv_cache=False)
    params = {k: whole.load(k) for k in whole["forward"].params}

    def logits(ids: list[int]) -> np.ndarray:
        x: np.ndarray = evaluate(whole["forward"], {"tokens": np.array([ids])}, params)[0][0, -1]
        return x

    model = ws.load(tmp_path / "out")
    ids = np.random.default_rng(1).integers(0, 48, (2, 9))
    session = model.session(2, context=16)
    for start, stop in ((0, 7), (7, 8), (8, 9)):
        got = session.step(ids[:, start:stop], np.full(2, stop - start))
        for r in range(2):
            np.testing.assert_allclose(got[r], logits(ids[r, :stop].tolist()), rtol=2e-4, atol=2e-4)
    [made] = model.generate([ids[0].tolist()], max_tokens=4)
    told = ids[0].tolist()
    for token in made.tokens:
        assert token == logits(told).argmax()
        told.append(token)
