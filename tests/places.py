"""One new thing of each kind, as a developer adds it to the house: what is written where (test_places.py).

Run as a program in a house that has them all, it tries each and prints, as JSON, what went wrong, by kind.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

Edit = str | Callable[[str], str]
"""What is written behind a file's end, or what becomes of its text."""


def _within(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """A text with what is found (an expression) replaced, each once."""

    def edit(text: str) -> str:
        for found, new in pairs:
            text, count = re.subn(found, lambda m, new=new: m.expand(new), text, count=1, flags=re.MULTILINE)
            assert count == 1, f"no {found} where something new is added"
        return text

    return edit


ADDED: dict[str, dict[str, Edit]] = {
    "an operation": {
        "ir/ops/unary.py": '''

@register
class HardSwish(Op):
    """x * min(max(x + 3, 0), 6) / 6 (arXiv:1905.02244), elementwise."""

    name = "hard_swish"
    kind = "elementwise"

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return floating(x)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        return np.asarray(w * np.clip(w + 3, 0, 6) / 6).astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        return b.mul(x, b.div(b.minimum(b.maximum(b.add(x, 3.0), 0.0), 6.0), 6.0))

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(3, 4, low=-4.1, high=4.0)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {}, "must be float")
''',
        "frontend/nn/functions.py": _within(
            (r'^    "Mask",', r'\g<0> "hard_swish",'),
            (r"^relu = ", r'hard_swish = _unary("hard_swish", "x * min(max(x + 3, 0), 6) / 6.")\n\g<0>'),
        ),
        "backends/tvm/cpu/kernels/hard_swish.py": '''"""hard_swish over rows."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from .emit import Expr, Kernel, load, symbol


@dataclass(frozen=True)
class HardSwish:
    """``threads`` share the elements."""

    threads: int = 1

    @property
    def name(self) -> str:
        return "hard_swish"


def hard_swish(desc: HardSwish) -> tirx.PrimFunc:
    """PrimFunc(x f32[m, n], y f32[m, n])."""
    kernel = Kernel(desc.name)
    shape = symbol("m"), symbol("n")
    x, y = (kernel.param(name, shape, "float32") for name in "xy")
    source, target = kernel.flat(x), kernel.flat(y)

    def element(at: Expr) -> None:
        v = kernel.let(load(source, at))
        kernel.store(target, at, v * tirx.min(tirx.max(v + 3.0, 0.0), 6.0) / 6.0)

    kernel.rows(desc.threads, shape[0] * shape[1], 4, element)
    return kernel.build()
''',
        "backends/tvm/cpu/select.py": _within(
            (r"^from \.kernels\.isa ", r"from .kernels.hard_swish import HardSwish, hard_swish\n\g<0>"),
            (r'^            "rms_norm": ', r'            "hard_swish": self._hard_swish,\n\g<0>'),
            (r"^    def _layer_norm", r'''    def _hard_swish(self, node: Node) -> None:
        (x,) = node.inputs
        need_f32(x)
        rows = self.rows(x)
        made = self.call(node, HardSwish(self.threads), hard_swish, [x], [Result(x.tensor, rows)], {0: rows})
        self.graph.replace_uses(node.output, made[0])

\g<0>'''),
        ),
    },
    "a pass": {
        "passes/cleanup/small_dropout.py": '''"""Dropout that drops almost nothing."""

from __future__ import annotations

from dataclasses import dataclass

from wasat.ir import Graph

from ..core import GraphPass, Remarks
from ..pattern import replace


@dataclass(frozen=True)
class DropSmallDropout(GraphPass):
    """dropout(x, key) of a rate up to ``rate`` -> x."""

    rate: float = 0.01
    name = "drop-small-dropout"
    exact = False

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        changed = False
        for node in graph.nodes:
            if node.is_a("dropout") and node.attrs.rate <= self.rate:
                replace(graph, node.output, node.inputs[0])
                changed = True
        return changed
''',
        "passes/default.py": _within(
            (r"^from \.core ", r"from .cleanup.small_dropout import DropSmallDropout\n\g<0>"),
            (r'^    "Cleanup", ', r'\g<0>"DropSmallDropout", '),
            (r"^        FoldDequantized\(\), ", r"\g<0>DropSmallDropout(), "),
        ),
    },
    "a target": {
        "backends/tvm/targets.py": '''

def plain(mcpu: str = "x86-64") -> Target:
    """Any x86-64 processor, without kernels of ours."""
    return Target("plain", {"kind": "llvm", "mcpu": mcpu})


TARGETS["plain"] = plain
''',
    },
    "a model family": {
        "frontend/models/bigram.py": '''"""A table, and a head."""

from __future__ import annotations

from wasat.frontend import nn

from .config import Fields


class Bigram(nn.Module):
    """tokens i64[b, s] -> logits f32[b, s, vocab]."""

    def __init__(self, vocab: int, dim: int) -> None:
        self.table, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.head(self.table(tokens))


def bigram(fields: Fields) -> Bigram:
    """``model_type: bigram``."""
    model = Bigram(fields.size("vocab_size"), fields.size("hidden_size"))
    fields.size("max_position_embeddings")
    fields.finish("bigram")
    return model
''',
        "frontend/models/__init__.py": _within(
            (r"^from \.config ", r"from .bigram import bigram\n\g<0>"),
            (r'^    "gemma2": ', r'    "bigram": ("BigramForCausalLM", bigram),\n\g<0>'),
        ),
    },
    "a kind of media": {
        "runtime/media/points.py": '''"""Clouds of points."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .base import Media

if TYPE_CHECKING:
    from ..interface import Encoder


@dataclass(frozen=True, eq=False, repr=False)
class Points(Media):
    """A cloud of points: lines of three numbers behind the line ``ply``."""

    inputs = ("points",)

    def arrays(self, encoder: Encoder) -> tuple[np.ndarray, ...]:
        with self._file() as file:
            return (np.array([line.split() for line in file.read().splitlines()[1:]], np.float32),)

    @classmethod
    def of_head(cls, path: Path, head: bytes) -> Media | None:
        return cls(path) if head.startswith(b"ply") else None
''',
        "runtime/media/__init__.py": _within((r"^from \.video ", r"from .points import Points\n\g<0>"),
                                             (r'"Media", ', r'\g<0>"Points", ')),
    },
    "an ONNX operator": {
        "frontend/onnx/converters/math.py": '''

@op("Thrice", domain="test.places", attributes="bias")
def thrice(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.add(c.mul(x, 3.0), n.attrs["bias"])
''',
    },
    "a command": {
        "wasat/cli/app.py": _within((r'^app\.command\("export"\)', r'''@app.command("thrice")
def thrice(number: int) -> None:
    """Three times as much."""
    out.print(3 * number)


\g<0>''')),
    },
}  # fmt: skip
"""Kind (a row of the table in CONTRIBUTING.md) -> the files that are touched for one more of it."""


def _operation() -> None:
    import numpy as np
    from wasat.backends.tvm.targets import cpu
    from wasat.ir import evaluate

    import wasat as ws
    from wasat import nn

    class Net(nn.Module):
        def __call__(self, x: nn.Tensor) -> dict[str, nn.Tensor]:
            return {"y": vars(nn)["hard_swish"](x)}

    program = ws.trace(Net(), {"x": "f32[n, 4]"})
    x = np.linspace(-4, 4, 12, dtype=np.float32).reshape(3, 4)
    want = np.where(x < -3, 0, np.where(x > 3, x, x * (x + 3) / 6))
    (by_reference,) = evaluate(program["forward"], {"x": x})
    by_kernel = ws.run(program, backend="cpu", x=x)["y"]
    assert np.abs(by_reference - want).max() < 1e-6
    assert np.abs(by_kernel - want).max() < 1e-6
    selected = program["forward"].clone()
    target = cpu()
    target.kernels(target, program)(selected)
    assert [type(n.op).__name__ for n in selected.nodes] == ["KernelCall"]


def _pass() -> None:
    import wasat as ws

    text = """graph @forward(%x: f32[n], %key: u32[2]) {
  %d: f32[n] = dropout(%x, %key) {rate=0.005}
  %y: f32[n] = neg(%d)
  return %y
}"""
    for passes in ("default", "drop-small-dropout{rate=0.02}"):
        made, report = ws.optimize(ws.Program({"forward": ws.parse(text)}), passes=passes)
        assert "drop-small-dropout" in [s.name for s in report.steps]
        assert [n.op.name for n in made["forward"].nodes] == ["neg"]


def _target() -> None:
    import numpy as np

    import wasat as ws
    from wasat.machines import machine

    graph = ws.parse("graph @forward(%x: f32[n]) {\n  %y: f32[n] = neg(%x)\n  return %y\n}")
    got = ws.run(ws.Program({"forward": graph}), backend="plain", x=np.ones(3, np.float32))
    assert got["y"].tolist() == [-1, -1, -1]
    assert machine("plain").about == "Any x86-64 processor, without kernels of ours"


def _family() -> None:
    import numpy as np
    from safetensors.numpy import save_file

    import wasat as ws

    rng = np.random.default_rng(1)
    table, head = (rng.standard_normal((7, 4)).astype(np.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = {"vocab_size": 7, "hidden_size": 4, "max_position_embeddings": 32}
        (folder / "config.json").write_text(json.dumps({"model_type": "bigram", **sizes}))
        save_file({"table.weight": table, "head.weight": head}, folder / "model.safetensors")
        got = ws.run(ws.from_pretrained(folder), tokens=[[1, 2, 3]])["logits"]
    assert np.allclose(got[0], table[[1, 2, 3]] @ head.T, atol=1e-5)


def _media() -> None:
    from wasat.runtime.interface import Encoder
    from wasat.runtime.media import KINDS, open_media

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "a.ply"
        file.write_text("ply\n1 2 3\n4 5 6\n")
        found = open_media(file)
        encoder = Encoder("points", "see", size=None, rate=None, samples=None, frames=None)
        assert (type(found), found.kind) == (KINDS["points"], "points")
        assert found.arrays(encoder)[0].tolist() == [[1, 2, 3], [4, 5, 6]]


def _converter() -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    import wasat as ws

    node = helper.make_node("Thrice", ["x"], ["y"], domain="test.places", bias=2.0)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("test.places", 1)]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "m.onnx"
        onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=10), str(file))
        got = ws.run(ws.from_onnx(file), x=np.arange(3, dtype=np.float32))
    assert got["y"].tolist() == [2, 5, 8]


def _command() -> None:
    from typer.testing import CliRunner

    from wasat.cli.app import app

    assert "Three times as much." in CliRunner().invoke(app, ["--help"]).output
    assert CliRunner().invoke(app, ["thrice", "14"]).output.strip() == "42"


CHECKS = dict(zip(ADDED, (_operation, _pass, _target, _family, _media, _converter, _command)))

if __name__ == "__main__":
    wrong = {}
    for kind, check in CHECKS.items():
        try:
            check()
        except Exception:
            wrong[kind] = traceback.format_exc()
    json.dump(wrong, sys.stdout)
