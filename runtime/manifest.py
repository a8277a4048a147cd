"""What ``manifest.json`` says: the signatures, limits and needs of a compiled program, read with every field's type checked.

Fields that this version does not know are left alone: what changes the meaning of an artifact changes ``format``.
"""

from __future__ import annotations

import ast
import contextlib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import ArtifactError

FORMAT = 2
AGAIN = "compile the model again"

ENCODER_INPUTS = {"image": ("image",), "audio": ("audio",), "video": ("frames", "times")}
"""What the encoder of each kind takes: u8[h, w, 3]; f32[n]; u8[n, h, w, 3] and f32[n] in seconds."""

Extent = int | str
"""A dimension: a number, or an expression over symbols (``b`` rows, ``s`` new tokens, ``c`` capacity of full caches)."""


@dataclass(frozen=True)
class TensorSpec:
    """An array that goes in or comes out."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class StateSpec(TensorSpec):
    """A cache, as it lies in memory. A ``full`` one grows along the axis whose extent names ``c``; a ``ring`` has
    ``capacity`` positions, at least ``window + chunk - 1``."""

    kind: str
    capacity: int | None
    window: int | None

    @property
    def growing_axis(self) -> int | None:
        """The axis that the capacity of full caches sizes; None for a ring."""
        return next((i for i, d in enumerate(self.shape) if isinstance(d, str) and re.search(r"\bc\b", d)), None)


@dataclass(frozen=True)
class Check:
    """An equation between sizes that the library takes for granted: ``needs`` says it in words, ``where`` names the node."""

    left: Extent
    right: Extent
    needs: str
    where: str


@dataclass(frozen=True)
class Indices:
    """An input whose elements the library takes for indices: they must be in ``low .. high - 1``."""

    input: str
    low: Extent
    high: Extent
    where: str


@dataclass(frozen=True)
class Entry:
    """One function of the library: ``inputs``, then the states named, then all weights -> ``outputs``."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[str, ...]
    checks: tuple[Check, ...]
    indices: tuple[Indices, ...]


@dataclass(frozen=True)
class Needs:
    """The machine that the library was compiled for."""

    kind: str
    arch: str
    os: str
    features: tuple[str, ...]
    """Instruction sets, in the words of /proc/cpuinfo."""


@dataclass(frozen=True)
class MediaSpec:
    """A model that sees or hears: its token ``vocab + r`` stands for row r of the input ``media`` f32[m, dim], which the
    entries ``encoders`` (by kind: image, audio, video) make of pictures, sounds and videos."""

    vocab: int
    dim: int
    encoders: dict[str, str]
    rate: int | None
    """Samples per second that the audio encoder takes."""
    seen: bool
    """Whether there is an input ``seen`` i64[b, t]: the rows of media that each row attends to, -1 for none."""


@dataclass(frozen=True)
class HeadSpec:
    """A classification head: ``entry`` takes what the encoder of ``of`` takes (image, audio, video), or what prefill does of a
    text (``tokens``, ``media``, ``seen``) and ``last`` i64[b], the positions to classify at; it returns logits."""

    entry: str
    of: str


@dataclass(frozen=True)
class FileSpec:
    """A file of the artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The whole of it."""

    name: str
    wasat: str
    tvm: str
    tvm_ffi: str
    target: Needs
    entries: dict[str, Entry]
    states: dict[str, StateSpec]
    weights: tuple[TensorSpec, ...]
    context: int | None
    """Most positions of a row; None for a program without such a limit."""
    chunk: int | None
    """Most tokens of one prefill call; None: any number."""
    bos: int | None
    eos: tuple[int, ...]
    vocab: int | None
    media: MediaSpec | None
    heads: dict[str, HeadSpec]
    files: dict[str, FileSpec]


