"""Emitting IR operations whose operands may be known: constants fold through the operations' own references, and integers
that are dimensions (what ``Shape`` gives, and arithmetic on it) are followed as dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union

import numpy as np
from wasat.ir import (
    Attrs,
    Builder,
    Dim,
    DimError,
    DimLike,
    DType,
    Graph,
    Node,
    Op,
    ParamSource,
    TensorType,
    TypeMismatch,
    Value,
    equal,
    less_equal,
    maximum,
    minimum,
    op_named,
    run_node,
    symbols_of,
)
from wasat.ir.checks import collect_checks
from wasat.ir.dims import floordiv, mod
from wasat.ir.ops.scan import ScanAttrs

from .errors import FromData, OnnxError

FOLD_LIMIT = 4096
"""A constant is computed while importing if it has at most so many elements, or no more than what it is made of."""

EVALUATE_LIMIT = 2**26
"""No tensor larger than this is computed while importing."""

GROWTH_LIMIT = 2**20
"""What constants are joined to is computed up to so many elements: joined with itself, one doubles with each node."""

FOLDED_LIMIT = 2**26
"""What folds in one import has no more elements together."""

WORK_LIMIT = 2**34
"""In one import, so many elements and multiply-adds are computed for the numbers that converters ask for."""
NODE_WORK = 2**14
"""What running a node costs besides, in these."""

MOST_NUMBERS = 4096
"""A shape, or a list of axes or amounts, has no more elements."""
MOST_DIMS = 256
"""A tensor of more elements is not followed as dimensions."""


@dataclass(frozen=True, eq=False)
class Dims:
    """An integer tensor whose elements are dimensions."""

    array: np.ndarray
    """Of objects: ints and Dims."""
    dtype: DType = DType.I64

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


Operand = Union[Value, np.ndarray, Dims]
T = TypeVar("T")


def objects(items: Sequence[DimLike]) -> np.ndarray:
    """A vector of dimensions."""
    out = np.empty(len(items), object)
    out[:] = list(items)
    return out


def size_of(dims: Iterable[DimLike]) -> DimLike:
    """The number of elements of a shape."""
    total: DimLike = 1
    for d in dims:
        total = total * d
    return total


def is_constant(x: Operand) -> bool:
    """Whether it is an array of the file, and no function of the inputs."""
    return isinstance(x, np.ndarray) or (isinstance(x, Value) and (x.const is not None or x.param is not None))


def known(array: np.ndarray, dtype: DType) -> Operand:
    """Dims, or a plain array where every element is a number."""
    if any(isinstance(d, Dim) for d in array.flat):
        return Dims(array, dtype)
    return array.astype(dtype.np)


class Emitter:
    """Appends operations to ``graph``; any registered operation is a method, as in Builder."""

    def __init__(self, graph: Graph, sources: Mapping[str, ParamSource]) -> None:
        self.graph = graph
        self.b = Builder(graph)
        self.sources = sources
        self._constants: dict[int, tuple[np.ndarray, Value]] = {}
        self._folded = self._worked = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        op = op_named(name)
        return lambda *xs, **attrs: self.emit(op, *xs, **attrs)

    def emit(self, op: Op, *operands: Operand | int | float | bool, **attrs: Any) -> Any:
        """Applies ``op``. Python numbers take the element type of the operands beside them."""
        xs = self._numbers(operands)
        if op.name == "dim_size":
            return known(np.array(attrs["size"], object), DType.of(attrs.get("dtype", DType.I64)))
        if xs and not any(isinstance(x, Value) for x in xs) and any(isinstance(x, Dims) for x in xs):
            result = _on_dims(op, attrs, xs)
            if result is not None:
                return result
        if all(isinstance(x, np.ndarray) for x in xs):
            folded = self._fold(op, xs, attrs)
            if folded is not None:
                return folded
        return self.b.emit(op, *(self.value(x) for x in xs), **attrs)

    def _numbers(self, operands: Sequence[Any]) -> list[Any]:
        dtypes = [self.dtype(x) for x in operands if isinstance(x, (Value, np.ndarray, Dims))]
        weak = next((d for d in dtypes if d is not DType.BOOL), dtypes[0] if dtypes else None)
        out = []
        for x in operands:
            if isinstance(x, (bool, int, float, np.generic)):
                if isinstance(x, (bool, np.generic)):
                    x = np.asarray(x)
                else:
                    own = DType.F32 if isinstance(x, float) else DType.I64
                    own = weak if weak is not None and weak is not DType.BOOL else own
                    given, x = x, np.asarray(x).astype(own.np)
                    if not own.is_float and x != given:
                        raise OnnxError(f"it computes among {own}, and {given} is none")
            out.append(x)
        return out

    def _fold(self, op: Op, xs: list[Any], attrs: dict[str, Any]) -> Any:
        types = [TensorType(DType.of(x.dtype), x.shape) for x in xs]
        try:
            canonical = op.Attrs(**attrs).canonical(*types)
            with collect_checks():
                out = op.infer(canonical, *types)
        except (TypeMismatch, DimError, TypeError):
            return None  # emitting it says what is wrong, and where
        results: list[Any] = [out] if isinstance(out, TensorType) else list(out)  # type: ignore[arg-type]
        sizes = [t.size for t in results if isinstance(t, TensorType)]
        apart = [x.size for x in {id(x): x for x in xs}.values()]
        limit = max(FOLD_LIMIT, *apart, min(sum(apart), GROWTH_LIMIT))
        known = len(sizes) == len(results) and all(isinstance(n, int) and n <= limit for n in sizes)
        if not known or canonical.symbols or canonical.bodies or _largest(canonical) > limit:
            return None
        work = sum(n for n in (*sizes, op.multiply_adds(canonical, *types)) if isinstance(n, int))
        if self._folded + work > FOLDED_LIMIT:
            return None
        self._folded += work
        with np.errstate(all="ignore"):
            made = op.reference(canonical, *xs)
        arrays = [np.asarray(x) for x in made] if isinstance(made, (tuple, list)) else [np.asarray(made)]
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    # -- operands ----------------------------------------------------------------------------------------------------------
    def value(self, x: Operand) -> Value:
        """``x`` as a value of the graph."""
        if isinstance(x, Value):
            return x
        if isinstance(x, np.ndarray):
            if id(x) not in self._constants:
                self._constants[id(x)] = (x, self.b.constant(x))
            return self._constants[id(x)][1]
        rows = [self.b.reshape(self.b.dim_size(size=d, dtype=x.dtype), shape=(1,)) for d in x.array.flat]
        row = self.b.concat(*rows, axis=0) if len(rows) > 1 else rows[0]
        return row if len(x.shape) == 1 else self.b.reshape(row, shape=x.shape)

    def dtype(self, x: Operand) -> DType:
        return x.tensor.dtype if isinstance(x, Value) else x.dtype if isinstance(x, Dims) else DType.of(x.dtype)

    def shape(self, x: Operand) -> tuple[Any, ...]:
        return tuple(x.shape)

    def rank(self, x: Operand) -> int:
        return len(x.shape)

    def static(self, x: Operand, axis: int, what: str) -> int:
        """The size of an axis, which must be a number."""
        n = x.shape[axis]
        if not isinstance(n, int):
            raise OnnxError(f"{what} needs a fixed size of axis {axis}, not {n}; export the model with that size fixed")
        return n

    def const(self, x: Operand, what: str) -> np.ndarray:
        """The numbers of ``x``, which may depend on parameters but on no input. Raises FromData."""
        if isinstance(x, np.ndarray):
            return x
        if isinstance(x, Dims):
            raise FromData(f"{what} depends on the sizes {', '.join(map(str, x.array.flat))}; fix them", ())
        nodes, inputs, params = self._made_of(x)
        if inputs:
            raise FromData(f"{what} depends on the numbers in {', '.join(inputs)}", tuple(inputs))
        values: dict[Value, Any] = {v: self.sources[name].load() for v, name in params.items()}
        for node in self.graph.nodes:
            if node in nodes:
                if symbols := [*node.attrs.symbols, *symbols_of(d for check in node.checks for d in check)]:
                    raise FromData(f"{what} depends on the sizes {', '.join(dict.fromkeys(symbols))}; fix them", ())
                for v in node.outputs:
                    size = v.tensor.size
                    if not isinstance(size, int):
                        raise FromData(f"{what} depends on sizes that are not fixed", ())
                    if size > EVALUATE_LIMIT:
                        raise OnnxError(f"{what} depends on a tensor of {size} elements, too large to compute while importing")
                self._worked += _work(node)
                if self._worked > WORK_LIMIT:
                    raise OnnxError(f"{what} depends on more than can be computed while importing")
                values.update(zip(node.outputs, run_node(node, [values[v] for v in node.inputs], {})))
        return np.asarray(values[x])

    def numbers(self, x: Operand, what: str) -> np.ndarray:
        """``const`` of axes, sizes, amounts: of few elements."""
        count = size_of(self.shape(x))
        if isinstance(count, int) and count > MOST_NUMBERS:
            raise OnnxError(f"{what} has {count} numbers, more than {MOST_NUMBERS}")
        return self.const(x, what)

    def _made_of(self, x: Value) -> tuple[set[Node], list[str], dict[Value, str]]:
        """The nodes, inputs and parameters that ``x`` is computed from."""
        nodes: set[Node] = set()
        inputs: set[str] = set()
        params: dict[Value, str] = {}
        todo = [x]
        while todo:
            v = todo.pop()
            if v.node is not None:
                if v.node not in nodes:
                    nodes.add(v.node)
                    todo += v.node.inputs
            elif v.param is not None:
                params[v] = v.param
            else:
                inputs.add(v.name)
        return nodes, sorted(inputs), params

    def dims(self, x: Operand, what: str) -> tuple[DimLike, ...]:
        """The elements of an integer vector (or scalar) as dimensions. Raises FromData."""
        if isinstance(x, Dims):
            return tuple(x.array.ravel())
        return tuple(int(d) for d in self.numbers(x, what).ravel())

    # -- what converters keep needing --------------------------------------------------------------------------------------
    def to(self, x: Operand, dtype: DType) -> Any:
        """``x`` in another element type, if it has not got it yet."""
        return x if self.dtype(x) is dtype else self.cast(x, dtype=dtype)

    def view(self, x: Operand, *shape: DimLike) -> Any:
        """``x`` reshaped, if it has not got the shape yet."""
        return x if self.shape(x) == tuple(shape) else self.reshape(x, shape=tuple(shape))

    def permute(self, x: Operand, perm: Sequence[int]) -> Any:
        return x if list(perm) == list(range(len(perm))) else self.transpose(x, perm=tuple(perm))

    def expand(self, x: Operand, *shape: DimLike) -> Any:
        return x if self.shape(x) == tuple(shape) else self.broadcast_to(x, shape=tuple(shape))

    def full(self, shape: Sequence[DimLike], value: float, dtype: DType) -> Any:
        """A tensor of one number."""
        return self.expand(np.asarray(value).astype(dtype.np), *shape)

    def axis(self, axis: int, rank: int) -> int:
        """An axis, from the end if it is negative. Raises OnnxError where there is none."""
        if not -rank <= axis < rank:
            raise OnnxError(f"there is no axis {axis}: axes are {-rank} to {rank - 1}")
        return axis % rank

    def size_as(self, d: DimLike, dtype: DType) -> Any:
        """A dimension as a scalar."""
        return self.to(self.dim_size(size=d), dtype)

    def cut(self, x: Operand, axis: int, start: DimLike, stop: DimLike, step: int = 1) -> Any:
        """``x[.., start:stop:step, ..]``; 0 <= start <= stop."""
        shape = self.shape(x)
        starts = tuple(start if i == axis else 0 for i in range(len(shape)))
        stops = tuple(stop if i == axis else d for i, d in enumerate(shape))
        if all(a == 0 for a in starts) and stops == shape and step == 1:
            return x
        return self.slice(x, starts=starts, stops=stops, steps=tuple(step if i == axis else 1 for i in range(len(shape))))

    def add_axes(self, x: Operand, *axes: int) -> Any:
        """New axes of size 1 at these places of the result."""
        rank = self.rank(x) + len(axes)
        at = sorted(a % rank for a in axes)
        shape = list(self.shape(x))
        for a in at:
            shape.insert(a, 1)
        return self.view(x, *shape)

    def drop_axes(self, x: Operand, *axes: int) -> Any:
        """Without these axes, whose size is 1."""
        gone = {a % self.rank(x) for a in axes}
        return self.view(x, *(d for i, d in enumerate(self.shape(x)) if i not in gone))

    def along(self, vector: Operand, axis: int, rank: int) -> Any:
        """A vector as a tensor of ``rank`` axes that runs along ``axis``."""
        return self.view(vector, *(self.shape(vector)[0] if i == axis else 1 for i in range(rank)))

    def fold_left(self, op: Callable[[T, T], T], items: Sequence[T]) -> T:
        return functools.reduce(op, items)


def _largest(attrs: Attrs) -> int:
    """The largest integer among attributes: what lies between operands and results (padding, a window) is no larger."""
    flat: list[Any] = []
    for f in dataclasses.fields(attrs):
        v = getattr(attrs, f.name)
        flat += v if isinstance(v, tuple) else [v]
    return max((v for v in flat if isinstance(v, int)), default=0)


def _work(node: Node) -> int:
    """What running a node costs, in elements and multiply-adds; of a loop, every turn; of a choice, both branches."""
    attrs: Any = node.attrs
    total = NODE_WORK + sum(n for n in (node.multiply_adds, *(v.tensor.size for v in node.outputs)) if isinstance(n, int))
    for body in attrs.bodies:
        turns: DimLike = 1
        if isinstance(attrs, ScanAttrs):
            turns = attrs.length if attrs.length is not None else node.inputs[attrs.carries].shape[0]
        total += turns * sum(map(_work, body.graph.nodes)) if isinstance(turns, int) else 0
    return total


# -- operations on dimensions ----------------------------------------------------------------------------------------------
def _undecided(f: Callable[[Any, Any], bool | None]) -> Callable[[Any, Any], bool]:
    def decide(a: Any, b: Any) -> bool:
        answer = f(a, b)
        if answer is None:
            raise _Unknown
        return answer

    return decide


class _Unknown(Exception):
    """The result is no dimension, or depends on the sizes."""


def _whole(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Division of what is known not to be negative, where rounding down is rounding toward zero."""

    def divide(a: Any, b: Any) -> Any:
        if not less_equal(0, a) or b == 0 or not less_equal(0, b):
            raise _Unknown
        return f(a, b)

    return divide


