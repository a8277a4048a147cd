"""An accelerator that another package brings: installed, named on the command line, and held to the interpreter's bits."""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import BuildError, Runner
from wasat.backends.tvm.targets import target_named
from wasat.ir import ArrayParam, Node, Program, QTensorType, parse
from wasat.ir.ops.quant import quantize_array
from wasat.runtime import ArtifactError

import wasat as ws

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "matrix_unit"
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as pip installs it, its driver not yet there."""
    pytest.importorskip("setuptools", "77", reason="what builds the package is of the extra dev")
    place = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")  # pip writes into what it builds
    for name in ("pyproject.toml", "matrix_unit.py"):
        (source / name).write_bytes((SOURCE / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", place, source], check=True)
    return place


@pytest.fixture
def unit(installed: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(installed))
    return importlib.import_module("matrix_unit")


@pytest.fixture
def driver(unit: ModuleType) -> ctypes.CDLL:
    """The unit's software model."""
    if not unit.DRIVER.exists():
        how = ["g++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", SOURCE / "driver.cpp", "-o", unit.DRIVER]
        subprocess.run(how, check=True)
    lib = ctypes.CDLL(str(unit.DRIVER))
    lib.matrix_unit_tiles.restype = ctypes.c_int64
    return lib


def tiles(unit: ModuleType, w: Any, rows: int) -> int:
    """How many tiles a product of ``rows`` rows takes."""
    p = unit.Product(*w.shape, w.row_block)
    return int(-(-rows // 16) * p.columns * p.blocks * p.tiles)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# -- a product --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "x, n, scheme, block, bias",
    [
        ("f32[m, 64]", 16, "int8", 64, False), ("f32[m, 70]", 20, "int8", 32, True), ("f32[2, m, 200]", 7, "int4", 128, True),
        ("f16[m, 96]", 48, "int8", 32, True), ("bf16[m, 33]", 1, "int4", 32, False), ("f32[m, 100]", 17, "int8", 100, False),
        ("f32[m, 5]", 33, "int8", 32, False),
    ],
)  # fmt: skip
def test_has_the_bits_of_the_interpreter(
    unit: ModuleType, driver: ctypes.CDLL, x: str, n: int, scheme: str, block: int, bias: bool
) -> None:  # fmt: skip
    k = int(x.rsplit(",", 1)[1][:-1])
    dtype = x.split("[")[0]
    w = quantize_array(RNG.standard_normal((n, k)).astype(np.float32), QTensorType(scheme, (n, k), block))
    w.values[0] = -8 if scheme == "int4" else -127  # sums as large as they become
    params = f" param %w: {w.type}" + f" param %v: {dtype}[{n}]" * bias
    g = parse(f"graph @f(%x: {x}) {{{params}\n %y: {x.rsplit(',', 1)[0]}, {n}] = "
              f'quantized_linear(%x, %w{", %v" * bias}) {{activation="int8"}}\n return %y\n}}')  # fmt: skip
    program = Program({"f": g})
    program.params["w"] = ArrayParam(w, w.type)
    kind = g.inputs[0].tensor.dtype.np
    if bias:
        program.params["v"] = ArrayParam(RNG.standard_normal(n).astype(kind), g.params["v"].type)
    compiled = Runner(program, target_named("matrix-unit", threads=2))
    for m in (1, 15, 16, 35):
        rows = (RNG.standard_normal((*([2] if x.startswith("f32[2") else []), m, k)) * 3).astype(kind)
        rows[..., 0, :] = 1.0  # every number at the limit
        if m > 16:
            rows[..., 1, :] = 0.0
            rows[..., 2, 3], rows[..., 4, 1] = np.nan, np.inf
        before = driver.matrix_unit_tiles()
        got = compiled("f", {"x": rows})["y"]
        want = ws.run(program, "f", x=rows)["y"]
        assert np.isnan(want).any() == (m > 16)
        assert same_bits(np.nan_to_num(got), np.nan_to_num(want))
        assert (np.isnan(got) == np.isnan(want)).all()
        assert driver.matrix_unit_tiles() - before == tiles(unit, w.type, rows.size // k)


# -- a model ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def optimized() -> Program:
    """The model of the demonstration as it is lowered."""
    return ws.optimize(ws.from_pretrained(ROOT / "examples" / "gemini"), quantize="int8", granule=16)[0]


def products(program: Program, graph: str) -> list[Node]:
    return [n for n in program[graph].nodes if n.op.kind == "product"]


def linears(program: Program, graph: str) -> list[Node]:
    return [n for n in products(program, graph) if n.op.name == "quantized_linear"]


@pytest.mark.slow
def test_every_product_of_the_demonstration_has_the_bits_of_the_interpreter(
    unit: ModuleType, driver: ctypes.CDLL, optimized: Program
) -> None:
    """All weights of the model, in one graph; what they multiply is random."""
    found = list({n.inputs[1].param: n for g in optimized.graphs for n in linears(optimized, g)}.values())
    assert len(found) > 40
    declared, lines, params = {}, [], {}
    for i, node in enumerate(found):
        names = [f"p{i}.{j}" for j, _ in enumerate(node.inputs[1:])]
        for name, v in zip(names, node.inputs[1:]):
            declared[name], params[name] = v.type, optimized.params[v.param]
        n, k = node.inputs[1].shape
        operands = ", ".join([f"%x{k}", *(f"%{name}" for name in names)])
        lines.append(f'%y{i}: f32[m, {n}] = quantized_linear({operands}) {{activation="int8"}}')
    widths = sorted({n.inputs[1].shape[1] for n in found})
    inputs = ", ".join(f"%x{k}: f32[m, {k}]" for k in widths)
    body = [*(f"param %{name}: {type}" for name, type in declared.items()), *lines]
    body.append(f"return {', '.join(f'%y{i}' for i in range(len(found)))}")
    program = Program({"f": parse(f"graph @f({inputs}) {{\n" + "\n".join(body) + "\n}")}, params)
    compiled = Runner(program, target_named("matrix-unit", threads=2))
    feed = {f"x{k}": RNG.standard_normal((17, k)).astype(np.float32) for k in widths}
    before = driver.matrix_unit_tiles()
    got, want = compiled("f", feed), ws.run(program, "f", **feed)
    assert all(same_bits(got[name], want[name]) for name in want)
    assert driver.matrix_unit_tiles() - before == sum(tiles(unit, n.inputs[1].type, 17) for n in found)


ASK = """
import ctypes, json, sys
from pathlib import Path
from wasat.runtime import load
folder, question, picture = sys.argv[1:]
model = load(folder)
unit = ctypes.CDLL(folder + "/libmatrix_unit.so")
unit.matrix_unit_tiles.restype = ctypes.c_int64
told, last = {}, unit.matrix_unit_tiles()
def count(entry):
    global last
    told[entry], last = unit.matrix_unit_tiles() - last, unit.matrix_unit_tiles()
prompt = model.tokenizer.encode(question)
session = model.session()
tokens = [int(session.step([prompt]).argmax())]
count("prefill")
tokens.append(int(session.step([tokens]).argmax()))
count("decode")
while len(tokens) < 6:
    tokens.append(int(session.step([tokens[-1:]]).argmax()))
count("")
rows = model.embed(Path(picture))
count("encode_image")
print(json.dumps({"tiles": told, "prompt": prompt, "tokens": tokens, "rows": rows.tolist()}))
"""


@pytest.mark.slow
def test_the_demonstration_runs_on_it(
    unit: ModuleType, driver: ctypes.CDLL, optimized: Program, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """`wasat compile --target matrix-unit`: all that is quantized is the unit's, each other product is named, and the answers
    are the interpreter's."""
    out, folder = tmp_path / "demo.wasat", ROOT / "examples" / "gemini"
    code, said, err = run("compile", folder, "-o", out, "--quantize", "int8", "--target", "matrix-unit", "--verbose")
    assert code == 0, err
    others = [n for name in optimized.graphs for n in products(optimized, name) if n.op.name != "quantized_linear"]
    assert {n.op.name for n in others} == {"attention", "cached_attention", "conv", "matmul"}
    told = r"(%\w+) = (\w+) is left to the CPU: it multiplies for quantized_linear, not for \2.*?( × \d+)?$"
    left = re.findall(told, said, re.MULTILINE)
    assert {op for _, op, _ in left} == {n.op.name for n in others}
    assert sum(int(times[3:] or 1) for *_, times in left) == len(others)
    target = json.loads((out / "manifest.json").read_text())["target"]
    assert (target["device"], target["libraries"]) == ("matrix-unit", ["libmatrix_unit.so"])

    picture = ROOT / "examples" / "media" / "scene.png"
    question = "Tell me about what you see."
    done = subprocess.run([sys.executable, "-c", ASK, out, question, picture], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    sizes = {"b": 1, "s": len(told["prompt"])}
    for entry in ("prefill", "decode", "encode_image"):
        mine = linears(optimized, entry)
        rows = [np.prod(n.inputs[0].tensor.concrete(sizes)[:-1]) for n in mine]
        assert told["tiles"][entry] == sum(tiles(unit, n.inputs[1].type, int(r)) for n, r in zip(mine, rows))

    whole = ws.optimize(ws.from_pretrained(folder), quantize="int8", kv_cache=False)[0]
    tokens = list(told["prompt"])
    for _ in told["tokens"]:
        logits = ws.run(whole, tokens=np.array([tokens]), media=np.zeros((1, 192), np.float32))["logits"]
        tokens.append(int(logits[0, -1].argmax()))
    assert told["tokens"] == tokens[len(told["prompt"]) :]


def test_what_is_missing_is_named(
    unit: ModuleType, driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = Program({"f": parse("graph @f(%x: f32[2]) {\n %y: f32[2] = neg(%x)\n return %y\n}")})
    out = tmp_path / "small.wasat"
    ws.compile(program, out, target="matrix-unit")
    library = out / "libmatrix_unit.so"
    library.write_bytes(b"\0" * library.stat().st_size)
    with pytest.raises(ArtifactError, match=r"libmatrix_unit.so is not the file that was compiled"):
        ws.load(out)
    with pytest.raises(ArtifactError, match=r"for the device matrix-unit, and libmatrix_unit.so of it cannot be loaded here: "):
        ws.load(out, verify=False)
    monkeypatch.setattr(unit, "DRIVER", tmp_path / "gone" / "libmatrix_unit.so")
    missing = r"compiling for matrix-unit needs the library libmatrix_unit.so: .*gone/.* does not exist"
    with pytest.raises(BuildError, match=missing):
        ws.compile(program, out, target="matrix-unit")