class _Fields:
    """A JSON object whose fields are taken with their types; errors name the field's path."""

    def __init__(self, data: Any, path: str) -> None:
        self.path = path
        if not isinstance(data, dict):
            raise ArtifactError(f"manifest.json: {path or 'the whole'} is {_kind(data)}, not an object; {AGAIN}")
        self.data = data

    def get(self, name: str, *types: type, optional: bool = False) -> Any:
        where = self._at(name)
        value = self.data.get(name)
        if value is None and optional:
            return None
        if name not in self.data:
            raise ArtifactError(f"manifest.json: {where} is missing; {AGAIN}")
        if not isinstance(value, types) or isinstance(value, bool):
            raise ArtifactError(
                f"manifest.json: {where} is {_kind(value)}, not {' or '.join(map(_NAMES.__getitem__, types))}; {AGAIN}"
            )
        if isinstance(value, int) and value < 0:
            raise ArtifactError(f"manifest.json: {where} is {value}; it cannot be negative; {AGAIN}")
        return value

    def items(self, name: str, *types: type, optional: bool = False) -> list[Any]:
        values = self.get(name, list, optional=optional) or []
        items = _Fields({str(i): x for i, x in enumerate(values)}, self._at(name))
        return [items.get(i, *types) for i in items.data]

    def section(self, name: str) -> _Fields:
        return _Fields(self.get(name, dict), self._at(name))

    def sections(self, name: str) -> list[_Fields]:
        return [_Fields(x, f"{self._at(name)}.{i}") for i, x in enumerate(self.items(name, dict))]

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


_NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), f"{value!r}")


def check_format(data: Any) -> None:
    """Raises ArtifactError unless the JSON value ``data`` says that it has the format read here."""
    top = _Fields(data, "")
    number = top.get("format", int)
    if number > FORMAT:
        made_by = top.data.get("wasat", "?")
        raise ArtifactError(
            f"the artifact has format {number} (made by wasat {made_by}) and this runtime reads format {FORMAT}: "
            f"update wasat, or {AGAIN}"
        )
    if number != FORMAT:
        raise ArtifactError(f"the artifact has format {number}; this runtime reads format {FORMAT}: {AGAIN}")


def parse_manifest(data: Any) -> Manifest:
    """The manifest in the JSON value ``data``. Raises ArtifactError for another format, a missing or mistyped field."""
    check_format(data)
    top = _Fields(data, "")
    target, limits, generation, files = (top.section(k) for k in ("target", "limits", "generation", "files"))
    entries, heads = top.section("entries"), _Fields(top.data.get("heads", {}), "heads")
    manifest = Manifest(
        name=top.get("name", str), wasat=top.get("wasat", str), tvm=top.get("tvm", str), tvm_ffi=top.get("tvm_ffi", str),
        target=Needs(
            target.get("kind", str), target.get("arch", str), target.get("os", str), tuple(target.items("features", str))
        ),
        entries={name: _entry(entries.section(name)) for name in entries.data},
        states={s.name: s for s in map(_state, top.sections("states"))},
        weights=tuple(map(_tensor, top.sections("weights"))),
        context=limits.get("context", int, optional=True), chunk=limits.get("chunk", int, optional=True),
        bos=generation.get("bos", int, optional=True), eos=tuple(generation.items("eos", int, optional=True)),
        vocab=generation.get("vocab", int, optional=True),
        media=_media(top.section("media")) if top.data.get("media") is not None else None,
        heads={name: _head(heads.section(name)) for name in heads.data},
        files={name: _file(files.section(name)) for name in files.data},
    )  # fmt: skip
    _check(manifest)
    return manifest


def _tensor(f: _Fields) -> TensorSpec:
    spec = TensorSpec(f.get("name", str), f.get("dtype", str), tuple(f.items("shape", int, str)))
    for d in spec.shape:
        if isinstance(d, str):
            _parsed(d)
    return spec


def _state(f: _Fields) -> StateSpec:
    t = _tensor(f)
    return StateSpec(
        t.name, t.dtype, t.shape, f.get("kind", str), f.get("capacity", int, optional=True), f.get("window", int, optional=True)
    )


def _entry(f: _Fields) -> Entry:
    return Entry(
        tuple(map(_tensor, f.sections("inputs"))), tuple(map(_tensor, f.sections("outputs"))), tuple(f.items("states", str)),
        tuple(map(_size_check, f.sections("checks"))), tuple(map(_indices, f.sections("indices"))),
    )  # fmt: skip


def _indices(f: _Fields) -> Indices:
    spec = Indices(f.get("input", str), f.get("low", str), f.get("high", str), f.get("where", str))
    for d in (spec.low, spec.high):
        _parsed(str(d))
    return spec


def _size_check(f: _Fields) -> Check:
    check = Check(f.get("left", str), f.get("right", str), f.get("needs", str), f.get("where", str))
    for d in (check.left, check.right):
        _parsed(str(d))
    return check


def _media(f: _Fields) -> MediaSpec:
    kinds = {kind: f.section(kind) for kind in ("image", "audio", "video") if f.data.get(kind) is not None}
    rate = kinds["audio"].get("rate", int) if "audio" in kinds else None
    entries = {k: v.get("entry", str) for k, v in kinds.items()}
    return MediaSpec(f.get("vocab", int), f.get("dim", int), entries, rate, f.data.get("seen") is True)


