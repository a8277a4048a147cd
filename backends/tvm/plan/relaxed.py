"""A Relax module whose functions call kernels, to steps: one list for an entry, what it calls written out in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from wasat.ir import DimLike, IRError, symbol
from wasat.ir.dims import substitute

from ..ops.cond import EQUAL
from ..ops.scan import LOOP
from .kernels import Function, Functions
from .labels import Labels
from .sizes import size_of
from .steps import Array, Branch, Check, Copy, Entry, Kind, Label, Loop, Run, Step


class Tensor:
    """An array under a shape."""

    def __init__(self, array: Array, shape: Sequence[DimLike]) -> None:
        self.array, self.shape = array, tuple(shape)


class Constants:
    """Arrays that the module holds, each once."""

    def __init__(self) -> None:
        self.arrays: list[tuple[str, np.ndarray]] = []
        self._known: dict[tuple[str, bytes], int] = {}

    def add(self, dtype: str, x: np.ndarray) -> int:
        key = dtype, x.tobytes()
        if key not in self._known:
            self._known[key] = len(self.arrays)
            self.arrays.append((dtype, x))
        return self._known[key]


class Reader:
    """Reads the entries of one module."""

    def __init__(self, module: tvm.IRModule, functions: Functions, labels: Labels) -> None:
        self.module, self.functions, self.labels = module, functions, labels
        self.constants = Constants()

    def entry(self, name: str, given: Sequence[tuple[Kind, str]], returned: Sequence[str]) -> Entry:
        """The steps of a function that takes ``given`` and returns ``returned``: a name of a state is its new value."""
        f = self.module[name]
        symbols: dict[Any, DimLike] = {}
        told = []
        for i, p in enumerate(f.params):
            for axis, d in enumerate(p.ty.shape.values):
                if type(d).__name__ == "Var" and d not in symbols:
                    symbols[d] = symbol(d.name)
                    told.append((d.name, i, axis))
        args = []
        for p, (kind, own) in zip(f.params, given, strict=True):
            dims = [size_of(d, symbols) for d in p.ty.shape.values]
            args.append(Tensor(Array(_dtype(p.ty), _product(dims), kind, own), dims))
        body = _Body(self, symbols, [])
        results = dict(zip(returned, _flat(body.call(f, args)), strict=True))
        states = {x.array.name: x for x in args if x.array.kind == "state"}
        pairs = [(x.array, states[n].array) for n, x in results.items() if n in states]
        written = {id(to) for source, to in pairs if source is not to}
        outputs = []
        for n, x in results.items():
            if n in states:
                continue
            kept = x.array
            if id(kept.root()) in written:  # what the state was
                kept = Array(kept.dtype, kept.count)
                body.steps.append(Copy(x.array, kept))
            outputs.append((n, kept, x.shape))
        _assign(body.steps, pairs)
        return Entry([(a.array, a.shape) for a in args], outputs, [s.array for s in states.values()], body.steps, told)


class _Body:
    """One function, written out into ``steps``."""

    def __init__(self, reader: Reader, symbols: dict[Any, DimLike], steps: list[Step]) -> None:
        self.reader, self.symbols, self.steps = reader, symbols, steps
        self.vars: dict[Any, Any] = {}

    def call(self, f: relax.Function, args: Sequence[Any]) -> Any:
        for p, x in zip(f.params, args, strict=True):
            self.vars[p] = x
            told = zip(p.ty.values, x) if isinstance(x, list) else zip(p.ty.shape.values, x.shape)
            for d, n in told:
                if type(d).__name__ == "Var":
                    self.symbols.setdefault(d, n)
        return self.sequence(f.body)

    def sequence(self, body: Any) -> Any:
        if isinstance(body, relax.SeqExpr):
            for block in body.blocks:
                for binding in block.bindings:
                    if isinstance(binding, relax.MatchCast):
                        x = self.value(binding.value)
                        self.vars[binding.var] = Tensor(x.array, self.sizes(binding.ty.shape.values))
                    else:
                        self.vars[binding.var] = self.bound(binding.var, binding.value)
            body = body.body
        return self.value(body)

    def sizes(self, dims: Sequence[Any]) -> list[DimLike]:
        return [size_of(d, self.symbols) for d in dims]

    def value(self, e: Any) -> Any:
        if isinstance(e, relax.Var) and e in self.vars:
            return self.vars[e]
        if isinstance(e, relax.Tuple):
            return tuple(self.value(x) for x in e.fields)
        if isinstance(e, relax.TupleGetItem):
            return self.value(e.tuple_value)[e.index]
        if isinstance(e, relax.ShapeExpr):
            return self.sizes(e.values)
        if isinstance(e, tvm.ir.GenericConst):
            x = e.value.numpy()
            array = Array(_dtype(e.ty), x.size, "constant", number=self.reader.constants.add(_dtype(e.ty), np.asarray(x)))
            return Tensor(array, x.shape)
        if isinstance(e, relax.Call):
            return self.bound(None, e)
        return size_of(e, self.symbols)

    def bound(self, var: Any, e: Any) -> Any:
        """The value of what a variable is bound to."""
        if isinstance(e, relax.If):
            return self.branch(e)
        if not isinstance(e, relax.Call):
            return self.value(e)
        if isinstance(e.op, tvm.ir.GlobalVar):
            return self.inner(e)
        name = e.op.global_symbol if isinstance(e.op, relax.ExternFunc) else e.op.name
        if name == "relax.call_pure_packed":
            name, e = e.args[0].global_symbol, relax.Call(e.args[0], e.args[1:])
        match name:
            case "relax.call_tir":
                return self.kernel(var, e, [-1] * len(_types(e.ty_args[0])))
            case "relax.call_tir_inplace":
                return self.kernel(var, e, [int(i) for i in e.attrs.inplace_indices])
            case "relax.reshape" | "vm.builtin.reshape":
                return Tensor(self.value(e.args[0]).array, self.value(e.args[1]))
            case "relax.builtin.alloc_tensor":
                shape = self.value(e.args[0])
                return Tensor(Array(str(e.args[1].value), _product(shape)), shape)
        if name == EQUAL:
            where, needs = (str(x.value) for x in e.args[:2])
            left, right = (self.value(x) for x in e.args[2:])
            self.steps.append(Check(left, right, needs, where))
            return ()
        raise IRError(f"{name} has no kernel for this target")

    def kernel(self, var: Any, e: Any, inplace: Sequence[int]) -> Any:
        name = e.args[0].name_hint
        args = [self.value(x) for x in e.args[1].fields]
        if len(e.args) > 2:
            args += self.value(e.args[2])
        types, results = _types(e.ty_args[0]), []
        for t, at in zip(types, inplace, strict=True):
            shape = self.sizes(t.shape.values)
            results.append(Tensor(Array(_dtype(t), _product(shape), of=None if at < 0 else args[at].array), shape))
        label = self.reader.labels.of(var.name if var is not None else "", name)
        for made, at in zip(results, inplace):
            if at >= 0:  # that the kernel reads and writes; laid out in one place, or copied before
                self.steps.append(Copy(args[at].array, made.array))
        passed = list(args)
        for made, at in zip(results, inplace):
            if at >= 0:
                passed[at] = made
            else:
                passed.append(made)
        if any(r.array.count != 0 for r in results):
            self.launch(self.reader.functions[name], passed, label)
        return results[0] if isinstance(e.ty_args[0], relax.TensorType) else tuple(results)

    def launch(self, f: Function, args: Sequence[Any], label: Label) -> None:
        sizes: dict[str, DimLike] = {}
        for names, x in zip(f.parameters, args, strict=True):
            if isinstance(names, str):
                sizes[names] = x
            else:
                sizes |= {n: d for n, d in zip(names, x.shape) if n is not None}
        arrays = [x.array if isinstance(x, Tensor) else None for x in args]
        arrays += [Array(dtype, substitute(count, sizes)) for dtype, count in f.temporaries]
        for one in f.launches:
            gx, gy, gz = (substitute(d, sizes) for d in one.grid)
            taken = [arrays[i] for i in one.buffers]
            assert all(a is not None for a in taken)
            scalars = [substitute(d, sizes) for d in one.scalars]
            self.steps.append(Run(one.kernel, (gx, gy, gz), [a for a in taken if a is not None], scalars, label))

    def inner(self, e: Any) -> Any:
        """A call of another function of the module."""
        f = self.reader.module[e.op]
        args = [self.value(x) for x in e.args]
        if f.attrs is not None and LOOP in f.attrs:
            return self.loop(f, args, bool(f.attrs[LOOP]))
        return _Body(self.reader, {}, self.steps).call(f, args)

    def loop(self, f: relax.Function, args: list[Any], reverse: bool) -> Any:
        """A function that is called for each number of a range, the first two of its sizes: it returns what it changes of its
        operands, which come first."""
        (low, high, *sizes), *operands = args
        changed = len(f.ret_ty.fields)
        name = self.reader.labels.fresh()
        # what turns carry has a place of its own, unless nothing needs what is there
        carried = [Tensor(Array(x.array.dtype, x.array.count, of=x.array), x.shape) for x in operands[:changed]]
        for x, c in zip(operands, carried):
            self.steps.append(Copy(x.array, c.array))
        count = high - low
        turn = low + (count - 1 - symbol(name) if reverse else symbol(name))
        steps: list[Step] = []
        body = _Body(self.reader, {}, steps)
        results = _flat(body.call(f, [[turn, turn + 1, *sizes], *carried, *operands[changed:]]))
        _assign(steps, [(r.array, c.array) for r, c in zip(results, carried)])
        self.steps.append(Loop(name, count, steps, [c.array for c in carried]))
        return tuple(carried)

    def branch(self, e: Any) -> Any:
        condition = self.value(e.cond)
        sides: list[tuple[list[Step], Any]] = []
        for side in (e.true_branch, e.false_branch):
            steps: list[Step] = []
            body = _Body(self.reader, dict(self.symbols), steps)
            body.vars = dict(self.vars)
            sides.append((steps, body.sequence(side)))
        if not isinstance(condition, Tensor):
            raise IRError("a launch plan has no form for a choice between sizes")
        (then, a), (otherwise, b) = sides
        results = [Tensor(Array(x.array.dtype, x.array.count), x.shape) for x in _flat(a)]
        for steps, made in ((then, a), (otherwise, b)):
            for x, r in zip(_flat(made), results):
                steps.append(Copy(x.array, r.array))
        self.steps.append(Branch(condition.array, then, otherwise))
        return tuple(results)


def _assign(steps: list[Step], pairs: Sequence[tuple[Array, Array]]) -> None:
    """Copies, as if all were made at once."""
    targets = {id(to) for source, to in pairs if source is not to}
    held = []
    for source, to in pairs:
        over = source  # the array among these that it may be written over
        while id(over) not in targets and over.of is not None:
            over = over.of
        if over is not to and id(over) in targets:
            kept = Array(source.dtype, source.count)
            steps.append(Copy(source, kept))
            source = kept
        held.append((source, to))
    steps.extend(Copy(a, b) for a, b in held if a is not b)


def _flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for part in x for y in _flat(part)]


def _types(t: Any) -> list[Any]:
    return list(t.fields) if isinstance(t, relax.TupleType) else [t]


def _dtype(t: Any) -> str:
    return str(t.dtype)


def _product(dims: Sequence[DimLike]) -> DimLike:
    total: DimLike = 1
    for d in dims:
        total = total * d
    return total
