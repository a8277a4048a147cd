"""The runtime's reading of an interface is the compiler's: field by field, through an artifact's manifest."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from wasat.backends.tvm.targets import Target, cpu
from wasat.ir import Embedder, Encoder, Generation, Head, Interface, Media, Program, State, parse_program
from wasat.runtime import interface as reader
from wasat.runtime.fields import Fields

from wasat.manifest import interface_json

GRAPH = """graph @step(%tokens: i64[rows, s], %full.k: f32[rows, cap, 2, 20], %ring.v: f32[rows, 32, 2, 20], 
  %h: f32[rows, 4], %t: bf16[2, rows, 3]) {
  return %full.k, %ring.v, %h, %t
}
"""
STATES = (
    State.full("full.k", "k", window=9), State.ring("ring.v", 32, 4, "v"), State.carry("h", empty=-1.5),
    State.tail("t", 3, rows=1, positions=2, empty="start"),
)  # fmt: skip
INTERFACE = Interface(
    "tiny", context=64, chunk=5, vocab=70, generation=Generation(1, (2, 3), 0),
    media=Media(70, 16, (Encoder("image", "see", size=8), Encoder("audio", "hear", rate=8000, samples=90)), seen=True),
    embedder=Embedder("step", limit=7, pad=1), heads=(Head("topic", "step", "text"),), states=STATES,
)  # fmt: skip
PAIRS = [(getattr(reader, c.__name__), c) for c in (Interface, State, Generation, Media, Encoder, Embedder, Head)]


def program(interface: Interface = INTERFACE) -> Program:
    made = parse_program(GRAPH)
    made.declare(**{f.name: getattr(interface, f.name) for f in dataclasses.fields(interface)})
    return made


@pytest.mark.parametrize("read, written", PAIRS, ids=lambda c: c.__name__)
def test_both_have_the_same_fields(read: type[Any], written: type[Any]) -> None:
    beyond = {"dtype", "shape"} if written is State else set()
    assert {f.name for f in dataclasses.fields(read)} - beyond == {f.name for f in dataclasses.fields(written)}


@pytest.mark.parametrize("target", [cpu(), Target("generic", {"kind": "llvm"})], ids=lambda t: t.name)
def test_what_is_written_is_read(target: Target) -> None:
    data = json.loads(json.dumps(interface_json(program(), target)))
    read = reader.read_interface(Fields(data, ""))
    flat = {**data["interface"], **data["limits"], "states": data["states"]}
    assert json.loads(json.dumps(dataclasses.asdict(read))) == flat
    kernels = target.name == "cpu"
    shapes = [["b", 2, "c", 20], ["b", 2, 32, 32]] if kernels else [["b", "c", 2, 20], ["b", 32, 2, 20]]
    assert [list(s.shape) for s in read.states] == [*shapes, ["b", 4], [2, "b", 3]]
    assert [(s.rows, s.positions) for s in read.states] == [*[(0, 2 if kernels else 1)] * 2, (0, None), (1, 2)]
    for mine, theirs in zip(read.states, STATES):
        for field in ("name", "kind", "capacity", "window", "cut", "role", "donated", "grows"):
            assert getattr(mine, field) == getattr(theirs, field)
        assert mine.empty == (f"{mine.name}/begin" if isinstance(theirs.empty, str) else theirs.empty)
    plain = dataclasses.replace(INTERFACE, states=())
    assert {k: v for k, v in dataclasses.asdict(read).items() if k != "states"} == {
        k: v for k, v in dataclasses.asdict(plain).items() if k != "states"
    }


def test_an_interface_that_says_nothing() -> None:
    made = parse_program("graph @f(%x: f32[n]) {\n  return %x\n}\n")
    read = reader.read_interface(Fields(json.loads(json.dumps(interface_json(made, cpu()))), ""))
    assert (read.name, read.generation, read.media, read.states) == ("model", reader.Generation(), None, ())


def test_how_far_back_states_go() -> None:
    """Held against a simulation of each: what a slot holds, and what the next token reads."""
    rng = np.random.default_rng(0)
    read = reader.read_interface(Fields(json.loads(json.dumps(interface_json(program(), cpu()))), ""))
    by_kind = {s.kind: s for s in read.states}
    for _ in range(500):
        past = int(rng.integers(0, 90))
        to, padding = int(rng.integers(0, past + 1)), int(rng.integers(0, 5))
        slots = np.full(32, -1)
        for p in range(past + padding):
            slots[p % 32] = p
        needed = set(range(max(0, to - 4 + 1), to))
        at = SimpleNamespace(to=np.array([to]), past=np.array([past]), written=np.array([past + padding]))
        lost = {kind: bool(s.lost(at.to, at.past, at.written)[0]) for kind, s in by_kind.items()}
        assert lost["ring"] == (to > 0 and not needed <= set(slots.tolist()))
        assert not lost["full"]
        assert lost["carry"] == lost["tail"] == (0 < to < past)
