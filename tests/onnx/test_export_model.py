"""A whole model exported: its numbers, names and sizes come back; no folder of the exporting machine goes along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from rounding import assert_near, bound, spread
from wasat.backends.onnx import to_onnx
from wasat.frontend import from_pretrained, nn
from wasat.frontend.onnx import from_onnx
from wasat.ir import Program, evaluate

import wasat as ws

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


class Recurrent(nn.Module):
    def __init__(self) -> None:
        self.rnn = nn.LSTM(64, 32)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("scheme, activation", [("int8", None), ("int4-plain", "int8"), ("s6", None), ("f16", None)])
def test_quantized_weights_that_a_loop_reads(scheme: str, activation: str | None, tmp_path: Path) -> None:
    """They are stored as they are, outside of the loop."""
    program, _ = ws.optimize(
        nn.trace(Recurrent(), {"x": "f32[b, s, 64]"}, outputs=["y"]), quantize=scheme, activation=activation
    )
    [loop] = [n for n in program["forward"].nodes if n.attrs.bodies]
    assert sum(len(v.shape) == 2 and str(v.type).startswith(scheme.partition("-")[0]) for v in loop.inputs) == 1
    path = to_onnx(program, tmp_path / "m.onnx")
    assert path.stat().st_size < 4 * 128 * 96 * (0.7 if scheme == "f16" else 0.5)
    x = np.random.default_rng(0).standard_normal((2, 3, 64), np.float32)
    want = ws.run(program, x=x)["y"]
    far = spread(program["forward"], {"x": x}, {k: program.load(k) for k in program["forward"].params})
    assert_near(ws.run(from_onnx(path), x=x)["y"], want, bound(want, far[0]))
