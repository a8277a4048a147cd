"""What the export refuses, all at once and before any work; its memory; the command."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from wasat.backends.onnx import NEWEST, ExportError, to_onnx
from wasat.frontend.onnx import from_onnx
from wasat.ir import Program, evaluate, parse_program
from wasat.passes import FoldDequantized, PassManager

from wasat.cli import app as cli
from wasat.testing import random_program

LLAMA = Path(__file__).parents[1] / "golden" / "hf" / "llama"
SUM = "graph @sum(%x: f32[n]) {\n  param %w: f32[4]\n  %y: f32[n] = add(%x, 1.0:f32)\n  return %y\n}"


class Unread:
    """A parameter that nobody may load."""

    def __init__(self, type: Any) -> None:
        self.type = type

    def load(self) -> Any:
        raise AssertionError("a parameter was read")


def refuse(program: Program, path: Path, **options: Any) -> str:
    """The error; nothing is left in the folder."""
    with pytest.raises(ExportError) as e:
        to_onnx(program, path / "m.onnx", **options)
    assert list(path.iterdir()) == []
    return str(e.value)


def test_every_refusal_in_one_error(tmp_path: Path) -> None:
    """With counts and names, the most frequent first, and what reads a refused result is looked at too."""
    program = parse_program("""graph @many(%x: f32[4], %q: int8b32f16[2, 32], %a: i32[n]) {
      param %w: f32[4]
      %b0: i32[4] = bitcast(%x) {dtype=i32}
      %b1: i32[4] = bitcast(%w) {dtype=i32}
      %b2: i32[4] = bit_xor(%b0, %b1)
      %b3: f32[4] = bitcast(%b2) {dtype=f32}
      %b4: i32[4] = bitcast(%b3) {dtype=i32}
      %b5: i32[4] = bitcast(%b3) {dtype=i32}
      %big: i64[n*k] = iota() {size=n*k}
      %s: int8b32f16[4] = quantize(%b3) {scheme="int8"}
      return %b4, %b5, %s, %big, %q
    }""")
    program.params["w"] = Unread(program["many"].params["w"].type)
    assert refuse(program, tmp_path, opset=17) == """graph @many cannot be exported:
  bitcast: operator set 17 cannot express it: 5 (b0, b1, b3, b4, …)
  a quantized output (only parameters can be quantized): 2 (s, q_out)
  a quantized input (only parameters can be quantized): 1 (q)
  bit_xor: operator set 17 has no BitwiseXor: 1 (b2)
  iota: no shape of an input tells the size k: 1 (big)"""


@pytest.mark.parametrize("opset", [16, NEWEST + 1])
def test_operator_sets(opset: int, tmp_path: Path) -> None:
    assert refuse(random_program(SUM), tmp_path, opset=opset) == (
        f"operator set {opset} cannot be exported; 17 to {NEWEST} can"
    )


def test_which_graph(tmp_path: Path) -> None:
    two = parse_program(SUM + "\n" + SUM.replace("@sum", "@other"))
    assert refuse(two, tmp_path) == "there is no graph 'forward' to export; choose one of sum, other"
    assert refuse(two, tmp_path, graph="third").startswith("there is no graph 'third'")


def test_without_numbers(tmp_path: Path) -> None:
    text = SUM.replace("add(%x, 1.0:f32)", "concat(%x, %w) {axis=0}").replace("%y: f32[n]", "%y: f32[n + 4]")
    assert refuse(parse_program(text), tmp_path) == (
        "parameter w has no numbers: export the program that holds its parameters"
    )


def test_what_the_checker_refuses(tmp_path: Path) -> None:
    """ONNX has no convolution by a kernel without elements."""
    program = random_program("""graph @none(%x: f32[1, 2, 3], %w: f32[4, 2, 0]) {
      %y: f32[1, 4, 4] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,)}
      return %y
    }""")
    assert "onnx.checker refuses what graph @none becomes" in refuse(program, tmp_path)


def test_an_older_file_stays_when_the_export_fails(tmp_path: Path) -> None:
    path = to_onnx(random_program(SUM), tmp_path / "m.onnx")
    before = path.read_bytes()
    with pytest.raises(ExportError):
        to_onnx(random_program(SUM), path, opset=3)
    assert path.read_bytes() == before


# -- memory ------------------------------------------------------------------------------------------------------------------
STREAM = """
import sys
from dataclasses import dataclass
import numpy as np
from wasat.backends.onnx import to_onnx
from wasat.frontend.onnx import from_onnx
from wasat.ir import Builder, DType, Graph, Program, TensorType

@dataclass(frozen=True)
class Made:
    type: TensorType
    def load(self):
        return np.full(self.type.shape, 1 / 1024, np.float32)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

g, params = Graph("forward"), {}
b, t = Builder(g), TensorType(DType.F32, (1024, 1024))
x = g.add_input("x", TensorType(DType.F32, (1, 1024)))
for i in range(64):
    x, params[f"w{i}"] = b.linear(x, g.add_param(f"w{i}", t)), Made(t)
