"""What a program says of itself beside its entries: states, limits, tokens, media, heads. The compiler's own reading of it is
``wasat.ir.interface``; a test holds both together."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .dimensions import Extent, extents, parsed
from .errors import AGAIN, ArtifactError
from .fields import Fields
from .media import KINDS


@dataclass(frozen=True)
class TensorSpec:
    """An array that goes in or comes out."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class State(TensorSpec):
    """What a session keeps between calls, as it lies in memory. ``kind`` is for people; the rest says how to keep it.

    ``rows`` and ``positions``: the axes along which rows of the batch and positions lie, if any. ``capacity``: how many
    positions; None: the session's ``c``, which grows. ``window``: the last positions that the next token reads. ``cut``: how a
    row goes back to an earlier length: ``anywhere``, within the ``window`` that a later position has not overwritten, or
    ``never`` (but to 0). ``empty``: every element of a row without tokens, or the array of the weights that is one; None: it
    is never read.
    """

    kind: str
    rows: int | None
    positions: int | None
    capacity: int | None
    window: int | None
    cut: str
    empty: float | str | None
    role: str
    donated: bool
    stored: str = ""
    """The scheme of what is written to it, where it is kept in codes; for people, too."""

    @property
    def grows(self) -> bool:
        """Whether it needs more memory as rows get longer."""
        return self.positions is not None and self.capacity is None

    def lost(self, to: np.ndarray, past: np.ndarray, written: np.ndarray) -> np.ndarray:
        """Which rows of ``past`` positions, with positions before ``written`` touched, cannot go back to ``to``: bool[b]."""
        if self.cut == "anywhere":
            return np.zeros(to.shape, bool)
        if self.cut == "never" or self.capacity is None or self.window is None:
            return (to > 0) & (to < past)
        oldest = np.maximum(to - self.window + 1, 0)  # that the next token sees
        return (to > 0) & (oldest + self.capacity < written)

    def holds(self) -> str:
        """What it has of a row, in words."""
        if self.cut == "window":
            return f"sliding-window caches hold the last {self.capacity} only"
        return f"the {self.kind} {self.name} holds the latest only"


@dataclass(frozen=True)
class Generation:
    """The tokens that begin a text, end it, and fill it up."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True)
class Encoder:
    """The entry that makes rows of media of one kind, and what it needs of them."""

    kind: str
    entry: str
    size: int | None
    rate: int | None
    """Samples per second that it takes."""
    samples: int | None
    frames: int | None


@dataclass(frozen=True)
class Media:
    """A model that sees or hears: its token ``vocab + r`` stands for row r of the input ``media`` f32[m, dim], which the
    encoders make of pictures, sounds and videos."""

    vocab: int
    dim: int
    encoders: tuple[Encoder, ...]
    seen: bool
    """Whether there is an input ``seen`` i64[b, t]: the rows of media that each row attends to, -1 for none."""

    def encoder(self, kind: str) -> Encoder | None:
        """That of media of ``kind``."""
        return next((e for e in self.encoders if e.kind == kind), None)

    @property
    def kinds(self) -> list[str]:
        """What it takes."""
        return [e.kind for e in self.encoders]


@dataclass(frozen=True)
class Head:
    """A classification head: ``entry`` takes what the encoder of ``of`` takes (image, audio, video), or what prefill does of a
    text (``tokens``, ``media``, ``seen``) and ``last`` i64[b], the positions to classify at; it returns logits."""

    name: str
    entry: str
    of: str


@dataclass(frozen=True)
class Embedder:
    """A model of whole texts: ``entry`` takes ``tokens``, padded on the right with ``pad``, and ``lengths``; perhaps ``types``,
    1 for a second text, and ``skip``, first tokens that are not pooled. It returns a row for each text, or each pair."""

    entry: str
    pairs: bool
    limit: int | None
    """Most tokens of a text."""
    pad: int


@dataclass(frozen=True)
class Interface:
    """All of it."""

    name: str
    context: int | None
    """Most positions of a row; None for a program without such a limit."""
    chunk: int | None
    """Most tokens of one prefill call; None: any number."""
    granule: int
    """Capacities of states that grow are multiples of it."""
    vocab: int | None
    tokens: str
    """The input that tokens come in by."""
    generation: Generation
    media: Media | None
    heads: tuple[Head, ...]
    states: tuple[State, ...]
    cut: str = ""
    """The output bool[b]: whether a token of a row's past sees a new one; empty where none can."""
    embedder: Embedder | None = None

    def head(self, name: object) -> Head | None:
        """The head of that name."""
        return next((h for h in self.heads if h.name == name), None)


