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
from wasat.runtime import ArtifactError, manifest
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


@pytest.mark.parametrize("module", [reader, manifest], ids=lambda m: m.__name__)
def test_what_was_read_stays_as_it_is(module: Any) -> None:
    made = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__]
    assert len(made) > 5
    assert all(c.__dataclass_params__.frozen for c in made)  # type: ignore[attr-defined]


ENTRIES = {
    "see": ["image"], "hear": ["audio"], "prefill": ["tokens", "past", "last", "media", "seen"],
    "step": ["tokens", "lengths", "types", "skip"], "classify": ["tokens", "last", "media"],
}  # fmt: skip
READ = reader.read_interface(Fields(json.loads(json.dumps(interface_json(program(), cpu()))), ""))
WHOLE = dataclasses.replace(
    READ, states=READ.states[:3],  # rows of the fourth lie along its second axis, which a session cannot keep
    heads=(reader.Head("topic", "classify", "text"), reader.Head("animal", "see", "image")),
)


def test_encoders_and_heads_are_found_by_name() -> None:
    assert WHOLE.media is not None
    assert [e.entry for k in ("image", "audio") if (e := WHOLE.media.encoder(k))] == ["see", "hear"]
    assert WHOLE.media.encoder("video") is None
    assert [h.entry for n in ("topic", "animal") if (h := WHOLE.head(n))] == ["classify", "see"]
    assert WHOLE.head("mood") is None


@pytest.mark.parametrize("entry, takes, message", [
    ("see", ["image"], None), ("see", ["image", "size"], "image encoder see takes image, size, not image"),
    ("see", None, "image encoder see is no entry"),
    ("prefill", None, None), ("prefill", ["tokens"], "entry prefill takes none"),
    ("step", ["tokens", "lengths"], None), ("step", ["tokens"], "entry step takes tokens, not tokens and lengths"),
    ("step", ["lengths"], "takes lengths, not tokens and lengths"), ("step", None, "takes nothing, not tokens"),
    ("step", ["tokens", "lengths", "skip", "noise"], "not tokens and lengths"),
    ("classify", ["tokens", "last"], None),
    ("classify", ["tokens"], "head topic is of text, which entry classify does not take"),
    ("classify", ["last"], "head topic is of text"), ("classify", ["tokens", "last", "image"], "head topic is of text"),
    ("classify", None, "head topic is of text"),
])  # fmt: skip
def test_entries_that_an_interface_cannot_run_by(entry: str, takes: list[str] | None, message: str | None) -> None:
    entries = {k: v for k, v in {**ENTRIES, entry: takes}.items() if v is not None}
    if message is None:
        reader.check_interface(WHOLE, entries)
        return
    with pytest.raises(ArtifactError, match=message):
        reader.check_interface(WHOLE, entries)


@pytest.mark.parametrize("change, message", [
    ({"context": None}, None), ({"context": 2**62 - 1}, None), ({"context": 2**62}, r"limits\.context is"),
    ({"granule": 0}, r"limits\.granule is 0"), ({"vocab": 0}, r"interface\.vocab is 0"), ({"chunk": 0}, r"limits\.chunk is 0"),
    ({"heads": (reader.Head("animal", "hear", "image"),)}, "head animal is of image, which entry hear does not take"),
    ({"heads": (reader.Head("animal", "see", "smell"),)}, "head animal is of smell"),
    ({"embedder": reader.Embedder("step", False, 1, 0)}, None),
    ({"embedder": reader.Embedder("step", False, 0, 0)}, r"embedder\.limit is 0"),
    ({"states": READ.states}, r"state t of shape .* has rows along 1, and not first"),
    ({"chunk": 29}, None), ({"chunk": 30}, r"ring cache ring\.v has capacity 32; window 4 and chunk 30 need more"),
])  # fmt: skip
def test_interfaces_that_cannot_be(change: dict[str, Any], message: str | None) -> None:
    made = dataclasses.replace(WHOLE, **change)
    if message is None:
        reader.check_interface(made, ENTRIES)
        return
    with pytest.raises(ArtifactError, match=message):
        reader.check_interface(made, ENTRIES)


