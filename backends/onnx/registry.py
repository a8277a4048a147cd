"""One table: operation -> how it is written at which operator sets. What it lacks is decomposed, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from wasat.ir import Node

from .emitter import Emitter, Options

Results = Union[str, Sequence[str]]
Emit = Callable[..., Results]


@dataclass(frozen=True)
class Emission:
    """``emit(e, node, *operand names)`` returns the results' names; valid from operator set ``since`` on, where ``when`` is."""

    emit: Emit
    since: int
    when: Callable[[Node, Options], bool]


TABLE: dict[str, list[Emission]] = {}
"""Emissions of each operation, the preferred first."""
OLDEST = 17


def emits(name: str, since: int = OLDEST, when: Callable[[Node, Options], bool] = lambda node, options: True) -> Any:
    """Decorator: adds an emission of operation ``name``; those of newer operator sets are preferred."""

    def add(emit: Emit) -> Emit:
        TABLE.setdefault(name, []).append(Emission(emit, since, when))
        TABLE[name].sort(key=lambda x: -x.since)
        return emit

    return add


def emission(node: Node, options: Options) -> Emission | None:
    """The best emission of ``node``, or None."""
    return next((x for x in TABLE.get(node.op.name, ()) if x.since <= options.opset and x.when(node, options)), None)


__all__ = ["OLDEST", "TABLE", "Emission", "Emitter", "emission", "emits"]
