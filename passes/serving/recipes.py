"""How weights are stored: schemes by name, and recipes that choose one for each weight by what it is for.

What is here was chosen by KL divergence on real weights (``docs/quantization.md``): a bit more divides the divergence by about
four, so bits go to the weights that cost most of it for their size. Those are tables and heads, which every token passes, then
what makes queries, keys and values, and what reads the wide products of a feed-forward network.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from wasat.ir import DType, Node, QTensorType, Value, parse_type
from wasat.ir.errors import WasatError
from wasat.ir.ops.quant import QUANTIZERS
from wasat.ir.schemes import own_scheme, scheme_named

FLOATS = {"f16": DType.F16, "bf16": DType.BF16}
PLAIN = {"int8": "int8", "int4-plain": "int4"}
"""Blocks of one size with symmetric scales that the largest element gives."""
AS_THEY_ARE = "int4-plain"
"""The scheme for weights that are to be rounded and nothing else, as those that were trained for it."""
_OWN = re.compile(r"s([4-7])\Z")

TABLE, ATTENDED, INNER, OTHER = "tables and heads", "queries, keys and values", "inner products", "others"
"""Roles of weights, see :func:`role_of`."""
RECIPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "int4": {
        TABLE: ("s5", "int8"), ATTENDED: ("s5", "int8"), INNER: ("s5", "int4b32f16"), OTHER: ("s4", "int4b32f16"),
    },
}  # fmt: skip
"""By name: for each role the schemes that come into question, of which the first that suits the weight is taken."""
SCHEMES = ("int8", *RECIPES, "int4-plain", "s4", "s5", "s6", "s7", *QUANTIZERS[2:], *FLOATS, "f32")
"""What users choose from; beside types of blocks as text: ``int4zb64f16``, ``s4b128``."""


@dataclass(frozen=True)
class Storage:
    """A scheme for one weight: a type without its shape, or a float."""

    name: str
    type: QTensorType | DType
    search: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Attributes of the ``quantize`` that makes it."""
        t = self.type
        assert isinstance(t, QTensorType)
        if t.stored is not None:
            return {"scheme": t.scheme}
        return {"scheme": t.scheme, "block": t.block, "scale": t.scale, "zeros": t.zeros, "search": self.search}


def is_scheme(name: str) -> bool:
    """Whether a scheme or a recipe is called so."""
    return name in SCHEMES or _type(name) is not None


def _type(name: str) -> QTensorType | None:
    """The type, of one element, of a scheme that is written as types are; None: it is none, or files alone have it."""
    stored = scheme_named(name)
    if stored is not None:
        return QTensorType(name, (stored.block,)) if stored.write is not None else None
    try:
        t = parse_type(f"{name}[1]")
    except WasatError:
        return None
    return t if isinstance(t, QTensorType) else None


Formats = tuple[tuple[str, str], ...]
"""Pairs of globs: operations, and types of weights for which a target has kernels of them."""
ALL: Formats = (("*", "*"),)


def storage(
    scheme: str, role: str, row: int, block: int, formats: Formats = ALL, operations: Sequence[str] = ()
) -> Storage | str:  # fmt: skip
    """How a weight of a role with rows of ``row`` elements, read by ``operations``, is stored in ``scheme``; or why it is not.

    ``block``: of ``int8`` and ``int4-plain``. ``formats``: what the target's kernels read, of which a recipe chooses; a scheme
    that was asked for by name is taken all the same.
    """
    if scheme not in RECIPES:
        return _stored(scheme, row, block)
    reasons = []
    for candidate in RECIPES[scheme][role]:
        found = _stored(candidate, row, block)
        if isinstance(found, str):
            reasons.append(found)
        elif lacking := [op for op in operations if not kernels_read(formats, op, found.type)]:
            reasons.append(f"the target has no kernel of {lacking[0]} for {found.type.how}")  # type: ignore[union-attr]
        else:
            return found
    return reasons[-1]


def kernels_read(formats: Formats, operation: str, type: QTensorType | DType) -> bool:
    """Whether there are kernels of ``operation`` for weights of a type."""
    how = type.how if isinstance(type, QTensorType) else str(type)
    return any(fnmatchcase(operation, o) and fnmatchcase(how, t) for o, t in formats)


def _stored(scheme: str, row: int, block: int) -> Storage | str:
    if scheme in FLOATS:
        return Storage(scheme, FLOATS[scheme])
    if scheme in PLAIN:
        if row < block:
            return f"its rows are shorter than a block of {block}"
        return Storage(scheme, QTensorType(PLAIN[scheme], (row,), block))
    if m := _OWN.match(scheme):
        name = own_scheme(int(m[1]), row)
        if name is None:
            return f"its rows of {row} are not of whole blocks of 32"
        return Storage(scheme, QTensorType(name, (row,)))
    t = _type(scheme)
    assert t is not None, scheme
    if t.stored is not None and row % t.stored.block:
        return f"its rows of {row} are not of whole blocks of {t.stored.block}"
    if row < t.block:
        return f"its rows are shorter than a block of {t.block}"
    return Storage(scheme, t.with_shape(row), search=True)


# -- roles --------------------------------------------------------------------------------------------------------------------
_BETWEEN = ("elementwise", "view", "row", "reduction")
"""Kinds of operations that stand between products."""


def role_of(w: Value, only: Container[Value]) -> str:
    """What a weight is for, by what reads it; ``only``: what is computed from parameters alone.

    Tables are looked up; what a head makes is an output of the graph or is sorted (a router's), and passes no other product.
    What makes queries, keys or values ends in a product of two activations. Inner products read products that only elementwise
    operations have touched: what leads out of a feed-forward network.
    """
    linears = [u for u in w.users if u.op.kind == "product"]
    if any(u.op.kind == "gather" for u in w.users):
        return TABLE
    ends = [_ends(u) for u in linears]
    for found, output in ends:
        if any(u.op.kind == "ordered" for u in found) or (output and not any(u.op.kind == "product" for u in found)):
            return TABLE
    if any(u.op.kind == "product" and not any(v in only for v in u.inputs) for found, _ in ends for u in found):
        return ATTENDED
    return INNER if linears and all(map(_reads_products, linears)) else OTHER


def _ends(node: Node) -> tuple[list[Node], bool]:
    """The readers to which the results of ``node`` come through what stands between products; whether one is an output."""
    found: dict[Node, None] = {}
    seen, output = {node}, False
    for at in (todo := [node]):
        for v in at.outputs:
            output |= v.graph.is_output(v)
            for user in v.users:
                if user.op.kind not in _BETWEEN:
                    found[user] = None
                elif user not in seen:
                    seen.add(user)
                    todo.append(user)
    return list(found), output


def _reads_products(node: Node) -> bool:
    """Whether x is made by elementwise operations, of products with weights and nothing else that is no constant."""
    seen, elementwise, products = {node}, False, False
    todo = [node.inputs[0].node]
    for at in todo:
        if at is None or (at.op.kind == "product" and at.op.weight is None):
            return False
        if at in seen or at.op.kind == "source":
            continue
        seen.add(at)
        if at.op.kind == "product":
            products = True
            continue
        if at.op.kind not in ("elementwise", "view"):
            return False
        elementwise |= at.op.kind == "elementwise"
        todo += [v.node for v in at.inputs if v.param is None]
    return elementwise and products
