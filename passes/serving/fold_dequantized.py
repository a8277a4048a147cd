"""Weights of integers that a graph dequantizes by itself become quantized parameters of what reads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from wasat.ir import Builder, DType, Graph, Node, ParamSource, Program, TensorType, Value, run_node
from wasat.ir.ops.shape import Slice, Transpose
from wasat.ir.repacked import Load, Repacked, Weight

from ..core import Pass, Remarks
from ..pattern import erase_dead

_NO_PRODUCT = "what reads it is no product with a matrix and no lookup of rows"
_READ = ("transpose", "reshape", "cast")
_EXACT = (DType.F16, DType.F32, DType.F64, DType.I16, DType.I32, DType.I64)
"""Types in which integers of 8 bits less their zero points are exact."""


@dataclass(frozen=True)
class FoldDequantized(Pass):
    """``(cast(w) - zero) * scale`` of a parameter [n, k] of integers of at most 8 bits, as exporters write DequantizeLinear or
    spell it out: the ``matmul``, ``linear`` and ``gather`` that read it become ``quantized_linear`` and
    ``quantized_embedding`` of a quantized parameter that holds exactly the same numbers. Scales and zero points are parameters
    or constants that differ along rows, or in blocks along what is summed; scales may come behind the product.

    What stays dequantized is a missed remark.
    """

    name = "fold-dequantized"

    def run(self, program: Program, remarks: Remarks) -> bool:
        repacked = Repacked(program.params)
        changed = [_Fold(g, repacked).run(remarks) for g in program.graphs.values()]
        gone = {name for g in program.graphs.values() for name in g.prune_params()} if any(changed) else set()
        for name in gone.difference(*(g.params for g in program.graphs.values())):
            program.params.pop(name, None)
        return any(changed)


class _Fold:
    """The weights of one graph."""

    def __init__(self, graph: Graph, repacked: Repacked) -> None:
        self.graph, self.repacked, self.params = graph, repacked, repacked.params
        self.dense: dict[str, str] = {}
        """Parameters that stay dequantized, and why."""

    def run(self, remarks: Remarks) -> bool:
        count = sum(self._fold(r) for node in self.graph.nodes if (r := self._dequantized(node)) is not None)
        for node in self.graph.nodes:
            for x in node.inputs if node.is_a("mul") and all(_numbers(v, self.params) for v in node.inputs) else ():
                while x.node is not None and x.node.inputs:
                    x = x.node.inputs[0]
                if x.param is not None and _narrow(x) and len(x.shape) > 1:
                    self.dense.setdefault(x.param, _NO_PRODUCT)
        for name, why in self.dense.items():
            remarks.missed(f"parameter {name} stays dequantized: {why}", self.graph)
        if count:
            remarks.applied(f"{count} operation{'s' * (count > 1)} on weights that stay integers", self.graph)
        return bool(count)

    def _fold(self, r: _Dequantized) -> int:
        """What reads the value reads a quantized parameter; returns how many did."""
        count = 0
        for node, index, contracted in list(r.readers()):
            w = r.along(contracted)
            found = w if isinstance(w, str) else self.repacked.param(self.graph, (r.key, contracted), r.param, w)
            if isinstance(found, str):
                self.dense[r.param] = found
                continue
            b = Builder(self.graph, before=node, loc=node.loc)
            if index == 0:
                new = b.quantized_embedding(found, node.inputs[1], dtype=node.output.tensor.dtype)
            else:
                new = b.quantized_linear(node.inputs[0], found, *node.inputs[2:])
            self.graph.replace(node, [new])
            count += 1
        for user in r.value.users if count else ():
            if user.is_a("transpose"):
                erase_dead(self.graph, user)
        if count and r.value.node is not None:
            erase_dead(self.graph, r.value.node)
        return count

    def _dequantized(self, node: Node) -> _Dequantized | None:
        """``(cast(q) - zero) * scale`` of integers of at most 8 bits, in any order of operands, turned or not, and rounded to
        the type of the scale. Without a scale, too, where that comes behind the product.
        """
        if len(node.outputs) != 1 or not isinstance(node.output.type, TensorType) or len(node.output.shape) != 2:
            return None
        value = node.output
        dtype = value.tensor.dtype
        if not dtype.is_float or not node.is_a("mul", "sub", "cast"):
            return None
        if node.is_a("cast") and (scaled := node.inputs[0].made_by("mul")) is not None:
            return self._rounded(value, scaled)
        chain, scale = _chain(value), None
        if node.is_a("mul"):
            for v, other in (node.inputs, node.inputs[::-1]):
                if v.shape == value.shape and (chain := _chain(v)) is not None and (scale := _spread(other, self.params)):
                    break
            else:
                return None
        if chain is None:
            return None
        x, zero, turned = chain
        integers, shift = _numbers(x, self.params), _spread(zero, self.params) if zero is not None else None
        if integers is None or (zero is not None and shift is None):
            return None
        if shift is not None and turned:  # the zero point was subtracted before the axes were exchanged
            shift = shift.turned()
        load, _ = integers
        return _Dequantized(
            value, x, (lambda: load().T) if turned else load, shift, scale or _Spread(lambda: np.ones(1, dtype.np), None),
            (x.param, shift and shift.key, scale and scale.key, turned, str(dtype)),
        )  # fmt: skip

    def _rounded(self, value: Value, scaled: Node) -> _Dequantized | None:
        """A product in f32 that is rounded to another type: of a scale of that type alone, it is what that type makes of it."""
        found, dtype = self._dequantized(scaled), value.tensor.dtype
        if found is None or scaled.output.tensor.dtype is not DType.F32 or dtype not in (DType.F16, DType.BF16):
            return None
        load = found.scale.load
        with np.errstate(over="ignore"):
            if not (load().astype(dtype.np).astype(np.float32) == load()).all():
                self.dense[found.param] = f"its scales are {DType.F32} and it is dequantized to {dtype}"
                return None
        scale = dataclasses.replace(found.scale, load=lambda: load().astype(dtype.np))
        return dataclasses.replace(found, value=value, scale=scale, key=(found.key, str(dtype)))


@dataclass(frozen=True)
class _Spread:
    """Scales or zero points beside a matrix: what broadcasts to it, or with ``block``, one for so many along ``axis``."""

    load: Load
    key: Any
    shape: tuple[int, ...] = ()
    axis: int = 0
    block: int = 0

    @staticmethod
    def of(numbers: tuple[Load, Any] | None, v: Value, dtype: DType, axis: int = 0, block: int = 0) -> _Spread | None:
        """Those of ``v``, in the type that they are used in."""
        if numbers is None:
            return None
        load, key = numbers
        shape = tuple(int(str(d)) for d in v.shape)
        return _Spread(lambda: load().astype(dtype.np), (key, axis, block), shape, axis, block)

    def matrix(self) -> np.ndarray:
        """With two axes."""
        return self.load().reshape((1,) * (2 - len(self.shape)) + self.shape)

    def turned(self) -> _Spread:
        """Beside the matrix with its axes exchanged."""
        shape = (1,) * (2 - len(self.shape)) + self.shape
        return _Spread(lambda: self.matrix().T, self.key, shape[::-1], 1 - self.axis, self.block)

    def few(self, axis: int, block: int) -> Load:
        """The first of each block along ``axis``."""
        return lambda: self.matrix()[tuple(slice(None, None, block if i == axis else None) for i in range(2))]

    def in_blocks(self, axis: int, block: int) -> bool:
        """Whether all of a block are alike."""
        x = self.matrix()
        return bool((np.repeat(self.few(axis, block)(), block, axis)[tuple(map(slice, x.shape))] == x).all())

    @property
    def axes(self) -> set[int]:
        """Along which they differ."""
        return {2 - len(self.shape) + i for i, d in enumerate(self.shape) if d != 1}


@dataclass(frozen=True)
class _Dequantized:
    """A matrix of integers less zero points, times scales."""

    value: Value
    x: Value
    integers: Load
    zero: _Spread | None
    scale: _Spread
    key: Any

    @property
    def param(self) -> str:
        assert self.x.param is not None
        return self.x.param

    def readers(self) -> Iterator[tuple[Node, int, int]]:
        """(node, which operand, axis of the weight that is contracted, or of a row) of what a quantized weight can serve."""
        for node, i in list(self.value.uses):
            if node.is_a("transpose") and Transpose.Attrs.of(node).perm == (1, 0):
                for user, j in list(node.output.uses):
                    if j == 1 and (axis := _contracted(user, j)) is not None:
                        yield user, j, 1 - axis
            elif (axis := _contracted(node, i)) is not None:
                yield node, i, axis

    def along(self, contracted: int) -> Weight | str:
        """The matrix with axis ``contracted`` last, or why its blocks do not run along it."""
        n, k = self.value.shape if contracted == 1 else self.value.shape[::-1]
        assert isinstance(n, int)
        assert isinstance(k, int)
        given = [s for s in (self.zero, self.scale) if s is not None and math.prod(s.shape) > 1]
        blocks = {(s.axis, s.block) for s in given if s.block}
        axis, block = next(iter(blocks), (0, 0))
        if len(blocks) > 1 or (not blocks and len({a for s in given for a in s.axes}) > 1):
            return "its scales or zero points differ along both axes"
        differ = axis if blocks else next((a for s in given for a in s.axes), 1 - contracted)
        if (block > 0) != (differ == contracted):
            return f"its scales differ along axis {differ}, and products sum over axis {contracted}"

        if any(blocks and not s.block and axis in s.axes and not s.in_blocks(axis, block) for s in given):
            return "its scales or zero points differ along both axes"

        def placed(s: _Spread) -> Load:
            """[n | 1, blocks | 1]."""
            few = s.few(axis, block) if blocks and not s.block and axis in s.axes else s.matrix
            return few if contracted == 1 else lambda: few().T

        integers = self.integers
        return Weight(
            self.x.tensor.dtype, (n, k), block or k, integers if contracted == 1 else lambda: integers().T,
            placed(self.zero) if self.zero is not None else lambda: np.zeros((1, 1), np.int8), placed(self.scale),
        )  # fmt: skip


def _contracted(node: Node, i: int) -> int | None:
    """The axis of operand i, a matrix, that ``node`` sums over (or that holds the rows it looks up); None: some other use."""
    if node.is_a("matmul") and i == 1:
        return 0
    if (node.is_a("linear") and i == node.op.weight) or (i == 0 and node.op.picks(node.attrs) == 0):
        return 1
    return None


def _narrow(x: Value) -> bool:
    return isinstance(x.type, TensorType) and x.tensor.dtype.is_int and x.tensor.dtype.bits <= 8


def _numbers(v: Value, params: Mapping[str, ParamSource]) -> tuple[Load, Any] | None:
    """Reads a parameter or constant, also cast or moved, and its key; None for anything else."""
    if v.const is not None:
        array = v.const
        return lambda: array, (array.tobytes(), array.shape)
    if v.param is not None and isinstance(v.type, TensorType):
        source = params[v.param]
        return lambda: np.asarray(source.load()), v.param
    node = v.made_by(*_READ)
    inner = _numbers(node.inputs[0], params) if node is not None and not v.type.symbols else None
    if node is None or inner is None:
        return None
    load = inner[0]
    return lambda: np.asarray(run_node(node, [load()], {})[0]), (inner[1], node.op.name, node.attrs)


def _spread(v: Value, params: Mapping[str, ParamSource]) -> _Spread | None:
    """Numbers beside a matrix: as they are, or each repeated along an axis for the elements of its block."""
    if v.type.symbols or len(v.shape) > 2:
        return None
    if (found := _numbers(v, params)) is not None:
        return _Spread.of(found, v, v.tensor.dtype)
    inner = v
    while (cast := inner.made_by("cast")) is not None:
        inner = cast.inputs[0]
    cut = inner.made_by("slice")
    if cut is not None and all(d == 0 for d in Slice.Attrs.of(cut).starts) and set(Slice.Attrs.of(cut).steps) <= {1}:
        inner = cut.inputs[0]
    merged = inner.made_by("reshape")
    spread = merged.inputs[0].made_by("broadcast_to") if merged is not None else None
    apart = spread.inputs[0].made_by("reshape") if spread is not None else None
    if spread is None or apart is None or len(spread.output.shape) != 3 or len(apart.inputs[0].shape) != 2:
        return None
    few, (a, b, c) = apart.inputs[0], spread.output.shape
    ways = ((0, b, (a, 1, c), (a * b, c), (a, c)), (1, c, (a, b, 1), (a, b * c), (a, b)))
    for axis, block, one, whole, own in ways:
        if apart.output.shape == one and inner.shape == whole and few.shape == own and isinstance(block, int):
            return _Spread.of(_numbers(few, params), few, v.tensor.dtype, axis, block)
    return None


def _chain(v: Value) -> tuple[Value, Value | None, int] | None:
    """``v`` as (parameter of integers, zero point that is subtracted or None, 1 if the axes are exchanged after it, else 0)."""
    zero: Value | None = None
    turned = 0
    while v.node is not None:
        node = v.node
        if node.is_a("transpose") and Transpose.Attrs.of(node).perm == (1, 0) and zero is None:
            turned = 1 - turned
        elif node.is_a("sub") and zero is None and node.inputs[0].shape == v.shape and v.tensor.dtype in _EXACT:
            zero = node.inputs[1]
        elif not node.is_a("cast") or v.tensor.dtype not in _EXACT:
            return None
        v = node.inputs[0]
    return (v, zero, turned) if v.param is not None and _narrow(v) and len(v.shape) == 2 else None