# -- reading ---------------------------------------------------------------------------------------------------------------
_DTYPE = re.compile(r"bool|u?int(2|4|8|16|32|64)|float(16|32|64)|bfloat16|float[48]_e\d+m\d+(fnuz?|fn)?")


def read_tensor(f: Fields) -> TensorSpec:
    """Name, element type and shape."""
    spec = TensorSpec(f.get("name", str), f.get("dtype", str), tuple(f.items("shape", int, str)))
    if not _DTYPE.fullmatch(spec.dtype):
        raise ArtifactError(f"manifest.json: {f.path}.dtype is {spec.dtype!r}, which is no element type; {AGAIN}")
    for d in spec.shape:
        if isinstance(d, str):
            parsed(d)
    return spec


def read_interface(top: Fields) -> Interface:
    """The sections ``interface``, ``limits`` and ``states`` of a manifest."""
    f, limits = top.section("interface"), top.section("limits")
    generation, media, embedder = (f.optional(k) for k in ("generation", "media", "embedder"))
    return Interface(
        f.get("name", str), limits.get("context", int, optional=True), limits.get("chunk", int, optional=True),
        limits.get("granule", int),
        f.get("vocab", int, optional=True), f.get("tokens", str), _generation(generation) if generation else Generation(),
        _media(media) if media else None, tuple(map(_head, f.sections("heads"))), tuple(map(_state, top.sections("states"))),
        f.get("cut", str, optional=True) or "", _embedder(embedder) if embedder else None,
    )  # fmt: skip


def _generation(f: Fields) -> Generation:
    return Generation(
        f.get("bos", int, optional=True), tuple(f.items("eos", int, optional=True)), f.get("pad", int, optional=True)
    )


def _embedder(f: Fields) -> Embedder:
    return Embedder(f.get("entry", str), f.flag("pairs"), f.get("limit", int, optional=True), f.get("pad", int))


def _media(f: Fields) -> Media:
    encoders = tuple(
        Encoder(e.get("kind", str), e.get("entry", str), *(e.get(k, int, optional=True) for k in _NEEDS))
        for e in f.sections("encoders")
    )
    return Media(f.get("vocab", int), f.get("dim", int), encoders, f.flag("seen"))


_NEEDS = ("size", "rate", "samples", "frames")


def _head(f: Fields) -> Head:
    return Head(f.get("name", str), f.get("entry", str), f.get("of", str))


def _state(f: Fields) -> State:
    t = read_tensor(f)
    rows, positions, capacity, window = (f.get(k, int, optional=True) for k in ("rows", "positions", "capacity", "window"))
    return State(
        t.name, t.dtype, t.shape, f.get("kind", str), rows, positions, capacity, window, f.get("cut", str),
        f.get("empty", float, str, optional=True), f.get("role", str), f.flag("donated"),
        f.get("stored", str, optional=True) or "",
    )  # fmt: skip


def _inputs(kind: str) -> tuple[str, ...]:
    """What encoders of a kind of media take; nothing for a kind that there is none of."""
    return KINDS[kind].inputs if kind in KINDS else ()


