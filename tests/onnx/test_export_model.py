"""A whole model exported: its numbers, names and sizes come back; no folder of the exporting machine goes along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from wasat.backends.onnx import to_onnx
from wasat.frontend import from_pretrained, nn
from wasat.frontend.onnx import from_onnx
from wasat.ir import Program, evaluate

MODEL = Path(__file__).parents[1] / "golden" / "hf"


def logits(program: Program, name: str, ids: np.ndarray) -> np.ndarray:
    g = program["forward"]
    return np.asarray(evaluate(g, {name: ids}, {k: p.load() for k, p in program.params.items()})[0])


@pytest.mark.parametrize("opset", [17, 24])
@pytest.mark.parametrize("external", [False, True])
def test_import_of_export(opset: int, external: bool, tmp_path: Path) -> None:
    """The same logits, symbolic sizes and parameter names, weights in the file or beside it."""
    folder = sorted(p for p in MODEL.iterdir() if p.is_dir())[0]
    program = from_pretrained(folder)
    path = to_onnx(program, tmp_path / "m.onnx", opset=opset, external_data=external)
    assert (tmp_path / "m.onnx.data").exists() == external
    back = from_onnx(path)
    assert set(program["forward"].params) <= set(back["forward"].params)
    assert [str(v.type) for v in back["forward"].inputs] == [str(v.type) for v in program["forward"].inputs]
    ids = np.arange(18, dtype=np.int64).reshape(2, 9)
    np.testing.assert_allclose(logits(back, "tokens", ids), logits(program, "tokens", ids), rtol=1e-4, atol=1e-5)


def test_no_folder_goes_along(tmp_path: Path) -> None:
    program = nn.trace(nn.Linear(2, 2), {"x": "f32[b, 2]"}, outputs=["y"])
    model = onnx.load(to_onnx(program, tmp_path / "m.onnx"))
    notes = [n.doc_string for n in model.graph.node if n.doc_string]
    assert notes
    assert all(str(Path(__file__).parent) not in n and Path(__file__).name in n for n in notes)
    assert str(Path(__file__).parent).encode() not in model.SerializeToString()