def _floored(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Division that rounds down, by what is at least 1."""

    def divide(a: Any, b: Any) -> Any:
        if not less_equal(1, b):
            raise _Unknown
        return f(a, b)

    return divide


_PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": _whole(floordiv),
    "floor_div": _floored(floordiv), "mod": _floored(mod), "maximum": maximum, "minimum": minimum,
}  # fmt: skip
_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "equal": _undecided(equal), "less_equal": _undecided(less_equal),
    "not_equal": lambda a, b: not _undecided(equal)(a, b), "greater_equal": lambda a, b: _undecided(less_equal)(b, a),
    "less": lambda a, b: not _undecided(less_equal)(b, a), "greater": lambda a, b: not _undecided(less_equal)(a, b),
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": lambda a, b: a + b, "reduce_prod": lambda a, b: a * b, "reduce_max": maximum, "reduce_min": minimum,
}  # fmt: skip


def _on_dims(op: Op, attrs: dict[str, Any], xs: list[Any]) -> Operand | None:
    """The operation on operands of which some are Dims; None if the result is no tensor of dimensions."""
    arrays = [x.array if isinstance(x, Dims) else x for x in xs]
    dtype = next(x.dtype for x in xs if isinstance(x, Dims))
    types = [TensorType(dtype if isinstance(x, Dims) else DType.of(x.dtype), x.shape) for x in xs]
    name = op.name
    try:
        canonical: Any = op.Attrs(**attrs).canonical(*types)
        with collect_checks():
            made: Any = op.infer(canonical, *types)
        if not isinstance(made, TensorType) or not isinstance(made.size, int) or made.size > MOST_DIMS:
            return None
        if op.kind in ("view", "gather") and not op.is_composite:  # elements are only moved: so are dimensions
            if op.kind == "gather" and isinstance(xs[1], Dims):
                return None
            moved = np.asarray(op.reference(canonical, *arrays), object)
            return known(moved, dtype) if all(isinstance(d, Dim | int | np.integer) for d in moved.flat) else None
        if name in _PAIRS:
            return known(np.asarray(np.frompyfunc(_PAIRS[name], 2, 1)(*map(_as_objects, arrays)), object), dtype)
        if name in _TESTS:
            return np.asarray(np.frompyfunc(_TESTS[name], 2, 1)(*map(_as_objects, arrays))).astype(bool)
        if name in _REDUCTIONS:
            out = arrays[0]
            for axis in sorted(canonical.axes, reverse=True):
                f = np.frompyfunc(_REDUCTIONS[name], 2, 1)
                out = np.asarray(f.reduce(out, axis=axis, keepdims=canonical.keepdims), object)
            return known(out, dtype)
        if name == "select" and isinstance(xs[0], np.ndarray):
            return known(np.asarray(np.where(xs[0], _as_objects(arrays[1]), _as_objects(arrays[2])), object), dtype)
        if name == "cast" and DType.of(attrs["dtype"]) in (DType.I64, DType.I32):
            return Dims(arrays[0], DType.of(attrs["dtype"]))
        if name == "neg":
            return known(np.asarray(np.frompyfunc(lambda a: 0 - a, 1, 1)(arrays[0]), object), dtype)
        if name == "abs":
            return known(np.asarray(np.frompyfunc(lambda a: _PAIRS["div"](a, 1), 1, 1)(arrays[0]), object), dtype)
    except (_Unknown, TypeMismatch, DimError):
        return None
    return None


def _as_objects(x: np.ndarray) -> np.ndarray:
    out = np.empty(x.shape, object)
    for i in np.ndindex(x.shape):
        v = x[i]
        out[i] = v if isinstance(v, Dim) else v if isinstance(v, bool) else int(v)
    return out
