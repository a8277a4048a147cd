"""What operations that have bodies share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checks import require_equal
from ..dims import equal
from ..errors import TypeMismatch
from ..op import Body
from ..types import TensorType, Type

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Graph, Value


def match(given: Type, wanted: Type, what: str, certain: bool = False) -> None:
    """Raises TypeMismatch where types differ. Sizes that may be equal are checked at run time, or refused if ``certain``."""
    if isinstance(given, TensorType) and isinstance(wanted, TensorType) and given.rank == wanted.rank:
        answers = [equal(x, y) for x, y in zip(given.shape, wanted.shape)]
        fits = given.dtype is wanted.dtype and False not in answers and not (certain and None in answers)
    else:
        fits = given == wanted
    if not fits:
        raise TypeMismatch(f"{what} is {wanted}, not {given}")
    for x, y in zip(given.shape, wanted.shape):
        require_equal(x, y, what)


def differentiable(v: Value) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype.is_float


def zeros(b: Builder, t: TensorType) -> Value:
    return b.broadcast_to(b.constant(0.0, t.dtype), shape=t.shape)


def fresh_prefix(graph: Graph, word: str) -> str:
    """``word``, repeated until no value of the graph has a name that begins with it."""
    prefix = word
    while any(v.name.startswith(prefix) for v in graph.values()) or any(n.startswith(prefix) for n in graph.output_names):
        prefix += word
    return prefix


def parsed(text: str) -> Body:
    from ..parser import parse

    return Body(parse(text))
