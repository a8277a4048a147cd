"""What a plan says beside what an artifact weighs, a session allocates and a graph computes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")

from typer.testing import CliRunner
from wasat.frontend import nn
from wasat.ir import WasatError, parse_program
from wasat.passes.analyses.cost import peak_bytes
from wasat.runtime.device import item_size

import wasat as ws
from wasat.cli.app import app
from wasat.driver import described, load_program
from wasat.models import gemini
from wasat.plan import plan

ROOT = Path(__file__).resolve().parents[2]
TINY = gemini.preset("tiny")
CONFIG = replace(
    TINY, text=replace(TINY.text, layers=2, head_dim=16, context=64, window=8, period=2), cross_every=2, audio=None, video=None,
    heads=(gemini.Head("digit", 10, "image"),),
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["f32", "int4"])
def test_an_artifact_weighs_what_was_planned(scheme: str, tmp_path: Path) -> None:
    program = gemini.Gemini(CONFIG).program()
    found = plan(program, schemes=[scheme], batch=3, context=48, chunk=8)
    ws.compile(program, tmp_path / "a", quantize=None if scheme == "f32" else scheme, chunk=8)
    model = ws.load(tmp_path / "a")
    weights = [item_size(w.dtype) * math.prod(w.shape) for w in model.manifest.weights]  # type: ignore[arg-type]
    assert found.weights == {scheme: sum(weights)}
    file = (tmp_path / "a" / "weights.safetensors").stat().st_size
    assert found.weights[scheme] <= file < found.weights[scheme] + 150 * len(weights)  # names and places of arrays
    session = model.session(batch=3, context=48)
    session._slots.reserve(48)
    taken = session._slots.nbytes
    assert plan(program, schemes=[], batch=3, chunk=8).caches == taken  # of the model's context, as a session's first caches


def test_caches_by_hand() -> None:
    """Layer 0 has a ring of window + chunk - 1 = 15 positions, layer 1 sees everything: two heads of 16 numbers, keys and
    values, 4 bytes each."""
    program = gemini.Gemini(CONFIG).program()
    one, two = (plan(program, schemes=[], batch=b, context=48, chunk=8) for b in (1, 2))
    assert one.cache_per_token == two.cache_per_token == 2 * 2 * 16 * 4
    ring = one.caches - 48 * one.cache_per_token
    assert 15 <= ring / one.cache_per_token <= 32  # kernels round it up
    assert two.caches == 2 * one.caches
    assert 2 * plan(program, schemes=[], batch=2, context=48, chunk=8, cache="f16").caches == two.caches
    stored = [plan(program, schemes=[], batch=2, context=48, chunk=8, cache=c).cache_per_token for c in ("int8", "int4")]
    assert stored == [2 * 2 * (16 + 2), 2 * (16 // 2 + 2 + 32 // 2 + 2)]  # a scale of two bytes; a value's row is of 32
    with pytest.raises(ws.WasatError, match="there is no cache of 'int3'; there are f32, f16, int8, int4"):
        plan(program, cache="int3")
    cuda, halved = (plan(program, schemes=[], batch=2, context=48, chunk=8, target="cuda", cache=c) for c in ("f32", "f16"))
    assert 2 * halved.caches == cuda.caches
    with pytest.raises(ws.WasatError, match=r"webgpu stores .* as f32, not as f16; .* are for cpu, cuda, .*, webgpu:f16$"):
        plan(program, target="webgpu", cache="f16")
    with pytest.raises(ws.WasatError, match=r"webgpu stores .* caches of int4 are for cpu, aarch64, macos, windows$"):
        plan(program, target="webgpu", cache="int4")


def test_parameters_weights_and_operations_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            self.up, self.down = nn.Linear(64, 128, bias=True), nn.Linear(128, 64)

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            return self.down(nn.relu(self.up(x)))

    program = nn.trace(Two(), {"x": "f32[n, 64]"})
    found = plan(program, sizes={"n": 10})
    assert found.parameters == 64 * 128 * 2 + 128
    assert found.weights["f32"] == 4 * found.parameters
    scales = 2 * 64 * 128 // 32 * 2
    assert found.weights["int8"] >= 64 * 128 * 2 + scales + 4 * 128
    assert found.weights["int4"] >= 64 * 128 + scales + 4 * 128
    assert found.weights["f32"] > found.weights["f16"] > found.weights["int8"] > found.weights["int4"]
    (entry,) = found.entries
    assert entry.operations == 10 * (2 * 2 * 64 * 128 + 128 + 128)  # products, bias, relu
    assert entry.activations == 2 * 10 * 128 * 4  # what relu reads and makes
    assert (found.context, found.caches, entry.tokens) == (None, 0, None)


def test_sizes_of_one_entry_and_of_all() -> None:
    program = gemini.Gemini(CONFIG).program()
    given = {e.name: e for e in plan(program, schemes=[], sizes={"h": 40, "encode_image.w": 50}).entries}
    assert given["encode_image"].sizes == {"h": 40, "w": 50}
    assert given["classify_digit"].sizes == {"h": 40, "w": 16}  # the model's own
    assert given["encode"].sizes == {"m": 4, "b": 1, "t": 4}  # one picture
    assert given["decode"].sizes == {"b": 1, "m": 4, "t": 4, "c": 64}
    assert given["prefill"].tokens == 64
    assert given["decode"].tokens == 1


@pytest.mark.parametrize("name, needed", [("bert_eager", True), ("gpt2_eager", False)])
def test_an_onnx_file(name: str, needed: bool) -> None:
    program = load_program(ROOT / "tests" / "golden" / "onnx" / f"{name}.onnx")
    found = plan(program, schemes=["int8"], context=32)
    assert found.parameters == sum(math.prod(v.tensor.concrete({})) for v in program["forward"].params.values())
    assert bool(found.unknown) is needed
    if needed:
        (symbols,) = found.unknown.values()
        assert not plan(program, schemes=[], sizes=dict.fromkeys(symbols, 8)).unknown
        assert f"forward        not counted: give --size {symbols[0]}=N" in found.text()
    else:
        assert {e.name for e in found.entries} >= {"prefill", "decode"}


def test_states_are_written_in_place() -> None:
    lines = ["graph @g(%x: f32[n]) {", "%y: f32[n] = exp(%x)", "%z: f32[n] = neg(%y)", "return %y, %z", "}"]
    g = parse_program("\n".join(lines))["g"]
    (first, second), sizes = g.output_names, {"n": 10}
    assert peak_bytes(g, sizes) == 80
    assert peak_bytes(g, sizes, [first]) == peak_bytes(g, sizes, {second}) == 40


# -- the command line --------------------------------------------------------------------------------------------------------
def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    return done.output


@pytest.mark.slow
def test_a_configuration_alone_is_planned_as_its_folder(tmp_path: Path) -> None:
    pygemma = ROOT / "examples" / "pygemma"
    (tmp_path / "pygemma").mkdir()
    alone = tmp_path / "pygemma" / "config.json"
    alone.write_bytes((pygemma / "config.json").read_bytes())
    options = ["--context", "512", "--batch", "2"]
    assert shown(str(alone), *options) == shown(str(pygemma), *options)
    gemini.save(tmp_path / "tiny", TINY, gemini.Gemini(TINY).program().params)
    plans = {shown(str(tmp_path / "tiny" / "config.json")), shown("gemini-tiny"), shown("tiny"), shown(str(tmp_path / "tiny"))}
    (text,) = plans
    assert text.startswith("gemini-tiny: ")
    assert "encode_video   activations" in text


@pytest.mark.parametrize("source, options, message", [
    ("gemini-tiny", {"context": 129}, "context is 129; gemini-tiny takes 1 to 128"),
    ("gemini-tinier", {}, "gemini-tinier is neither"),
])  # fmt: skip
def test_refused(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WasatError, match=message):
        plan(described(source), **options)


def test_a_size_that_is_none() -> None:
    done = CliRunner().invoke(app, ["plan", "gemini-tiny", "--size", "h=tall"])
    assert "write NAME=N" in str(done.exception)


def test_tensor_cores_are_counted() -> None:
    """On CUDA in bf16 products of weights in int8 run there; of weights in f32, it says why not; processors have none."""
    program = gemini.Gemini(CONFIG).program()
    options: dict[str, Any] = {"context": 48, "chunk": 8, "activation": "bf16"}
    found = plan(program, schemes=["f32", "int8"], target="cuda", **options)
    kinds = {x.partition(" product")[2].lstrip("s") for x in found.cores["prefill"]}
    whys = [x for x in found.cores["prefill"] if x.startswith("int8: ") and x.endswith(" of many rows on tensor cores")]
    assert [x.split()[2] for x in whys] == ["products"]
    assert whys[0] in found.text()
    assert any("attentions of many queries" in x and "tensor cores" in x for x in found.cores["prefill"])
    assert " of many rows without tensor cores: its weight is f32, its activations bf16" in kinds
    assert not plan(program, schemes=["int8"], **options).cores