def whole() -> dict[str, Any]:
    """A manifest as its JSON says it, of a program that adds two arrays."""
    made = parse_program("graph @sum(%x: f32[n, 3], %y: f32[n, 3]) {\n  %z: f32[n, 3] = add(%x, %y)\n  return %z\n}\n")
    arrays = [{"name": k, "dtype": "float32", "shape": ["n", 3]} for k in "xyz"]
    entry = {"inputs": arrays[:2], "outputs": arrays[2:], "states": [], "weights": ["w"], "checks": [], "indices": []}
    data = {
        "format": 3, "wasat": "1", "tvm": "2", "tvm_ffi": "3", "target": cpu().requirements(), "entries": {"sum": entry},
        **interface_json(made, cpu()), "weights": [{"name": "w", "dtype": "float32", "shape": [3]}],
        "files": {"model.so": {"sha256": "00", "bytes": 8}},
    }  # fmt: skip
    return json.loads(json.dumps(data))  # type: ignore[no-any-return]


def changed(path: str, value: Any) -> dict[str, Any]:
    """With another value at a place, or none (...)."""
    data = whole()
    *outer, last = [int(k) if k.isdigit() else k for k in path.split("/")]
    at: Any = data
    for k in outer:
        at = at[k]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return data


def test_a_manifest_is_read_field_by_field() -> None:
    read = manifest.parse_manifest(changed("no_cache", "it looks ahead"))
    assert (read.wasat, read.tvm, read.tvm_ffi, read.no_cache) == ("1", "2", "3", "it looks ahead")
    assert read.files == {"model.so": manifest.FileSpec("00", 8)}
    assert [w.shape for w in read.weights] == [(3,)]
    e = read.entries["sum"]
    assert ([x.name for x in e.inputs], [x.name for x in e.outputs], e.weights) == (["x", "y"], ["z"], ("w",))
    assert read.target.mcpu == cpu().requirements()["mcpu"]


def test_what_a_manifest_may_leave_out() -> None:
    data = whole()
    for name in ("device", "mcpu", "libraries"):
        del data["target"][name]
    read = manifest.parse_manifest(data)
    assert (read.target.device, read.target.mcpu, read.target.libraries, read.no_cache) == ("cpu", "", (), "")


SHAPE = "entries/sum/inputs/0/shape"
INDICES = [{"input": "x", "low": "0", "high": "n", "where": "%y"}]


@pytest.mark.parametrize("path, value, message", [
    ("format", 4, "and this runtime reads format 3: update wasat"), ("format", 2, "has format 2; this runtime reads format 3"),
    ("entries/sum/outputs", [], "entry sum has the outputs none"), ("entries/sum/inputs", [], None),
    ("entries/sum/inputs/0/name", "y", "entry sum has the inputs y, y"),
    ("entries/sum/indices", INDICES, None), ("entries/sum/inputs/0/name", "v", None),
    ("entries/sum/indices", [{**INDICES[0], "input": "z"}], "entry sum takes no input z to hold indices"),
    ("entries/sum/indices", [{**INDICES[0], "high": "n("}], "is no dimension"),
    ("entries/sum/checks", [{"left": "n", "right": "n(", "needs": "", "where": ""}], "is no dimension"),
    ("entries/sum/states", ["s"], "entry sum has a state s that is not described"),
    ("entries/sum/weights", ["w", "u"], "reads a weight u that is not described"),
    ("weights/0/shape", ["n"], "weight w has the shape .*, not whole numbers"),
    ("target/libraries", ["model.so"], None), ("target/libraries", ["a.so"], "names 'a.so', which is no file of the artifact"),
    ("files/..", {"sha256": "", "bytes": 0}, r"'\.\.' is no name"), ("files/a b", {"sha256": "", "bytes": 0}, "is no name"),
    (SHAPE, ["n*n", 3], None), (SHAPE, ["m*m", 3], r"has an input of size m\*m, which no array tells"),
    (SHAPE, ["2*m", 3], None), (SHAPE, ["m + k", 3], "which no array tells"),
    (SHAPE, ["max(n, 4)", 3], None), (SHAPE, ["max(m, 4)", 3], "which no array"),
    (SHAPE, ["m // (n - 1)", 3], "which no array tells"), (SHAPE, ["n", 2**62], "which no array tells"),
    (SHAPE, ["n", 2**62 - 1], None),
], ids=str)  # fmt: skip
def test_manifests_that_cannot_be(path: str, value: Any, message: str | None) -> None:
    if message is None:
        manifest.parse_manifest(changed(path, value))
        return
    with pytest.raises(ArtifactError, match=message):
        manifest.parse_manifest(changed(path, value))
