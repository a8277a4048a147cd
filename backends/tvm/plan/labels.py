"""Which nodes of the graphs a launch computes: read off the names of variables, before and after fusion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax
from wasat.ir import Node

from .steps import Label


class Labels:
    """Learns from a module before its operations are fused, and after; answers for variables of the fused one."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self._bound: list[tuple[str, str]] = []
        """Variables and the functions they are results of, in order."""
        self._inner: dict[str, list[tuple[str, str]]] = {}
        self._taken: set[str] = set()
        self._count = 0

    def before(self, module: tvm.IRModule) -> None:
        """The module whose operations are kernels by themselves."""
        for _, f in module.functions.items():
            if isinstance(f, relax.Function):
                self._bound += _calls(f)

    def after(self, module: tvm.IRModule) -> None:
        """The module in which fused ones are functions."""
        for gv, f in module.functions.items():
            if isinstance(f, relax.Function) and f.attrs is not None and "Primitive" in f.attrs:
                self._inner[gv.name_hint] = _calls(f)
            elif isinstance(f, relax.Function):
                self._taken |= {name for name, _ in _calls(f) if _number(name) is not None}
        self._taken |= {name for parts in self._inner.values() for name, _ in parts if _number(name) is not None}

    def of(self, variable: str, function: str) -> Label:
        """The label of a call of ``function`` that ``variable`` is bound to."""
        names = [variable]
        for name, callee in self._inner.get(function, ()):
            if _number(name) is None:  # the last of them, which lost its name
                name = next((n for n, f in self._bound if f == callee and n not in self._taken), "")
                self._taken.add(name)
            names.append(name)
        found = dict.fromkeys(self.nodes[n] for name in names if (n := _number(name)) is not None)
        return Label(tuple(repr(n) for n in found), tuple(dict.fromkeys(str(n.loc) for n in found if n.loc)))

    def fresh(self) -> str:
        """A name for the turns of a loop."""
        self._count += 1
        return f"turn{self._count}"


def _calls(f: relax.Function) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for block in f.body.blocks:
        for b in block.bindings:
            value: Any = b.value
            if isinstance(value, relax.Call) and value.args and isinstance(value.args[0], tvm.ir.GlobalVar):
                found.append((b.var.name, value.args[0].name_hint))
    return found


def _number(name: str) -> int | None:
    m = re.match(r"node(\d+)_", name)
    return int(m[1]) if m else None