# -- checks ----------------------------------------------------------------------------------------------------------------
def check_interface(m: Interface, inputs: Mapping[str, Sequence[str]]) -> None:
    """Raises ArtifactError for what entries with these inputs, by name, cannot be run by.

    What a state that is too small, or sized by nothing, would do is write outside its memory: refused here."""
    for what, n in (("context", m.context), ("chunk", m.chunk), ("granule", m.granule), ("vocab", m.vocab)):
        if n is not None and not 0 < n < 2**62:
            section = "interface" if what == "vocab" else "limits"
            raise ArtifactError(f"manifest.json: {section}.{what} is {n}; it must be at least 1; {AGAIN}")
    if m.media and "prefill" in inputs and "media" not in inputs["prefill"]:
        raise ArtifactError(f"manifest.json: there are media, and entry prefill takes none; {AGAIN}")
    for e in m.media.encoders if m.media else ():
        if e.entry not in inputs:
            raise ArtifactError(f"manifest.json: the {e.kind} encoder {e.entry} is no entry; {AGAIN}")
        wanted = list(_inputs(e.kind))
        if list(inputs[e.entry]) != wanted or not wanted:
            found = ", ".join(inputs[e.entry])
            raise ArtifactError(
                f"manifest.json: the {e.kind} encoder {e.entry} takes {found}, not {', '.join(wanted)}; {AGAIN}"
            )
        for need in KINDS[e.kind].needs:
            if getattr(e, need) is None:
                raise ArtifactError(f"manifest.json: the {e.kind} encoder {e.entry} has no {need}; {AGAIN}")
    if m.embedder:
        takes = inputs.get(m.embedder.entry, ())
        if not {"tokens", "lengths"} <= set(takes) <= {"tokens", "lengths", "types", "skip"}:
            raise ArtifactError(
                f"manifest.json: the embedder's entry {m.embedder.entry} takes {', '.join(takes) or 'nothing'}, not tokens and "
                f"lengths; {AGAIN}"
            )
        if m.embedder.limit is not None and m.embedder.limit < 1:
            raise ArtifactError(f"manifest.json: embedder.limit is {m.embedder.limit}; it must be at least 1; {AGAIN}")
    for h in m.heads:
        given = set(inputs.get(h.entry, ()))
        text = h.of == "text" and {"tokens", "last"} <= given <= {"tokens", "last", "media", "seen"}
        if not text and given != set(_inputs(h.of) or ("",)):
            raise ArtifactError(f"manifest.json: head {h.name} is of {h.of}, which entry {h.entry} does not take; {AGAIN}")
    for state in m.states:
        _check_state(state, m)


def _check_state(s: State, m: Interface) -> None:
    try:
        least = min(extents(s.shape, {"b": 1, "c": m.granule}), default=1)
    except (KeyError, ZeroDivisionError):
        raise ArtifactError(
            f"manifest.json: the shape {list(s.shape)} of state {s.name} is not one over b and c; {AGAIN}"
        ) from None
    if least < 1:
        raise ArtifactError(f"manifest.json: state {s.name} of shape {list(s.shape)} holds nothing; {AGAIN}")
    axes = [a for a in (s.rows, s.positions) if a is not None]
    if any(a >= len(s.shape) for a in axes) or len(set(axes)) < len(axes) or s.cut not in ("anywhere", "window", "never"):
        raise ArtifactError(
            f"manifest.json: state {s.name} of shape {list(s.shape)} has rows along {s.rows}, positions along "
            f"{s.positions}, and is cut {s.cut}; {AGAIN}"
        )
    if s.rows is not None and (s.rows or (isinstance(s.shape[0], str) and s.shape[0] != "b")):
        raise ArtifactError(
            f"manifest.json: state {s.name} of shape {list(s.shape)} has rows along {s.rows}, and not first; {AGAIN}"
        )
    if s.grows:
        most = -(-min(m.context or 2**20, 2**31) // m.granule) * m.granule
        assert s.positions is not None
        _check_capacity(s, s.positions, m.granule, most)
    elif any(isinstance(d, str) and "c" in d for d in s.shape):
        raise ArtifactError(f"manifest.json: the shape {list(s.shape)} of state {s.name}, which does not grow, has c; {AGAIN}")
    if s.cut == "window" and (not s.capacity or not s.window or s.capacity < s.window + (m.chunk or 1) - 1):
        raise ArtifactError(
            f"manifest.json: ring cache {s.name} has capacity {s.capacity}; window {s.window} and chunk {m.chunk} need more; "
            f"{AGAIN}"
        )


def _check_capacity(state: State, axis: int, granule: int, most: int) -> None:
    """A state that grows has as many positions as it is asked for, or a multiple of that, and perhaps some more."""
    found = {}
    tried = (granule, 2 * granule, 3 * granule, 16 * granule, 64 * granule, most)
    for c in tried:
        with contextlib.suppress(ZeroDivisionError):
            shape = extents(state.shape, {"b": 3, "c": c})
            found[c] = shape[axis] if min(shape) > 0 else 0
    step = (found.get(2 * granule, 0) - found.get(granule, 0)) / granule
    more = {n - step * c for c, n in found.items()}
    if not (found.keys() == set(tried) and step >= 1 and len(more) == 1 and min(more) >= 0 == min(more) % granule):
        raise ArtifactError(
            f"manifest.json: full cache {state.name} of shape {list(state.shape)} does not hold c positions; {AGAIN}"
        )
