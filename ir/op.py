"""What an operation is: attributes, types, meaning, decomposition, gradient and samples, in one class.

    @register
    class Relu(Op):
        \"\"\"max(x, 0).\"\"\"
        name = "relu"

        def infer(self, attrs, x): return x
        def reference(self, attrs, x): return np.maximum(x, 0)
        def decompose(self, b, attrs, x): return b.maximum(x, 0.0)
        def vjp(self, b, node, g): ...
        def samples(self): yield Sample([f32(2, 3)])
        def errors(self): yield ErrorSample(["bool[2]"], {}, "needs a float")

One test sweeps the registry: reference against decomposition, gradient against finite differences in float64, inferred types
against what the reference returned, and every error sample refused with its message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from typing import Literal as OneOf

import numpy as np

from .axes import AxisRule, broadcast, whole
from .checks import collect_checks
from .dims import Dim, DimLike, evaluate_dim, substitute, symbols_of
from .errors import IRError, NotDifferentiable, TypeMismatch
from .types import Array, DType, QTensorType, TensorType, Type

if TYPE_CHECKING:
    from .builder import Builder
    from .graph import Graph, Node, Value

A = TypeVar("A", bound="Attrs")

AxisIndex = int
AxisIndices = tuple[int, ...]
Permutation = tuple[int, ...]
Shape = tuple[DimLike, ...]
Starts = tuple[DimLike, ...]
Amounts = tuple[DimLike, ...]
Stops = tuple[DimLike, ...]
Steps = tuple[int, ...]
_IN_FRONT: dict[str, Callable[[Any, DimLike], Any]] = {
    "AxisIndex": lambda axis, size: axis + 1, "AxisIndices": lambda axes, size: tuple(a + 1 for a in axes),
    "Permutation": lambda perm, size: (0, *(p + 1 for p in perm)), "Shape": lambda shape, size: (size, *shape),
    "Starts": lambda starts, size: (0, *starts), "Stops": lambda stops, size: (size, *stops),
    "Steps": lambda steps, size: (1, *steps), "Amounts": lambda amounts, size: (0, *amounts),
}  # fmt: skip
"""Annotations of attributes that speak of axes, and what becomes of them where operands get one more axis in front."""


@dataclass(frozen=True)
class Literal:
    """A constant tensor as an attribute: hashable, compared by its bytes."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(x: Any, dtype: DType | str | None = None) -> Literal:
        try:
            array = np.asarray(x) if dtype is None else np.asarray(x).astype(DType.of(dtype).np)
        except OverflowError:
            raise IRError(f"{x} does not fit into {dtype}") from None
        return Literal(DType.of(array.dtype), array.shape, np.ascontiguousarray(array).tobytes())

    @property
    def array(self) -> np.ndarray:
        """A read-only view of the data."""
        return np.frombuffer(self.data, self.dtype.np).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Body:
    """A graph as an attribute: what an operation does in each turn, or in a branch. Compared by its text, and not to be
    changed in place.

    It reads nothing but its inputs, and its symbols are those of the graph around it.
    """

    graph: Graph

    @cached_property
    def text(self) -> str:
        return str(self.graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Body) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Symbols of its types and of its nodes' attributes."""
        types = symbols_of(d for v in self.graph.values() for d in v.type.shape)
        return tuple(dict.fromkeys([*types, *(s for node in self.graph.nodes for s in node.attrs.symbols)]))

    def substitute(self, env: Mapping[str, DimLike]) -> Body:
        """With the symbols that ``env`` names replaced."""
        return self if env.keys().isdisjoint(self.symbols) else Body(self.graph.clone(dims=env))


