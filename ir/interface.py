"""A program's interface: what it keeps between calls, its limits, the tokens that begin and end a text, media and heads.

It is printed and parsed with the program; the manifest of an artifact is its serialization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import IRError

Cut = Literal["anywhere", "window", "never"]


class _Section:
    """A part of the interface: fields of the types that they are declared with."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise IRError(f"{type(self).__name__}: {name} is {value!r}, which is not {_hint_text(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, h) for h in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(x, args[0]) for x in value)
    if hint is int:
        return type(value) is int and value >= 0
    return isinstance(value, hint)


def _hint_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


@dataclass(frozen=True)
class State(_Section):
    """What a program keeps between calls: an input and an output of one name, of every entry that has it.

    ``kind`` is a word for people. Whoever keeps states (a session, a target's layout, a planner) decides by the other fields:

    ``rows``: the axis along which rows of the batch lie, each its own sequence; None: there is one for all.
    ``positions``: the axis along which positions lie; None: it has none, such as a carry.
    ``capacity``: how many positions lie there; None: as many as there will be (a symbol, which grows with use).
    ``window``: how many of the last positions the next token reads, itself among them; None: all.
    ``cut``: how a row goes back to an earlier length n: ``anywhere`` (whatever lies beyond n is never read), ``window`` (as
    far as the ``window`` positions before n are not yet overwritten by those ``capacity`` later), or ``never`` (but to 0).
    ``empty``: what a row holds before its first token: a number for each element, the name of a parameter that is one row, or
    None where nothing is read that was not written.
    ``role``: ``k`` or ``v`` of an attention, from which a target chooses a layout; else empty.
    ``donated``: whether a backend may write the new value over the old one.
    ``stored``: empty, or the scheme (``int8``, ``int4``) that all that is written to it was rounded to, row by row of the last
    axis (:mod:`wasat.ir.ops.rounding`): a target may keep the codes.

    A row is copied by taking it along ``rows``; if it holds n positions, those before n along ``positions`` suffice.
    """

    name: str
    kind: str
    rows: int | None = 0
    positions: int | None = None
    capacity: int | None = None
    window: int | None = None
    cut: Cut = "never"
    empty: float | str | None = None
    role: str = ""
    donated: bool = False
    stored: str = ""

    @property
    def grows(self) -> bool:
        """Whether it needs more memory as rows get longer."""
        return self.positions is not None and self.capacity is None

    # the kinds there are; a new one is a new function here and nothing else
    @classmethod
    def full(cls, name: str, role: str = "", window: int | None = None) -> State:
        """All positions [b, c, ..]: position p lies in slot p."""
        return cls(name, "full", positions=1, window=window, cut="anywhere", role=role)

    @classmethod
    def ring(cls, name: str, capacity: int, window: int, role: str = "") -> State:
        """The last positions [b, capacity, ..]: position p lies in slot p modulo ``capacity``."""
        return cls(name, "ring", positions=1, capacity=capacity, window=window, cut="window", role=role)

    @classmethod
    def carry(cls, name: str, rows: int | None = 0, empty: float | str = 0.0, donated: bool = False) -> State:
        """What a recurrence hands from one position to the next."""
        return cls(name, "carry", rows, empty=empty, donated=donated)

    @classmethod
    def tail(cls, name: str, count: int, rows: int = 0, positions: int = 1, empty: float | str = 0.0) -> State:
        """The last ``count`` inputs of a causal convolution (its width less one) or a token shift (1), oldest first."""
        return cls(name, "tail", rows, positions, count, count + 1, empty=empty)

    @classmethod
    def memory(cls, name: str, rows: int | None = 0) -> State:
        """What an encoder made of a row's other inputs: steps read it and leave it as it is."""
        return cls(name, "memory", rows, cut="anywhere")

    @classmethod
    def trained(cls, name: str, donated: bool) -> State:
        """A parameter in training, or what its optimizer keeps."""
        return cls(name, "trained", rows=None, donated=donated)


@dataclass(frozen=True)
class Generation(_Section):
    """The tokens that begin a text, end it (any of them), and fill it up."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True)
class Encoder(_Section):
    """The entry that makes rows of media of one kind (image, audio, video), and what it needs: the side of the square that
    pictures are brought to, samples a second and most of them, frames of a video."""

    kind: str
    entry: str
    size: int | None = None
    rate: int | None = None
    samples: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Media(_Section):
    """A model that sees or hears: its token ``vocab + r`` stands for row r of the input ``media`` f32[m, dim], which the
    encoders make. ``seen``: there is an input ``seen`` i64[b, t], the rows of media that each row attends to, -1 for none."""

    vocab: int
    dim: int
    encoders: tuple[Encoder, ...] = ()
    seen: bool = False

    def encoder(self, kind: str) -> Encoder | None:
        """That of media of ``kind``."""
        return next((e for e in self.encoders if e.kind == kind), None)


@dataclass(frozen=True)
class Head(_Section):
    """A classification head: its entry, and what it is of (text, or a kind of media)."""

    name: str
    entry: str
    of: str


@dataclass(frozen=True)
class Embedder(_Section):
    """A model of whole texts: its entry takes ``tokens`` i64[b, s], padded on the right with ``pad``, and ``lengths`` i64[b];
    perhaps ``types`` i64[b, s], 1 for a second text, and ``skip`` i64[b], first tokens that are not pooled. It returns a row
    for each text, or with ``pairs`` for each pair of texts. ``limit``: most tokens of a text."""

    entry: str
    pairs: bool = False
    limit: int | None = None
    pad: int = 0


@dataclass(frozen=True)
class Interface(_Section):
    """What whoever runs a program must know beside its graphs.

    ``context``: most positions of a row. ``chunk``: most new tokens of one call. ``granule``: a growing state's capacity is a
    multiple of it. ``vocab``: how many tokens there are. ``tokens``: the input that they come in by. ``cut``: the output
    bool[b] that says of each row whether a token of its past sees a new one, so that a call cut what sees each other; empty
    where none can. None: not stated.
    """

    name: str = ""
    context: int | None = None
    chunk: int | None = None
    granule: int = 16
    vocab: int | None = None
    tokens: str = "tokens"
    cut: str = ""
    generation: Generation | None = None
    media: Media | None = None
    heads: tuple[Head, ...] = ()
    states: tuple[State, ...] = ()
    embedder: Embedder | None = None

    @property
    def state_names(self) -> list[str]:
        """The names of all states."""
        return [s.name for s in self.states]


@dataclass(frozen=True)
class Origin:
    """Where a program comes from: for those who convert and write it. It is not printed.

    ``family``: of a model folder. ``tokenizer``: the file that belongs to it. ``outputs``: what an ONNX file returns, the name
    and, of a sequence, of how many tensors (None: it is one tensor). ``dequantized``: weights of the file that did not stay
    quantized, and why. ``texts``: files that go into an artifact as they are, by name: a tokenizer, a template.
    ``rounded``: the scheme of fewer bits whose rounding the weights were trained with.
    """

    family: str = ""
    tokenizer: str | None = None
    outputs: tuple[tuple[str, int | None], ...] | None = None
    dequantized: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    rounded: str | None = None

    @property
    def is_onnx(self) -> bool:
        """Whether it was an ONNX file."""
        return self.outputs is not None
