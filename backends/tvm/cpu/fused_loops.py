"""Loop nests for CPUs: what Relax fused, element by element, becomes one pass over memory on all threads.

TVM compiles a fused function as it stands: a nest and a buffer for each operation, on one thread. Here an intermediate value
is computed where it is read, once per element; the loops that remain are ordered so that the innermost one walks memory, which
LLVM turns into vector code; exponentials and the like are polynomials, so that nothing calls out of it.

Taken are functions made of elementwise operations and sums, products, maxima and minima, of sizes known or not. All else is
left, and so is bf16: the pass that widens it loses the buffers that are declared within loops. Left as well are elements of
sizes that are not known, without a sum, whose places are quotients and remainders of another's: LLVM takes a minute for a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tvm
import tvm.sym
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.s_tir import SBlockRealize

from .kernels.elementary import exact_erf, exact_exp, exact_sigmoid, exact_tanh
from .kernels.emit import Buffer, Expr, Index, Kernel, ceil_div, floor_div, floor_mod, int64, load, maximum, minimum

_WORK = 16384  # elements below which a second thread costs more than it saves
_INNER = 256  # elements that the loops within one unit of work have at least
_LANES = 16  # partial results of a reduction, side by side
_WIDTH = 256  # columns that are reduced together
_MOST = 1000  # reads of inlined buffers within one element: branches repeat what they share, which may double at each step

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max, tirx.EQ, tirx.NE,
    tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or, tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor,
    tirx.LShift, tirx.RShift,
)  # fmt: skip
_COMBINE = (tirx.Add, tirx.Mul, tirx.Max, tirx.Min)


class _Unsupported(Exception):
    """The function is not of the kind that is taken."""


@dataclass(frozen=True)
class _Stage:
    """``buffer[spatial] = value``, or, with ``combine``, the reduction of ``value`` over ``reduced``."""

    buffer: Buffer
    spatial: tuple[tuple[Expr, Index], ...]
    value: Expr
    reduced: tuple[tuple[Expr, Index], ...] = ()
    combine: Any = None
    neutral: Expr = None

    @property
    def shape(self) -> tuple[Index, ...]:
        return tuple(n for _, n in self.spatial)


def schedule(threads: int) -> Any:
    """A pass over a module after fusion: its functions as loop nests for ``threads`` threads, where they are of the kind."""

    @tvm.transform.module_pass(opt_level=0, name="CPULoops")
    def run(module: tvm.IRModule, context: Any) -> tvm.IRModule:
        for gv, f in module.functions_items():
            if isinstance(f, tirx.PrimFunc) and "tirx.is_scheduled" not in (f.attrs or {}):
                with suppress(_Unsupported):
                    module[gv] = _Loops(f, gv.name_hint, threads).build()
        return module

    return run


def _size(n: Expr) -> Index:
    if not isinstance(n, tirx.IntImm):
        return n
    if int(n.value) < 1:
        raise _Unsupported
    return int(n.value)


def _shape(buffer: Buffer) -> tuple[Index, ...]:
    return tuple(_size(n) for n in buffer.shape)


def _known(*sizes: Index) -> bool:
    return all(isinstance(n, int) for n in sizes)


def _ceil(a: Index, b: int) -> Index:
    return math.ceil(a / b) if isinstance(a, int) else ceil_div(a, b)


def _stages(func: tirx.PrimFunc) -> list[_Stage]:
    """The operations of a function in order; each is one nest of loops around one block."""
    if not isinstance(func.body, SBlockRealize):
        raise _Unsupported
    body = func.body.block.body
    out = []
    for nest in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        while isinstance(nest, tirx.For):
            nest = nest.body
        if not isinstance(nest, SBlockRealize) or not isinstance(nest.block.body, tirx.BufferStore) or nest.block.alloc_buffers:
            raise _Unsupported
        block, store = nest.block, nest.block.body
        axes: dict[int, list[tuple[Expr, Index]]] = {tirx.IterVar.DataPar: [], tirx.IterVar.CommReduce: []}
        for v in block.iter_vars:
            if v.iter_type not in axes or not isinstance(v.dom.min, tirx.IntImm) or int(v.dom.min.value):
                raise _Unsupported
            axes[v.iter_type].append((v.var, _size(v.dom.extent)))
        spatial, reduced = axes[tirx.IterVar.DataPar], axes[tirx.IterVar.CommReduce]
        named = [v for v, _ in spatial] if store.indices else []  # a scalar's block has an axis of 1 that nothing names
        if len(store.indices) != len(named) or not all(i.same_as(v) for i, v in zip(store.indices, named)):
            raise _Unsupported
        stage = _Stage(store.buffer, tuple(spatial), store.value)
        if reduced:
            value = store.value
            if not (isinstance(value, _COMBINE) and isinstance(value.a, TensorLoad) and value.a.source.same_as(store.buffer)):
                raise _Unsupported
            neutral = block.init.value
            stage = replace(stage, value=value.b, reduced=tuple(reduced), combine=type(value), neutral=neutral)
        out.append(stage)
    return out


def _divides(index: Expr) -> bool:
    """Whether it holds a quotient or a remainder."""
    return isinstance(index, tirx.FloorDiv | tirx.FloorMod) or (
        isinstance(index, _BINARY) and (_divides(index.a) or _divides(index.b))
    )


class _Loops:
    """One function in the making."""

    def __init__(self, func: tirx.PrimFunc, name: str, threads: int) -> None:
        self.threads = threads
        self.kernel = k = Kernel(name)
        self.analyzer = tvm.sym.Analyzer()
        stages = _stages(func)
        self.plain = not any(s.reduced for s in stages) and not _known(*(n for s in stages for n in s.shape))
        """Elements of sizes that are not known, and no sum."""
        given = [p for p in func.params if isinstance(p.ty, tirx.BufferType)]
        if any(str(b.dtype) == "bfloat16" for b in [*given, *(s.buffer for s in stages)]):
            raise _Unsupported
        own = {}
        self.sizes: set[Expr] = set()
        for i, p in enumerate(func.params):
            if isinstance(p.ty, tirx.BufferType):
                own[p] = k.param(f"p{i}", _shape(p), p.dtype)
                self.sizes.update(x for n in p.shape for x in _parts(n) if isinstance(x, tirx.Var))
            else:
                k.sizes([p])
                self.sizes.add(p)
        self.flat = {b: k.flat(x) for b, x in own.items()}
        self.inlined = {s.buffer: s for s in stages if s.buffer not in self.flat and not s.reduced}
        """Buffers that do not come to be."""
        dear: set[Buffer] = set()
        """Those whose elements cost more to compute than to read."""
        for s in stages:  # what a reduction reads, or is dear, is not computed again for each element that reads it
            many = math.prod(s.shape) * math.prod(n for _, n in s.reduced)
            for b in {b for b in _reads(s.value) if b in self.inlined and (s.reduced or b in dear)}:
                if self._fewer(math.prod(_shape(b)), many):
                    del self.inlined[b]
            if _calls(s.value) or any(b in dear and b in self.inlined for b in _reads(s.value)):
                dear.add(s.buffer)
        for s in stages:
            if s.buffer not in self.flat and s.buffer not in self.inlined:
                self.flat[s.buffer] = k.scratch(maximum(math.prod(s.shape), 1), s.buffer.dtype)
        self.bound: list[tuple[Buffer, list[Expr], Expr]] = []
        """Elements of inlined buffers that the innermost loop has at hand."""
        self.reads = 0
        """Of inlined buffers, within the element in the making."""
        self.offsets: list[Expr] | None = None
        """Where operands are read, while that is being found out."""
        for s in stages:
            if s.buffer not in self.inlined:
                s = self._reshaped(s)
                (self._reduce if s.reduced else self._map)(s)

    def build(self) -> tirx.PrimFunc:
        return self.kernel.build()

    def _reshaped(self, s: _Stage) -> _Stage:
        """A stage that only gives an inlined one another shape is that one."""
        while not s.reduced and isinstance(s.value, TensorLoad) and s.value.source in self.inlined:
            source = self.inlined[s.value.source]
            if not self._equal(math.prod(source.shape), math.prod(s.shape), 0):
                break
            for v, n in s.spatial:
                self._range(v, n)
            here = self._offset(s.shape, [v for v, _ in s.spatial])
            if not self._equal(here, self._offset(source.shape, list(s.value.indices)), 0):
                break
            s = replace(source, buffer=s.buffer)
        return s

    # -- indices ------------------------------------------------------------------------------------------------------------
    def _range(self, v: Expr, n: Index) -> Expr:
        self.analyzer.bind(v, tvm.ir.Range(int64(0), int64(n)), True)
        return v

    def _fewer(self, a: Index, b: Index) -> bool:
        """Whether a < b, which of sizes that are not known is so unless they are equal."""
        return a < b if _known(a, b) else not self._equal(a, b, 0)

    def _moves(self, e: Expr) -> bool:
        """Whether it is another number from element to element."""
        return any(isinstance(x, tirx.Var) and x not in self.sizes for x in _parts(e))

    def _equal(self, a: Index, b: Index, difference: int) -> bool:
        found = self.analyzer.simplify(int64(a) - int64(b))
        return isinstance(found, tirx.IntImm) and int(found.value) == difference

    def _offset(self, shape: Sequence[Index], index: Sequence[Expr]) -> Expr:
        at = int64(0)
        for n, i in zip(shape, index):
            at = at * n + i
        return self.analyzer.simplify(at)

    def _split(self, at: Expr, shape: Sequence[Index]) -> list[Expr]:
        """The index of element number ``at``."""
        out: list[Expr] = []
        for axis in reversed(range(len(shape))):
            here = at if axis == 0 else floor_mod(at, shape[axis])
            out.append(self._range(self.kernel.let(here), shape[axis]))
            at = floor_div(at, shape[axis])
        return out[::-1]

    # -- values -------------------------------------------------------------------------------------------------------------
    def _value(self, e: Expr, env: dict[Expr, Expr], always: bool = True) -> Expr:
        """``e`` at the index that ``env`` gives; ``always``: it is evaluated whatever the data are."""
        if isinstance(e, tirx.Var):
            return env.get(e, e)
        if isinstance(e, tirx.IntImm | tirx.FloatImm):
            return e
        if isinstance(e, _BINARY):
            return type(e)(self._value(e.a, env, always), self._value(e.b, env, always))
        if isinstance(e, tirx.Not | tirx.BitwiseNot):
            return type(e)(self._value(e.a, env, always))
        if isinstance(e, tirx.Cast):
            return tirx.Cast(e.ty.dtype, self._value(e.value, env, always))
        if isinstance(e, tirx.Select):
            return tirx.Select(*(self._value(x, env, always) for x in (e.condition, e.true_value, e.false_value)))
        if isinstance(e, TensorLoad):
            return self._load(e.source, [self._value(i, env, always) for i in e.indices], always)
        if isinstance(e, Call):
            name = e.op.name
            if name == "prim.if_then_else":
                condition = self.analyzer.simplify(self._value(e.args[0], env, always))
                return tirx.if_then_else(condition, *(self._value(x, env, False) for x in e.args[1:]))
            args = [self._value(x, env, always) for x in e.args]
            if always and name in _MATH and str(e.ty.dtype) == "float32" and self.offsets is None:
                return _MATH[name](self.kernel, self.kernel.let(args[0]))
            return Call(e.op, args, e.attrs, e.ty_args, ret_ty=e.ty)
        raise _Unsupported

    def _load(self, buffer: Buffer, index: list[Expr], always: bool) -> Expr:
        if buffer not in self.inlined:
            at = self._offset(_shape(buffer), index)
            if self.offsets is not None:
                self.offsets.append(at)
            elif self.plain and any(isinstance(x, tirx.FloorDiv | tirx.FloorMod) and self._moves(x.a) for x in _parts(at)):
                raise _Unsupported
            elif _divides(at):  # TVM's FlattenBuffer loses the 2 of (i + 2 - j) // 3 where it knows that i is 0
                at = self.kernel.let(at)
            return load(self.flat[buffer], at)
        self.reads += 1
        if self.reads > _MOST:
            raise _Unsupported
        index = [self.analyzer.simplify(i) for i in index]
        for b, i, value in self.bound:
            if b.same_as(buffer) and all(map(tvm_ffi.structural_equal, i, index)):
                return value
        stage = self.inlined[buffer]
        value = self._value(stage.value, {v: i for (v, _), i in zip(stage.spatial, index)}, always)
        if always and self.offsets is None:
            value = self._once(value)
            self.bound.append((buffer, index, value))
        return value

    def _once(self, value: Expr) -> Expr:
        """``value``, computed here. Passes that narrow indices or widen bf16 change the types of variables, not of memory."""
        if str(value.ty.dtype) in ("float32", "float64"):
            return self.kernel.let(value)
        place = self.kernel.registers(1, str(value.ty.dtype), 1)
        self.kernel.store(place, 0, value)
        return load(place, 0)

    def _element(self, s: _Stage, spatial: Sequence[Expr], reduced: Sequence[Expr] = ()) -> Expr:
        """The value of a stage at an index, in a loop of its own."""
        self.bound, self.reads = [], 0
        return self._value(s.value, {v: i for (v, _), i in zip((*s.spatial, *s.reduced), (*spatial, *reduced))})

    def _strides(self, s: _Stage, axis: int) -> int:
        """How many operands are contiguous along an axis (of the spatial and reduced ones)."""
        axes = (*s.spatial, *s.reduced)
        if not axes:
            return 0
        places = []
        for step in (0, 1):
            self.offsets, self.reads = [], 0
            moved = axis % len(axes)
            self._value(s.value, {v: self._range(v, n) + (step if i == moved else 0) for i, (v, n) in enumerate(axes)})
            places.append(self.offsets)
        self.offsets = None
        return sum(self._equal(b, a, 1) for a, b in zip(*places))

    # -- loops --------------------------------------------------------------------------------------------------------------
    def _nest(self, stack: ExitStack, extents: Sequence[Index]) -> list[Expr]:
        """Nested loops."""
        return [self._range(stack.enter_context(self.kernel.loop(n)), n) for n in extents]

    def _units(self, total: Index, work: Index, body: Callable[[Expr], None]) -> None:
        """``body`` for each of ``total`` units, on all threads if it is worth it."""

        def part(first: Expr, last: Expr) -> None:
            with self.kernel.range(first, last) as unit:
                body(self._range(unit, total))

        if _known(total, work):
            self.kernel.share(self.threads if total > 1 and work >= _WORK else 1, total, part)
        else:
            alone, shared = (partial(self.kernel.share, threads, total, part) for threads in (1, self.threads))
            self.kernel.either(work < _WORK, alone, shared)

    def _map(self, s: _Stage) -> None:
        shape, rank = s.shape, len(s.shape)
        cut = max(rank - 1, 0)
        while cut and _known(*shape[cut:]) and math.prod(shape[cut:]) < _INNER:
            cut -= 1
        outer, inner = math.prod(shape[:cut]), shape[cut:]
        width: Index = inner[0] if inner else 1  # of what one unit does of the first inner axis
        if not _known(width):
            width = math.ceil(_WORK / math.prod(inner[1:]))
        elif _known(outer) and outer < 4 * self.threads and math.prod(inner) >= 2 * _INNER:
            width = math.ceil(width / (4 * self.threads))
            width = math.ceil(width / _LANES) * _LANES if len(inner) == 1 else width
        blocks = _ceil(inner[0], width) if inner else 1

        def unit(at: Expr) -> None:
            block = self._range(self.kernel.let(floor_mod(at, blocks)), blocks)
            index = self._split(floor_div(at, blocks), shape[:cut])
            with ExitStack() as stack:
                start = block * width
                extents: list[Any] = list(inner)
                several = not _known(blocks) or blocks > 1
                if several:
                    even = _known(inner[0]) and inner[0] % width == 0
                    extents[0] = width if even else self.kernel.let(minimum(width, inner[0] - start))
                loops = self._nest(stack, extents)
                if several:
                    self._range(loops[0], width)
                    loops[0] = start + loops[0]
                index += loops
                value = self._element(s, index)
                self.kernel.store(self.flat[s.buffer], self._offset(shape, index), value)

        self._units(outer * blocks, math.prod(shape), unit)

    def _reduce(self, s: _Stage) -> None:
        along, across = self._strides(s, -1), self._strides(s, len(s.spatial) - 1) if s.spatial else 0
        if across >= along and across and not (_known(s.shape[-1]) and s.shape[-1] == 1):
            self._columns(s)
        else:
            self._rows(s)

    def _rows(self, s: _Stage) -> None:
        """A reduction whose last axis is contiguous: a row of partial results side by side."""
        k, shape, extents = self.kernel, s.shape, [n for _, n in s.reduced]
        length = extents[-1]
        whole, rest = divmod(length, _LANES) if isinstance(length, int) else (f(length, _LANES) for f in (floor_div, floor_mod))

        def unit(at: Expr) -> None:
            index = self._split(at, shape)
            acc = k.registers(_LANES, s.buffer.dtype, 1)
            with k.loop(_LANES) as j:
                k.store(acc, j, s.neutral)
            with ExitStack() as stack:
                outer = self._nest(stack, extents[:-1])
                if not _known(whole) or whole:
                    with k.loop(whole) as i, k.loop(_LANES) as j:
                        self._range(i, whole)
                        last = i * _LANES + self._range(j, _LANES)
                        k.store(acc, j, s.combine(load(acc, j), self._element(s, index, [*outer, last])))
                if not _known(rest) or rest:
                    with k.loop(rest) as j:
                        last = self._range(j, rest) + whole * _LANES
                        k.store(acc, j, s.combine(load(acc, j), self._element(s, index, [*outer, last])))
            parts = [load(acc, j) for j in range(_LANES)]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [k.let(s.combine(a, b)) for a, b in zip(parts[:half], parts[half:])]
            k.store(self.flat[s.buffer], self._offset(shape, index), parts[0])

        self._units(math.prod(shape), math.prod(shape) * math.prod(extents), unit)

    def _columns(self, s: _Stage) -> None:
        """A reduction whose result's last axis is contiguous: columns side by side."""
        k, shape, extents = self.kernel, s.shape, [n for _, n in s.reduced]
        outer, columns = math.prod(shape[:-1]), shape[-1]
        if _known(columns):
            blocks: Index = max(math.ceil(columns / _WIDTH), 2 * self.threads if _known(outer) and outer < self.threads else 1)
            width = min(columns, math.ceil(columns / blocks / _LANES) * _LANES)
        else:
            width = _WIDTH
        blocks = _ceil(columns, width)

        def unit(at: Expr) -> None:
            block = self._range(k.let(floor_mod(at, blocks)), blocks)
            index = self._split(floor_div(at, blocks), shape[:-1])
            start = block * width
            extent = width if _known(columns) and columns % width == 0 else k.let(minimum(width, columns - start))
            acc = k.registers(width, s.buffer.dtype, 1)
            with k.loop(extent) as j:
                k.store(acc, j, s.neutral)
            with ExitStack() as stack:
                reduced = self._nest(stack, extents)
                with k.loop(extent) as j:
                    value = self._element(s, [*index, start + self._range(j, width)], reduced)
                    k.store(acc, j, s.combine(load(acc, j), value))
            with k.loop(extent) as j:
                to = self._offset(shape, [*index, start + self._range(j, width)])
                k.store(self.flat[s.buffer], to, load(acc, j))

        self._units(outer * blocks, math.prod(shape) * math.prod(extents), unit)


def _parts(e: Expr) -> Iterator[Expr]:
    """An expression and all within it."""
    yield e
    names = ("a", "b", "value", "condition", "true_value", "false_value")
    within = e.indices if isinstance(e, TensorLoad) else e.args if isinstance(e, Call) else (
        () if isinstance(e, tirx.Var | tirx.IntImm | tirx.FloatImm) else [getattr(e, n) for n in names if hasattr(e, n)]
    )  # fmt: skip
    for x in within:
        yield from _parts(x)


def _reads(e: Expr) -> list[Buffer]:
    """The buffers that an expression reads."""
    return [x.source for x in _parts(e) if isinstance(x, TensorLoad)]


def _calls(e: Expr) -> bool:
    """Whether a function of numbers is in an expression."""
    return any(isinstance(x, Call) and x.op.name != "prim.if_then_else" for x in _parts(e))


_MATH: dict[str, Callable[[Kernel, Expr], Expr]] = {
    "tirx.exp": exact_exp, "tirx.sigmoid": exact_sigmoid, "tirx.tanh": exact_tanh, "tirx.erf": exact_erf,
}  # fmt: skip