@dataclass(frozen=True)
class Attrs:
    """Base of attribute classes: frozen, canonical at construction.

    Ints given for float fields become floats, lists become tuples, dtype names become DTypes. What needs the operands' rank
    (negative axes) is settled by :meth:`canonical`, which the builder calls before the node is made.
    """

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            fixed = _canonical(value, str(f.type))
            if fixed is not value:
                object.__setattr__(self, f.name, fixed)

    @classmethod
    def of(cls: type[A], node: Node) -> A:
        """The attributes of ``node``, whose operation has attributes of this class."""
        if not isinstance(node.attrs, cls):
            raise IRError(f"{node!r} has no attributes of {cls.__qualname__}", node.loc)
        return node.attrs

    def canonical(self: A, *types: Type) -> A:
        """The same attributes with everything that depends on the operands' types filled in."""
        return self

    def bind(self: A, env: Mapping[str, DimLike]) -> A:
        """Dimensions among the attributes with symbols substituted (ints where ``env`` is complete)."""
        changes = {}
        for f in dataclasses.fields(self):
            old = getattr(self, f.name)
            new = _bind(old, env)
            if new is not old:
                changes[f.name] = new
        return dataclasses.replace(self, **changes) if changes else self

    def in_front(self: A, size: DimLike) -> A:
        """The same for operands that have one more axis in front, of this size; all of it is taken."""
        changes = {}
        for f in dataclasses.fields(self):
            if (change := _IN_FRONT.get(str(f.type).rpartition(".")[2])) is not None:
                changes[f.name] = change(getattr(self, f.name), size)
        return dataclasses.replace(self, **changes) if changes else self

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols of the dimensions among the attributes, those in bodies included."""
        flat: list[object] = []
        for f in dataclasses.fields(self):
            v = getattr(self, f.name)
            flat += v if isinstance(v, tuple) else [v]
        return tuple(dict.fromkeys([*symbols_of(flat), *(s for body in self.bodies for s in body.symbols)]))

    @property
    def bodies(self) -> tuple[Body, ...]:
        """The graphs among the attributes."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return tuple(v for v in values if isinstance(v, Body))

    @property
    def shared(self) -> int:
        """The first of the operands that bodies are given as they are: all that follow are, too."""
        return 0

    def with_bodies(self: A, change: Callable[[Graph], object]) -> A:
        """With copies of its bodies on which ``change`` was called; itself, if that answered for each that nothing changed."""
        changes = {}
        for f in dataclasses.fields(self):
            v = getattr(self, f.name)
            if isinstance(v, Body) and change(copy := v.graph.clone()):
                changes[f.name] = Body(copy)
        return dataclasses.replace(self, **changes) if changes else self


def _canonical(value: Any, annotation: str) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, tuple):
        fixed = tuple(_canonical(v, annotation) for v in value)
        return value if all(a is b for a, b in zip(fixed, value)) else fixed
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and "DType" in annotation:
        return DType.of(value)
    if isinstance(value, int) and not isinstance(value, bool) and "float" in annotation:
        return float(value)
    return value


def _bind(value: Any, env: Mapping[str, DimLike]) -> Any:
    if isinstance(value, Dim):
        return substitute(value, env)
    if isinstance(value, Body):
        return value.substitute(env)
    if isinstance(value, tuple) and any(isinstance(v, (Dim, tuple)) for v in value):
        return tuple(_bind(v, env) for v in value)
    return value


def axis_of(axis: int, rank: int) -> int:
    """``axis`` counted from the front. Raises TypeMismatch outside ``-rank .. rank-1``."""
    if not -rank <= axis < rank:
        raise TypeMismatch(f"axis {axis} is outside a tensor of rank {rank}")
    return axis % rank