g.set_outputs([x], ["y"])
at_first = peak()
to_onnx(Program({"forward": g}, params), sys.argv[1], external_data=True)
written = peak()
from_onnx(sys.argv[1])
print(written - at_first, peak() - written)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_weights_are_streamed(tmp_path: Path) -> None:
    """256 MiB of parameters are written, checked and imported in less than a tenth of that."""
    command = [sys.executable, "-c", STREAM, str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.onnx.data").stat().st_size == 256 << 20
    written, imported = map(int, done.stdout.split())
    assert written < 25
    assert imported < 5


# -- the command -------------------------------------------------------------------------------------------------------------
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`wasat export` with these arguments: exit status, standard output, standard error."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wasat", "export", *map(str, argv)])
        with pytest.raises(SystemExit) as e:
            cli.main()
        got = capsys.readouterr()
        return int(e.value.code or 0), got.out, got.err

    return call


def test_command(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    code, out, err = run(LLAMA, "--onnx", path, "--opset", 18)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"{path}: \d+\.\d MB, operator set 18\n", out)
    assert onnx.load(path).opset_import[0].version == 18
    assert run(LLAMA, "--onnx", path, "--external-data")[0] == 0
    assert (tmp_path / "m.onnx.data").exists()


def test_command_quantized(run: Run, tmp_path: Path) -> None:
    """int4 with one table in int8; by DequantizeLinear, and by onnxruntime's operators."""
    kinds = []
    for more in ((), ("--matmul-nbits",)):
        path = tmp_path / "m.onnx"
        options = ("--graph", "decode", "--quantize", "int4", "--override", "*embed*=int8", *more)
        assert run(LLAMA, "--onnx", path, *options)[0] == 0
        model = onnx.load(path)
        kinds.append({n.op_type for n in model.graph.node} & {"DequantizeLinear", "MatMulNBits", "GatherBlockQuantized"})
        types = {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
        assert types == {"FLOAT", "UINT8"} if more else {"FLOAT", "INT8", "INT4"}
        read = {name for n in model.graph.node for name in n.input}
        assert {t.name for t in model.graph.initializer} <= read  # nothing is stored in two forms
        program = from_onnx(path)
        PassManager([FoldDequantized()]).run(program)
        assert program["forward"].count("quantized_linear") > 0
    assert kinds == [{"DequantizeLinear"}, {"MatMulNBits", "GatherBlockQuantized"}]


def test_command_of_an_imported_model(run: Run, tmp_path: Path) -> None:
    """ONNX in, ONNX out, at another operator set: the same numbers."""
    source = LLAMA.parents[1] / "onnx" / "llama_sdpa.onnx"
    assert run(source, "--onnx", tmp_path / "m.onnx", "--opset", 17)[0] == 0
    with np.load(source.with_suffix(".npz")) as data:
        inputs, want = {k[3:]: data[k] for k in data.files if k.startswith("in.")}, data["out"]
    program = from_onnx(tmp_path / "m.onnx")
    (got,) = evaluate(program["forward"], inputs, {k: p.load() for k, p in program.params.items()})
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--opset", 12), f"operator set 12 cannot be exported; 17 to {NEWEST} can"),
        (("--optimized", "--graph", "step"), "there is no graph 'step' to export; choose one of prefill, decode"),
        (("--graph", "decode"), "there is no graph 'decode' to export; choose one of forward"),
        (("--override", "*=int8"), "--override chooses among quantized weights: give --quantize too"),
        (("--quantize", "int4", "--override", "int8"), "--override 'int8': write GLOB=SCHEME, e.g. '*embed*=int8'"),
    ],
)
def test_command_refuses(run: Run, tmp_path: Path, options: tuple[Any, ...], message: str) -> None:
    assert run(LLAMA, "--onnx", tmp_path / "m.onnx", *options) == (1, "", f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_command_without_the_package(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wasat.backends.onnx", None)
    code, _, err = run(LLAMA, "--onnx", tmp_path / "m.onnx")
    assert code == 1
    assert "pip install 'wasat[onnx]'" in err


def test_command_reports_a_graph_of_text(run: Run, tmp_path: Path) -> None:
    """Text names parameters and has no numbers; a graph without any goes through."""
    text = tmp_path / "graph.txt"
    text.write_text(SUM.replace("  param %w: f32[4]\n", ""))
    assert run(text, "--onnx", tmp_path / "m.onnx")[0] == 0
    text.write_text("graph @f(%x: f32[4]) {\n  param %w: f32[4]\n  %y: f32[4] = add(%x, %w)\n  return %y\n}")
    code, _, err = run(text, "--onnx", tmp_path / "n.onnx")
    assert code == 1
    assert "parameter w has no data" in err
    assert not (tmp_path / "n.onnx").exists()
