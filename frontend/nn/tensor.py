"""Symbolic tensors: Python expressions over them append operations to the graph that is being traced."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, EllipsisType, FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, Union

import numpy as np
from wasat.ir import Dim, DimLike, DType, Loc, TypeMismatch
from wasat.ir.dims import floordiv

from wasat import ir

Operand = Union["Tensor", int, float, bool, Dim, np.ndarray, np.generic]
Index: TypeAlias = int | Dim | slice | EllipsisType | None

_PACKAGE = str(Path(__file__).parent)
_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


class Trace:
    """One run of ``nn.trace``: the graph under construction, the names of parameters and modules, where we are."""

    def __init__(self, graph: ir.Graph, root: str, bottom: CodeType, training: bool) -> None:
        self.graph = graph
        self.builder = ir.Builder(graph)
        self.root = root
        self.training = training
        self.parameter_names: dict[int, str] = {}
        self.module_paths: dict[int, str] = {}
        self.scope: list[tuple[int, str]] = []
        """``(id, path)`` of the modules being called, outermost first."""
        self.draws: dict[ir.Value, int] = {}
        """How many calls of dropout were given each key."""
        self._bottom = bottom
        self._locs: dict[Loc, Loc] = {}
        self.outer: Trace | None = None
        """The trace around that of a loop's body."""
        self.captured: dict[ir.Value, ir.Value] = {}
        """Values around the body that it reads, and the inputs that stand for them in it."""

    def body(self, name: str) -> Trace:
        """A trace of a loop's body within this one."""
        inner = Trace(ir.Graph(name), self.root, self._bottom, self.training)
        inner.parameter_names, inner.module_paths, inner.scope = self.parameter_names, self.module_paths, self.scope
        inner.draws = self.draws
        inner.outer = self
        return inner

    def inside(self, x: Tensor) -> ir.Value | None:
        """The value of a tensor of this trace or one around it; None for any other."""
        if x.trace is self:
            return x.value
        v = self.outer.inside(x) if self.outer is not None else None
        if v is not None and v not in self.captured:
            self.captured[v] = self.graph.add_input(v.name, v.type, unique=True)
        return self.captured[v] if v is not None else None

    @property
    def path(self) -> str:
        """Attribute path of the innermost module being called; empty for the root."""
        return self.scope[-1][1] if self.scope else ""

    def here(self) -> Loc | None:
        """The user's line: the innermost frame outside this package, with the chain of callers up to ``nn.trace``'s."""
        places: list[tuple[str, int, str]] = []
        frame: FrameType | None = sys._getframe(1)
        below = False
        while frame is not None:
            code = frame.f_code
            if not code.co_filename.startswith(_PACKAGE):
                place = (code.co_filename, frame.f_lineno, code.co_qualname)
                if not places or places[-1][:2] != place[:2]:
                    places.append(place)
                if below:
                    break
            below = below or code is self._bottom
            frame = frame.f_back
        loc: Loc | None = None
        for i, (file, line, function) in reversed(list(enumerate(places))):
            loc = Loc(file, line, function, "" if i else self.path, loc)
            loc = self._locs.setdefault(loc, loc)
        return loc


def current(what: str = "a tensor operation") -> Trace:
    """The trace that is running; an error naming ``what`` if none is."""
    t = _current.get()
    if t is None:
        raise ir.IRError(f"{what} is possible only while nn.trace runs the module: tensors are symbolic, they hold no data")
    return t


def fail(message: str) -> NoReturn:
    """Raises TypeMismatch at the user's line."""
    t = _current.get()
    raise TypeMismatch(message, t.here() if t is not None else None)