def _head(f: _Fields) -> HeadSpec:
    return HeadSpec(f.get("entry", str), f.get("of", str))


def _file(f: _Fields) -> FileSpec:
    return FileSpec(f.get("sha256", str), f.get("bytes", int))


def _check(m: Manifest) -> None:
    """What a cache that is too small, or sized by nothing, would do is write outside its memory: refused here."""
    for what, n in (("limits.context", m.context), ("limits.chunk", m.chunk), ("generation.vocab", m.vocab)):
        if n is not None and not 0 < n < 2**62:
            raise ArtifactError(f"manifest.json: {what} is {n}; it must be at least 1; {AGAIN}")
    for name, e in m.entries.items():
        _check_signature(name, e)
        for i in e.indices:
            if all(x.name != i.input for x in e.inputs):
                raise ArtifactError(f"manifest.json: entry {name} takes no input {i.input} to hold indices; {AGAIN}")
        for s in e.states:
            if s not in m.states:
                raise ArtifactError(f"manifest.json: entry {name} has a state {s} that is not described; {AGAIN}")
    if m.media and "prefill" in m.entries and all(x.name != "media" for x in m.entries["prefill"].inputs):
        raise ArtifactError(f"manifest.json: there are media, and entry prefill takes none; {AGAIN}")
    for kind, encoder in m.media.encoders.items() if m.media else ():
        if encoder not in m.entries:
            raise ArtifactError(f"manifest.json: the {kind} encoder {encoder} is no entry; {AGAIN}")
        found = [x.name for x in m.entries[encoder].inputs]
        if found != list(ENCODER_INPUTS[kind]):
            wanted = ", ".join(ENCODER_INPUTS[kind])
            raise ArtifactError(f"manifest.json: the {kind} encoder {encoder} takes {', '.join(found)}, not {wanted}; {AGAIN}")
    for name, head in m.heads.items():
        given = {x.name for x in m.entries[head.entry].inputs} if head.entry in m.entries else set()
        text = head.of == "text" and {"tokens", "last"} <= given <= {"tokens", "last", "media", "seen"}
        if not text and given != set(ENCODER_INPUTS.get(head.of, ("",))):
            raise ArtifactError(f"manifest.json: head {name} is of {head.of}, which entry {head.entry} does not take; {AGAIN}")
    for w in m.weights:
        if any(isinstance(d, str) for d in w.shape):
            raise ArtifactError(f"manifest.json: weight {w.name} has the shape {list(w.shape)}, not whole numbers; {AGAIN}")
    for state in m.states.values():
        try:
            extents(state.shape, {"b": 1, "c": 16})
        except (KeyError, ZeroDivisionError):
            raise ArtifactError(
                f"manifest.json: the shape {list(state.shape)} of state {state.name} is not one over b and c; {AGAIN}"
            ) from None
        if state.kind == "ring":
            if not state.capacity or not state.window or state.capacity < state.window + (m.chunk or 1) - 1:
                raise ArtifactError(
                    f"manifest.json: ring cache {state.name} has capacity {state.capacity}; "
                    f"window {state.window} and chunk {m.chunk} need more; {AGAIN}"
                )
        elif state.kind == "full" and state.growing_axis is not None:
            _check_capacity(state, state.growing_axis, -(-min(m.context or 2**20, 2**31) // 16) * 16)
        else:
            raise ArtifactError(
                f"manifest.json: state {state.name} of kind {state.kind} and shape {list(state.shape)} is neither a ring nor "
                f"a full cache with an axis of size c; {AGAIN}"
            )
    for name in m.files:
        if not is_file_name(name):
            raise ArtifactError(f"manifest.json: {name!r} is no name for a file of an artifact; {AGAIN}")


def is_file_name(name: str) -> bool:
    """Whether a file of an artifact may be called so, beside its manifest, on any system."""
    return re.fullmatch(r"[\w.+-]{1,200}", name) is not None and name not in (".", "..", "manifest.json")


def _check_signature(name: str, e: Entry) -> None:
    """An entry returns something, and every size of its inputs can be told from the arrays."""
    for what, specs in (("inputs", e.inputs), ("outputs", e.outputs)):
        names = [s.name for s in specs]
        if len(set(names)) < len(names) or (what == "outputs" and not names):
            raise ArtifactError(f"manifest.json: entry {name} has the {what} {', '.join(names) or 'none'}; {AGAIN}")
    dims = [d for s in e.inputs for d in s.shape]
    bound = {d for d in dims if isinstance(d, str) and d.isidentifier()}
    for d in dims:
        used = {x.id for x in ast.walk(_parsed(d)) if isinstance(x, ast.Name)} if isinstance(d, str) else set()
        unknown = used - bound - _FUNCTIONS.keys()
        if len(unknown) == 1 and _tells(d, unknown, bound):
            continue
        if unknown or (isinstance(d, int) and d >= 2**62):
            raise ArtifactError(f"manifest.json: entry {name} has an input of size {d}, which no array tells; {AGAIN}")


def _tells(d: Extent, unknown: set[str], bound: set[str]) -> bool:
    """Whether a size tells the one symbol in it that is ``unknown``: tried with small numbers."""
    known = dict.fromkeys(bound, 1)
    try:
        return all(solved(d, extent(d, {**known, **dict.fromkeys(unknown, n)}), known) for n in (1, 2, 5))
    except ZeroDivisionError:
        return False


def _check_capacity(state: StateSpec, axis: int, most: int) -> None:
    """A full cache has as many positions as it is asked for, or a multiple of that, whatever that is."""
    found = {}
    tried = {16, 32, 48, 256, 1024, most}
    for c in tried:
        with contextlib.suppress(ZeroDivisionError):
            shape = extents(state.shape, {"b": 3, "c": c})
            found[c] = shape[axis] / c if min(shape) > 0 else 0.0
    if len(found) < len(tried) or len(set(found.values())) > 1 or found[16] < 1:
        raise ArtifactError(
            f"manifest.json: full cache {state.name} of shape {list(state.shape)} does not hold c positions; {AGAIN}"
        )


# -- dimensions ------------------------------------------------------------------------------------------------------------
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[[int, int], int]] = {"max": max, "min": min}


_LONGEST = 10_000
"""Characters of a dimension: what Python's own parser and a walk over its tree have room for."""


@lru_cache(4096)
def _parsed(text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body if len(text) <= _LONGEST else None
        if tree is not None and not any(_by_zero(e) for e in ast.walk(tree)):
            _known(tree)
            return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise ArtifactError(f"manifest.json: {text[:80]!r} is no dimension; {AGAIN}")


def _by_zero(e: ast.AST) -> bool:
    return (
        isinstance(e, ast.BinOp) and isinstance(e.op, (ast.FloorDiv, ast.Mod))
        and isinstance(e.right, ast.Constant) and e.right.value == 0
    )  # fmt: skip


def _known(e: ast.expr) -> None:
    """Evaluates ``e`` with all symbols 1: what cannot be evaluated is no dimension."""
    names = {x.id: 1 for x in ast.walk(e) if isinstance(x, ast.Name)}
    with contextlib.suppress(ZeroDivisionError):  # by a size, which is for the arrays to say
        _evaluate(e, names)


def extent(d: Extent, symbols: Mapping[str, int]) -> int:
    """The value of a dimension. Raises KeyError for a symbol that is not bound."""
    return d if isinstance(d, int) else _evaluate(_parsed(d), symbols)


def _evaluate(e: ast.expr, symbols: Mapping[str, int]) -> int:
    match e:
        case ast.Constant(value=int(n)) if not isinstance(n, bool):
            return n
        case ast.Name(id=name):
            return symbols[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left, symbols), _evaluate(right, symbols))
        case ast.UnaryOp(op=ast.USub(), operand=x):
            return -_evaluate(x, symbols)
        case ast.Call(func=ast.Name(id=name), args=[left, right]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_evaluate(left, symbols), _evaluate(right, symbols))
    raise ArtifactError(f"manifest.json: {ast.unparse(e)!r} is no dimension; {AGAIN}")


def solved(d: Extent, size: int, symbols: Mapping[str, int]) -> dict[str, int]:
    """The one unknown symbol of a dimension, from its value, where the dimension is linear in it; else nothing."""
    names = {e.id for e in ast.walk(_parsed(d)) if isinstance(e, ast.Name)} if isinstance(d, str) else set()
    unknown = names - symbols.keys() - _FUNCTIONS.keys()
    if len(unknown) != 1:
        return {}
    [name] = unknown
    first, second = (extent(d, {**symbols, name: n}) for n in (0, 1))
    n, rest = divmod(size - first, second - first) if second != first else (0, 1)
    return {} if rest or n < 0 or extent(d, {**symbols, name: n}) != size else {name: n}


def extents(shape: Sequence[Extent], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The values of all dimensions of a shape."""
    return tuple(extent(d, symbols) for d in shape)
