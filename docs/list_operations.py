"""Lists the operations, from the registry itself: operations.md.

    python docs/list_operations.py            # writes it
"""

from __future__ import annotations

import dataclasses
import inspect
from itertools import groupby
from pathlib import Path

from wasat.ir import OPS
from wasat.ir.op import Op

PAGE = Path(__file__).with_name("operations.md")
HEAD = """# Operations

All {count} of them, by the file in [`ir/ops/`](../ir/ops) that defines them; [list_operations.py](list_operations.py) writes
this page. What each fact means, and what else stands on the class of an operation, is in [ir.md](ir.md#operations).
A *composite* is decomposed where a backend has no kernel for it; one without a gradient of its own is differentiated
through its decomposition.
"""


def _words(op: Op) -> str:
    """The first paragraph of its docstring, on one line, without what would end a cell."""
    paragraph = inspect.cleandoc(op.__doc__ or "").split("\n\n")[0]
    return " ".join(paragraph.split()).replace("``", "`").replace("|", "\\|")


def _signature(op: Op) -> str:
    """``where(condition, x, y)``: the operands as its type rule names them."""
    _, *operands = inspect.signature(op.infer).parameters.values()  # the attributes come first
    return f"`{op.name}({', '.join(str(p).partition(':')[0] for p in operands)})`"


def _attributes(op: Op) -> str:
    """``axis, keepdims=False``: names, and defaults where there are some."""
    texts = []
    for f in dataclasses.fields(op.Attrs):
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        texts.append(f.name if value is dataclasses.MISSING else f"{f.name}={value if value != () else '()'}")
    return ", ".join(f"`{t}`" for t in texts)


def page() -> str:
    """The text of operations.md."""
    ops = sorted(OPS.values(), key=lambda op: (type(op).__module__, op.name))
    parts = [HEAD.format(count=len(ops))]
    for module, family in groupby(ops, key=lambda op: type(op).__module__):
        parts += [f"## {module.rpartition('.')[2]}", "", "| operation | attributes | meaning | kind |", "|---|---|---|---|"]
        for op in family:
            kind = f"{op.kind}, composite" if op.is_composite else op.kind
            parts.append(f"| {_signature(op)} | {_attributes(op)} | {_words(op)} | {kind} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