def emit(op: str, *operands: Operand, name: str | None = None, **attrs: Any) -> Any:
    """Applies operation ``op`` of the IR; returns a Tensor, or the tuple of them where it has several outputs.

    Python numbers take the element type of the tensors beside them; a dimension becomes its value in that type.
    """
    t = current(f"nn.{op}")
    t.builder.loc = t.here()
    out = t.builder.emit(op, *_values(t, op, operands), name=name, **attrs)
    return Tensor(t, out) if isinstance(out, ir.Value) else tuple(Tensor(t, v) for v in out)


def _values(t: Trace, op: str, operands: Sequence[Operand]) -> list[Any]:
    dtypes = [x.dtype for x in operands if isinstance(x, Tensor)]
    weak = next((d for d in dtypes if d is not DType.BOOL), DType.I64)
    out: list[Any] = []
    for x in operands:
        if isinstance(x, Tensor):
            value = t.inside(x)
            if value is None:
                fail(f"{op}: {x!r} belongs to another trace; a tensor lives only inside the nn.trace call that made it")
            out.append(value)
        elif isinstance(x, Dim):
            out.append(t.builder.dim_size(size=x, dtype=weak))
        elif isinstance(x, (int, float, np.ndarray, np.generic)):
            out.append(x)
        else:
            fail(f"{op}: an operand is a Tensor, a number, a dimension or a NumPy array, not {type(x).__name__} {x!r}")
    return out


def _binary(op: str, x: Operand, y: Operand) -> Tensor:
    for tensor, array in ((x, y), (y, x)):
        if isinstance(tensor, Tensor) and isinstance(array, np.ndarray) and array.dtype != tensor.dtype.np:
            fail(
                f"{op}: an array of {array.dtype} meets {tensor.value!r}, and nothing is converted silently; "
                f"convert the array: .astype(np.{tensor.dtype.np.name})"
            )
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype is not y.dtype:
        a, b = (x, y) if y.dtype is DType.F32 or not x.dtype.is_float else (y, x)
        fail(
            f"{op}({x.value!r}, {y.value!r}): element types differ, {x.dtype} and {y.dtype}, and nothing is converted "
            f'silently; cast one: .cast("{b.dtype}") on the {a.dtype} tensor'
        )
    return emit(op, x, y)


