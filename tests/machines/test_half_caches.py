"""Keys and values of f32 that lie in a device's memory in f16: what kernels write is rounded, and they read what is held."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "runtime"), str(HERE.parent / "face")]
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
from gpu_help import F16, MACHINES, Machine, run
from plan_help import device, loaded
from test_gpu_kernels import RNG, added, close, normal
from test_lead import CASES, VOCAB
from tiny_model import Reference, tiny_program
from wasat.backends.tvm.build import plan
from wasat.backends.tvm.gpu.kernels.attention import Attention, attention
from wasat.backends.tvm.gpu.kernels.elementwise import CacheWrite, cache_write
from wasat.backends.tvm.targets import target_named
from wasat.ir import Builder, DType, IRError, Program, evaluate
from wasat.ir.op import OPS
from wasat.runtime.errors import ArtifactError

import wasat as ws
from wasat import nn
from wasat.web import export_web

pytestmark = pytest.mark.machines
HALF = np.float16
KEPT = pytest.mark.parametrize("machine", [pytest.param(m, id=m.name) for m in (F16, *MACHINES[1:])])


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


@KEPT
@pytest.mark.parametrize("ring, start", [(False, False), (True, False), (False, True)])
def test_what_is_written_is_rounded(machine: Machine, ring: bool, start: bool) -> None:
    """To nearest even, and to infinity what is too large."""
    k, v = normal(1 if start else 2, 2, 2, 5), normal(1 if start else 2, 2, 2, 8)
    k[0, 0, 0, :4] = [65519.0, 65520.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
    keys, values, past = normal(2, 7, 2, 5).astype(HALF), normal(2, 7, 2, 8).astype(HALF), np.array([0, 6 if ring else 4])
    desc = CacheWrite(machine.limits, 2, 5, 8, ring=ring, start=start, shared=start, stored="float16")
    *_, new_keys, new_values = run(machine, cache_write(desc), [k, v, past, keys, values])
    for new, old, x in ((new_keys, keys, k), (new_values, values, v)):
        want = old.copy()
        for row, first in enumerate(past[:1] if start else past):
            for i in range(2):
                with np.errstate(over="ignore"):
                    want[row, (first + i) % 7] = x[row, i].astype(HALF)
        np.testing.assert_array_equal(new, want)


@KEPT
@pytest.mark.parametrize("s, more, ring", [(1, "", False), (1, "", True), (9, "fBH", False), (9, "", True)])
def test_attention_reads_what_is_held(machine: Machine, s: int, more: str, ring: bool) -> None:
    """As exactly as from the same numbers in f32."""
    c = 300
    q, k, v = normal(2, s, 4, 40), normal(2, c, 2, 40).astype(HALF), normal(2, c, 2, 24).astype(HALF)
    past = np.array([c - s, 20], np.int64)
    mask, sink = normal(2, 4, s, c), normal(4)
    desc = Attention(
        machine.limits, 4, 2, 40, 24, 0.3, window=c if ring else None, cached=True, ring=ring, decode=s == 1, mask=more,
        stored="float16", sink="float32" if more else "",
    )  # fmt: skip
    extra = [mask, sink] if more else []
    y = run(machine, attention(desc), [q, past, k, v, *extra, np.full((2, s, 4, 24), 77, np.float32)])[-1]
    op = OPS["cached_attention"]
    k, v = k.astype(np.float32), v.astype(np.float32)
    new = [np.stack([x[r, p : p + s] for r, p in enumerate(past)]) for x in (k, v)]
    attrs = op.Attrs(scale=0.3, sink=bool(more), ring=ring, window=c if ring else None)

    def reference(q: Any, a: Any, b: Any, k: Any, v: Any, *e: Any) -> Any:
        return op.reference(attrs, q, a, b, k, v, past, *e)[0]

    close(y, reference, q, *new, k, v, *extra, lost=added(v))


def rounding() -> Program:
    """The tiny decoder, as the interpreter has one whose keys and values are rounded when they are written."""
    program = tiny_program()
    for g in program.graphs.values():
        for node in list(g.nodes):
            if node.op.name == "cached_attention":
                q, k, v, *more = node.inputs
                b = Builder(g, before=node)
                held = [b.cast(b.cast(x, dtype=DType.F16), dtype=DType.F32) for x in (k, v)]
                g.set_inputs(node, [q, *held, *more])
    return program


@pytest.fixture(params=["webgpu:f16", "opencl", "cuda:sm_90"])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    with device(request.param):
        yield request.param


def test_a_session_is_the_interpreter_s_with_rounded_caches(target: str, tmp_path: Path) -> None:
    """A full cache that grows, and a ring that turns: prefill in chunks, decode, going back."""
    model = loaded(tiny_program(), target, tmp_path / "a.wasat", cache="f16")
    states = json.loads((tmp_path / "a.wasat" / "manifest.json").read_text())["states"]
    assert {s["dtype"] for s in states} == {"float16"}
    ids = np.random.default_rng(0).integers(0, 250, (1, 30))
    rounded, plain = ([*Reference(p).feed(ids[0].tolist())] for p in (rounding(), tiny_program()))
    assert max(np.abs(a - b).max() for a, b in zip(rounded, plain)) > 1e-4  # so the bound below tells them apart
    session = model.session(1)
    for got, at in [(session.step(ids[:, :13]), 12), *((session.step(ids[:, i : i + 1]), i) for i in range(13, 22))]:
        np.testing.assert_allclose(got[0], rounded[at], atol=2e-5)
    session.truncate(20)
    for i in range(20, 30):
        np.testing.assert_allclose(session.step(ids[:, i : i + 1])[0], rounded[i], atol=2e-5)


def test_a_cache_that_something_else_reads_is_refused() -> None:
    """It would read bits of f16 as f32."""
    program = tiny_program()
    g = program["decode"]
    keys = next(v for v in g.inputs if v.name == "full.k")
    b = Builder(g)
    g.set_outputs([*g.outputs, b.reduce_sum(keys, axes=(0, 1, 2, 3))], [*g.output_names, "sum"])
    with pytest.raises(IRError, match=r"the cache %full\.k is stored as f16, .* compile with cache=\"f32\""):
        plan(program, target_named("opencl", cache="f16"))
    plan(program, target_named("opencl"))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_caches_in_codes_are_refused(bits: str) -> None:
    for name in ("webgpu:f16", "opencl", "cuda"):
        with pytest.raises(IRError, match=f"as f32 or f16, not as {bits}; caches of {bits} are for cpu, aarch64, macos, "):
            target_named(name, cache=bits)


@pytest.mark.parametrize("target", ["webgpu:f16", "cuda:sm_90"], indirect=True)
def test_what_stands_first(target: str, tmp_path: Path) -> None:
    """Through the passes: a picture is written into the caches (cache_start), parameters begin them; a growing one, and a
    ring."""
    make, inputs = CASES["picture" if target == "webgpu:f16" else "soft prompt"]
    program, rng = nn.trace(make(), inputs, outputs=["logits"]), np.random.default_rng(0)
    ws.compile(program, tmp_path / "out", target=target, cache="f16", chunk=4)
    states = json.loads((tmp_path / "out" / "manifest.json").read_text())["states"]
    assert [s["dtype"] for s in states if s["role"]] == ["float16"] * 4
    given = {"picture": rng.standard_normal((1, 5, 6)).astype(np.float32)} if len(inputs) > 1 else {}
    session, tokens = ws.load(tmp_path / "out").session(1, context=20), rng.integers(0, VOCAB, (1, 9))
    if given:
        session.encode(**given)
    got = [session.step(tokens[:, :6]), *(session.step(tokens[:, i : i + 1]) for i in range(6, 9))]
    (want,) = evaluate(program["forward"], {"tokens": tokens, **given}, {k: p.load() for k, p in program.params.items()})
    np.testing.assert_allclose(np.concatenate(got), want[0, 5:], atol=2.0**-9 * np.abs(want).max())


def test_an_exported_page(tmp_path: Path) -> None:
    """Its manifest says how the page is to keep them: the page makes buffers as it says."""
    make, inputs = CASES["begin of text"]
    program = nn.trace(make(), inputs, outputs=["logits"])
    export_web(program, tmp_path / "web", target="webgpu:f16", cache="f16")
    manifest = json.loads((tmp_path / "web" / "manifest.json").read_text())
    assert {s["dtype"] for s in manifest["web"]["states"]} == {"float16"}
    assert manifest["settings"]["cache"] == "f16"
    with pytest.raises(IRError, match=r"the target webgpu stores keys and values as f32, not as f16; .*, webgpu:f16$"):
        export_web(program, tmp_path / "refused", cache="f16")
    assert not (tmp_path / "refused").exists()


def test_options_of_a_page(tmp_path: Path) -> None:
    """What compiling was told is what the page reads; what no browser ran is refused before the work."""
    make, inputs = CASES["begin of text"]
    program = nn.trace(make(), inputs, outputs=["logits"])
    export_web(program, tmp_path / "web", activation=None, chunk=4)
    manifest = json.loads((tmp_path / "web" / "manifest.json").read_text())
    assert manifest["settings"]["activation"] is None
    assert manifest["limits"]["chunk"] == 4
    for narrow in ("f16", "bf16"):
        with pytest.raises(ArtifactError, match=f"not in {narrow}: leave it out"):
            export_web(program, tmp_path / "refused", activation=narrow)
    assert not (tmp_path / "refused").exists()