@dataclass(frozen=True)
class Sample:
    """Arrays (and attributes) on which an operation must work.

    ``grad`` names the operands to check gradients for (default: every float one); ``rtol``/``atol`` bound decomposition
    against reference (in the sample's own dtype), and are for operations whose decomposition rounds differently.
    """

    inputs: Sequence[Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    grad: tuple[int, ...] | None = None
    rtol: float = 1e-5
    atol: float = 1e-6


@dataclass(frozen=True)
class ErrorSample:
    """Operand types (as text, e.g. ``"f32[b, 4]"``) and attributes that must be refused, and a part of the message."""

    types: Sequence[str]
    attrs: Mapping[str, Any]
    match: str


Bounds = tuple[DimLike, DimLike]
"""The least index of an operand, and one more than its largest."""


Kind = OneOf[
    "source", "random", "view", "elementwise", "reduction", "row", "product", "window", "gather", "scatter", "ordered",
    "control", "collective",
]  # fmt: skip
"""What an operation does, roughly:

``source``, ``random``: values that come from no data. ``view``: elements are moved, and none is changed. ``elementwise``:
element i depends only on element i of the (broadcast) operands. ``reduction``: over axes. ``row``: a function of slices along
an axis (softmax, norms). ``product``: matrix products and convolutions, and what holds them. ``window``: of neighbours.
``gather``, ``scatter``: reading and writing at indices. ``ordered``: along an axis, one element after the other. ``control``:
loops and choices. ``collective``: between ranks.
"""


class Op:
    """Base of operations. Subclasses are registered once and used as singletons."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    Attrs: ClassVar[type[Attrs]] = Attrs
    precision: ClassVar[OneOf["any", "half", "wide"]] = "any"
    """In a graph of half precision: ``half`` is worth it (products, which accumulate in f32 all the same); ``wide`` keeps f32
    (sums, and functions whose results leave the range of f16 or lose their digits, as torch.autocast has it)."""
    weight: ClassVar[int | None] = None
    """The operand that may be stored in another type than what is computed in: with fewer bits."""
    quantized: ClassVar[str | None] = None
    """The operation with the same operands but for a quantized weight."""
    alias: ClassVar[int | None] = None
    """The operand whose memory the result is."""
    idle: ClassVar[int | None] = None
    """The operand that the result is at inference: of what changes something in training alone. The other one is its key."""
    recurrence: ClassVar[Mapping[int, int]] = {}
    """Of what runs forward along an axis: the results that an incremental run keeps, each by the operand it goes on from."""
    factors: ClassVar[int] = 2
    """Of products: how many of the first operands are multiplied."""
    commutative: ClassVar[bool] = False
    idempotent: ClassVar[bool] = False
    """f(x, x) is x."""
    involution: ClassVar[bool] = False
    """f(f(x)) is x."""
    absorbing: ClassVar[float | None] = None
    """The number that is the result beside whatever finite number."""
    differentiable: ClassVar[bool] = True
    """False for operations whose gradient is zero or meaningless (comparisons, casts to int, indices)."""
    straight_through: ClassVar[bool] = False
    """The gradient is that of the first operand, not of the numbers, which are rounded (arXiv:1308.3432)."""

    def infer(self, attrs: Any, *types: Any) -> Type | Sequence[Type]:
        """Types of the outputs. Raises TypeMismatch."""
        raise NotImplementedError(self.name)

    def reference(self, attrs: Any, *arrays: Any) -> Array | Sequence[Array]:
        """The definition, in NumPy. ``attrs`` hold no symbols here."""
        raise NotImplementedError(self.name)

    def run(self, attrs: Any, dims: Mapping[str, int], *arrays: Any) -> Array | Sequence[Array]:
        """The reference with symbols of these values; attributes may hold some."""
        return self.reference(attrs.bind(dims), *arrays)

    def bounds(self, attrs: Any, *types: Any) -> Mapping[int, Bounds]:
        """Of operands that are places along axes, by number: what is outside is an error wherever the graph runs."""
        return {}

    def axes(self, attrs: Any, *types: Any) -> AxisRule:
        """What depends on what along each axis; attributes and types are such as :meth:`infer` takes."""
        if self.elementwise:
            return broadcast(*(t.shape for t in types))
        with collect_checks():
            made = self.infer(attrs, *types)
        unknown = f"is {self.name}, of which nothing is known along {{}}"
        does = "draws numbers for all of {}" if self.kind == "random" else unknown
        results = made if isinstance(made, Sequence) else [made]
        return AxisRule(tuple(whole(t.shape, does) for t in types), tuple(whole(t.shape) for t in results))

    def neutral(self, dtype: DType) -> float | None:
        """The number that as second operand (as either, if the operation commutes) leaves the other as it is, to the bit."""
        return None

    def picks(self, attrs: Any) -> int | None:
        """The axis of operand 0 along which slices are picked at the indices in operand 1; None: it picks none so."""
        return None

    def pause(self, b: Builder, attrs: Any, operands: Sequence[Value], real: Value) -> list[Value]:
        """Of a ``recurrence``: operands with which what is kept stays as it is in the turns that are not ``real``, which is
        bool [rows | 1, turns, heads | 1]."""
        raise NotImplementedError(self.name)

    def multiply_adds(self, attrs: Any, *types: Any) -> DimLike:
        """Those of matrix products and convolutions, without regard to masks."""
        return 0

    def decompose(self, b: Builder, attrs: Any, *inputs: Any) -> Value | Sequence[Value]:
        """The same in simpler operations; primitives have none."""
        raise NotImplementedError(self.name)

    def vjp(self, b: Builder, node: Node, *grads: Any) -> Sequence[Value | None]:
        """Gradients of the operands, given those of the outputs (None: zero). Default: the decomposition's."""
        raise NotDifferentiable(f"{self.name} has no gradient", node.loc)

    def samples(self) -> Iterable[Sample]:
        """Inputs that must work."""
        raise NotImplementedError(f"{self.name} has no samples")

    def errors(self) -> Iterable[ErrorSample]:
        """Inputs that must be refused."""
        return ()

    @property
    def elementwise(self) -> bool:
        """Output element i depends only on element i of the (broadcast) operands."""
        return self.kind == "elementwise"

    @property
    def carries(self) -> bool:
        """Result elements are elements of the operands: moved, repeated or left out, or in another type."""
        return self.kind == "view"

    @property
    def cheap(self) -> bool:
        """Whether computing it again costs little beside reading its result."""
        return self.kind not in ("product", "ordered", "scatter", "control", "collective")

    @property
    def is_composite(self) -> bool:
        return type(self).decompose is not Op.decompose

    @property
    def has_vjp(self) -> bool:
        return type(self).vjp is not Op.vjp

    def __repr__(self) -> str:
        return f"<op {self.name}>"


OPS: dict[str, Op] = {}
"""Every operation by name."""

O = TypeVar("O", bound=type[Op])


def register(cls: O) -> O:
    """Class decorator: makes the operation known under its ``name``."""
    if cls.name in OPS:
        raise IRError(f"operation {cls.name} is defined twice")
    OPS[cls.name] = cls()
    return cls


def op_named(name: str) -> Op:
    """The operation called ``name``; an unknown name raises IRError with the nearest ones."""
    from . import ops as _families  # noqa: F401  (registers them)

    if name not in OPS:
        import difflib

        near = difflib.get_close_matches(name, OPS, 3)
        raise IRError(f"there is no operation {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return OPS[name]


# -- helpers for infer ------------------------------------------------------------------------------------------------
def tensor(t: Type, what: str = "operand") -> TensorType:
    """``t`` as a dense tensor type, or TypeMismatch."""
    if not isinstance(t, TensorType):
        raise TypeMismatch(f"{what} is quantized ({t}); dequantize it first")
    return t


def floating(t: Type, what: str = "operand") -> TensorType:
    """``t`` as a dense tensor of floats, or TypeMismatch."""
    if not tensor(t, what).dtype.is_float:
        raise TypeMismatch(f"{what} must be float, not {t}")
    return tensor(t, what)


def quantized(t: Type, what: str = "operand") -> QTensorType:
    """``t`` as a quantized type, or TypeMismatch."""
    if not isinstance(t, QTensorType):
        raise TypeMismatch(f"{what} must be quantized, not {t}")
    return t


def same_dtype(*types: Type) -> DType:
    """The common element type, or TypeMismatch."""
    dtypes = {tensor(t).dtype for t in types}
    if len(dtypes) != 1:
        raise TypeMismatch(f"element types differ: {', '.join(str(tensor(t).dtype) for t in types)}; cast one of them")
    return dtypes.pop()


def broadcast_shapes(*shapes: Sequence[DimLike]) -> tuple[DimLike, ...]:
    """NumPy's broadcasting over symbolic shapes: aligned at the end, only a literal 1 stretches."""
    from .checks import require_equal

    rank = max((len(s) for s in shapes), default=0)
    out: list[DimLike] = []
    for i in range(rank):
        dim: DimLike = 1
        for s in shapes:
            j = i - (rank - len(s))
            if j >= 0 and s[j] != 1:
                dim = s[j] if dim == 1 else require_equal(dim, s[j], f"axis {i} of the broadcast shape")
        out.append(dim)
    return tuple(out)


def concrete(d: DimLike) -> int:
    """A dimension attribute inside ``reference``, where every symbol is bound."""
    return evaluate_dim(d, {})