class Tensor:
    """A symbolic tensor: an ``ir.Value`` with Python's operators. Shapes hold ints and symbolic dimensions."""

    def __init__(self, trace: Trace, value: ir.Value) -> None:
        self._trace, self._value = trace, value

    @property
    def trace(self) -> Trace:
        return self._trace

    @property
    def value(self) -> ir.Value:
        """The value in the graph."""
        return self._value

    @property
    def type(self) -> ir.TensorType:
        return self.value.tensor

    @property
    def shape(self) -> tuple[DimLike, ...]:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.value!r})"

    # -- arithmetic ----------------------------------------
    def __add__(self, other: Operand) -> Tensor:
        return _binary("add", self, other)

    def __radd__(self, other: Operand) -> Tensor:
        return _binary("add", other, self)

    def __sub__(self, other: Operand) -> Tensor:
        return _binary("sub", self, other)

    def __rsub__(self, other: Operand) -> Tensor:
        return _binary("sub", other, self)

    def __mul__(self, other: Operand) -> Tensor:
        return _binary("mul", self, other)

    def __rmul__(self, other: Operand) -> Tensor:
        return _binary("mul", other, self)

    def __truediv__(self, other: Operand) -> Tensor:
        return _divide(self, other)

    def __rtruediv__(self, other: Operand) -> Tensor:
        return _divide(other, self)

    def __floordiv__(self, other: Operand) -> Tensor:
        return _binary("floor_div", self, other)

    def __rfloordiv__(self, other: Operand) -> Tensor:
        return _binary("floor_div", other, self)

    def __mod__(self, other: Operand) -> Tensor:
        return _binary("mod", self, other)

    def __rmod__(self, other: Operand) -> Tensor:
        return _binary("mod", other, self)

    def __pow__(self, other: Operand) -> Tensor:
        return _binary("pow", self, other)

    def __rpow__(self, other: Operand) -> Tensor:
        return _binary("pow", other, self)

    def __matmul__(self, other: Tensor) -> Tensor:
        return _binary("matmul", self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return _binary("matmul", other, self)

    def __neg__(self) -> Tensor:
        return emit("neg", self)

    def __abs__(self) -> Tensor:
        return emit("abs", self)

    # -- comparison and logic ----------------------------------------
    __hash__ = object.__hash__

    def __eq__(self, other: Operand) -> Tensor:  # type: ignore[override]
        return _binary("equal", self, other)

    def __ne__(self, other: Operand) -> Tensor:  # type: ignore[override]
        return _binary("not_equal", self, other)

    def __lt__(self, other: Operand) -> Tensor:
        return _binary("less", self, other)

    def __le__(self, other: Operand) -> Tensor:
        return _binary("less_equal", self, other)

    def __gt__(self, other: Operand) -> Tensor:
        return _binary("greater", self, other)

    def __ge__(self, other: Operand) -> Tensor:
        return _binary("greater_equal", self, other)

    def _logic(self, op: str, other: Operand) -> Tensor:
        if isinstance(other, Tensor) and (self.dtype is DType.BOOL) is not (other.dtype is DType.BOOL):
            fail(f"{op}: {self.value!r} and {other.value!r}: only one is a bool mask; compare the other with something first")
        return _binary(("logical_" if self.dtype is DType.BOOL else "bit_") + op, self, other)

    def __and__(self, other: Operand) -> Tensor:
        return self if other is True else self._logic("and", other)

    def __or__(self, other: Operand) -> Tensor:
        return self if other is False else self._logic("or", other)

    def __xor__(self, other: Operand) -> Tensor:
        return self._logic("xor", other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> Tensor:
        return emit("logical_not" if self.dtype is DType.BOOL else "bit_not", self)

    # -- what a symbolic tensor cannot do ----------------------------------------
    def _refuse(self, what: str, instead: str) -> NoReturn:
        fail(f"{what} of {self.value!r} is not known while tracing: it depends on the data. {instead}")

    def __bool__(self) -> bool:
        self._refuse("the truth", "Choose between tensors with nn.where(condition, x, y); combine masks with & | ~")

    def __int__(self) -> int:
        self._refuse("the value", "Keep it a tensor; sizes are in x.shape, whose entries may be symbolic")

    def __float__(self) -> float:
        self._refuse("the value", "Keep it a tensor")

    def __index__(self) -> int:
        self._refuse("the value", "Index with nn.gather(x, indices, axis=…)")

    def __iter__(self) -> NoReturn:
        fail(f"{self.value!r} cannot be iterated or unpacked; take parts with x.split(n, axis=…) or x[:, i]")

    def __contains__(self, item: object) -> bool:
        self._refuse("the content", "Use (x == item) and reduce with .any()")

    def __len__(self) -> int:
        n = self.shape[0] if self.rank else fail(f"{self.value!r} is a scalar and has no length")
        return n if isinstance(n, int) else fail(f"the length of {self.value!r} is symbolic; use x.shape[0]")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Tensor:
        """``array + tensor`` and the like; any other NumPy function is refused."""
        op = _UFUNCS.get(ufunc.__name__)
        if op is None or method != "__call__" or kwargs:
            fail(f"np.{ufunc.__name__} cannot compute with {self.value!r}, which is symbolic; use nn.{ufunc.__name__}")
        return _divide(*inputs) if op == "div" else _binary(op, *inputs)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        fail(f"NumPy cannot compute with {self.value!r}, which is symbolic; use the function of the same name in nn")

    # -- shape ----------------------------------------
    def reshape(self, *shape: DimLike) -> Tensor:
        """The same elements in another shape; one entry may be -1."""
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        for d in shape:
            if isinstance(d, bool) or not isinstance(d, (int, Dim)):
                fail(f"reshape of {self.value!r}: a size is an int or a dimension, not {d!r}; divide sizes with //")
        if any(isinstance(d, int) and d == -1 for d in shape):
            rest: DimLike = 1
            for d in shape:
                rest = rest if isinstance(d, int) and d == -1 else rest * d
            free = floordiv(self.type.size, rest) if rest != 0 else 0
            if ir.equal(free * rest, self.type.size) is not True:
                fail(f"reshape of {self.value!r} to {shape}: {self.type.size} elements are not a multiple of {rest}")
            shape = tuple(free if isinstance(d, int) and d == -1 else d for d in shape)
        before, after = _apart(self.shape, shape)  # that b * 64 and b * 60 are equal for b = 0 is not what is meant
        if ir.equal(before, after) is False:
            fail(f"reshape of {self.value!r} to ({', '.join(map(str, shape))}): {before} elements do not make {after}")
        return emit("reshape", self, shape=shape)

    def transpose(self, *perm: int) -> Tensor:
        """Axes in the order ``perm``."""
        return emit("transpose", self, perm=tuple(self._axis(p) for p in perm))

    def swap(self, a: int, b: int) -> Tensor:
        """Axes ``a`` and ``b`` exchanged."""
        perm = list(range(self.rank))
        perm[self._axis(a)], perm[self._axis(b)] = perm[self._axis(b)], perm[self._axis(a)]
        return self.transpose(*perm)

    @property
    def T(self) -> Tensor:
        """The last two axes exchanged."""
        return self.swap(-1, -2)

    def broadcast_to(self, *shape: DimLike) -> Tensor:
        """Stretched to ``shape``: axes of size 1, and new leading ones."""
        return emit("broadcast_to", self, shape=shape)

    def cast(self, dtype: DType | str) -> Tensor:
        """Elements converted to ``dtype``; itself if they are of it already."""
        try:
            dtype = DType.of(dtype)
        except ir.IRError as e:
            fail(f"cast of {self.value!r}: {e.message}")
        return self if self.dtype is dtype else emit("cast", self, dtype=dtype)

    def heads(self, n: DimLike) -> Tensor:
        """``[..., n*d] -> [..., n, d]``."""
        width = self.shape[self._axis(-1)]
        each = floordiv(width, n)
        if ir.equal(each * n, width) is not True:
            fail(f"{self.value!r}: the last axis, {width}, does not split into {n} heads")
        return self.reshape(*self.shape[:-1], n, each)

    def merge(self) -> Tensor:
        """``[..., h, d] -> [..., h*d]``: the inverse of :meth:`heads`."""
        self._axis(-2)
        return self.reshape(*self.shape[:-2], self.shape[-2] * self.shape[-1])

    def split(self, parts: int | Sequence[DimLike], axis: int = -1) -> tuple[Tensor, ...]:
        """Cut along ``axis`` into ``parts`` equal pieces, or into pieces of the given sizes."""
        axis = self._axis(axis)
        size = self.shape[axis]
        if isinstance(parts, int):
            each = floordiv(size, parts)
            if ir.equal(each * parts, size) is not True:
                fail(f"{self.value!r}: axis {axis} of size {size} does not split into {parts} equal parts")
            sizes: list[DimLike] = [each] * parts
        else:
            sizes = list(parts)
            if ir.equal(sum(sizes, 0), size) is not True:
                fail(f"{self.value!r}: parts of {', '.join(map(str, sizes))} do not make up axis {axis} of size {size}")
        out, at = [], 0  # type: list[Tensor], DimLike
        for n in sizes:
            out.append(self._slice(axis, at, at + n))
            at = at + n
        return tuple(out)

    def _axis(self, axis: int) -> int:
        if not -self.rank <= axis < self.rank:
            fail(f"{self.value!r} has no axis {axis}")
        return axis % self.rank

    def _slice(self, axis: int, start: DimLike, stop: DimLike) -> Tensor:
        starts: list[DimLike] = [0] * self.rank
        stops = list(self.shape)
        starts[axis], stops[axis] = start, stop
        return emit("slice", self, starts=tuple(starts), stops=tuple(stops))

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Tensor:
        """NumPy's basic indexing: ints, slices (with symbolic dimensions too), None, Ellipsis."""
        from .indexing import take

        return take(self, index if isinstance(index, tuple) else (index,))

    def __setitem__(self, index: object, value: object) -> NoReturn:
        fail(f"{self.value!r} cannot be assigned to, tensors are values; make a new one with nn.where or nn.concat")

    if not TYPE_CHECKING:  # a type checker reports unknown attributes itself

        def __getattr__(self, name: str) -> NoReturn:
            from wasat.frontend import nn

            instead = _INSTEAD.get(name) or (f"nn.{name}(x)" if name in nn.__all__ else None)
            raise AttributeError(f"a Tensor has no {name!r}" + (f"; use {instead}" if instead else ""), name=name, obj=self)

    # -- reductions ----------------------------------------
    def _reduce(self, op: str, axis: int | Sequence[int] | None, keepdims: bool) -> Tensor:
        axes = range(self.rank) if axis is None else [axis] if isinstance(axis, int) else axis
        return emit(op, self, axes=tuple(self._axis(a) for a in axes), keepdims=keepdims)

    def sum(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Sum over ``axis`` (default: all)."""
        return self._reduce("reduce_sum", axis, keepdims)

    def mean(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Mean over ``axis`` (default: all)."""
        return self._reduce("reduce_mean", axis, keepdims)

    def max(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Largest over ``axis`` (default: all)."""
        return self._reduce("reduce_max", axis, keepdims)

    def min(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Smallest over ``axis`` (default: all)."""
        return self._reduce("reduce_min", axis, keepdims)

    def prod(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Product over ``axis`` (default: all)."""
        return self._reduce("reduce_prod", axis, keepdims)

    def any(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Whether any element over ``axis`` (default: all) is true."""
        return self._reduce("reduce_any", axis, keepdims)

    def all(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Whether all elements over ``axis`` (default: all) are true."""
        return self._reduce("reduce_all", axis, keepdims)


_INSTEAD = {
    "astype": "x.cast(dtype)", "chunk": "x.split(n, axis)", "dim": "x.rank", "expand": "x.broadcast_to(*shape)",
    "flatten": "x.reshape(...) or x.merge()", "item": "a Tensor; its data are not known while tracing", "ndim": "x.rank",
    "permute": "x.transpose(*perm)", "size": "x.shape", "squeeze": "x.reshape(...) or x[:, 0]", "to": "x.cast(dtype)",
    "unsqueeze": "x[..., None]", "view": "x.reshape(*shape)",
}  # fmt: skip
"""What other libraries call a method -> what it is here."""

_UFUNCS = {
    "add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "power": "pow",
    "floor_divide": "floor_div", "remainder": "mod", "matmul": "matmul", "equal": "equal", "not_equal": "not_equal",
    "less": "less", "less_equal": "less_equal", "greater": "greater", "greater_equal": "greater_equal",
}  # fmt: skip


def _apart(a: Sequence[DimLike], b: Sequence[DimLike]) -> tuple[DimLike, DimLike]:
    """Products of two shapes, without the entries that both have."""
    left: DimLike = 1
    rest = list(b)
    for d in a:
        if d in rest:
            rest.remove(d)
        else:
            left = left * d
    right: DimLike = 1
    for d in rest:
        right = right * d
    return left, right


def _divide(x: Operand, y: Operand) -> Tensor:
    for v in (x, y):
        if isinstance(v, Tensor) and not v.dtype.is_float:
            fail(f'{v.value!r}: / divides floats; use // for integers, or .cast("f32") first')
    return _binary("div", x, y)
