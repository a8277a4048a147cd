"""Graphs and programs as a notebook shows them: what goes in and out, what is in between, and the first lines of text."""

from __future__ import annotations

from collections import Counter
from html import escape
from itertools import islice
from typing import TYPE_CHECKING

from .printer import brief, node_text

if TYPE_CHECKING:
    from .graph import Graph, Value
    from .program import Program

_LINES, _WIDTH, _NAMES = 60, 200, 24
"""Nodes that are written out, characters of each, inputs or outputs that are named."""


def _short(text: str) -> str:
    return escape(text if len(text) <= _WIDTH else text[:_WIDTH] + "…")


def _row(head: str, cells: list[str]) -> str:
    more = f", … {len(cells) - _NAMES} more" if len(cells) > _NAMES else ""
    text = ", ".join(f"<code>{_short(c)}</code>" for c in cells[:_NAMES]) + more
    return f'<tr><th style="text-align:left">{head}</th><td style="text-align:left">{text or "none"}</td></tr>'


def graph_html(graph: Graph) -> str:
    """A table of inputs, parameters, operations and outputs; the nodes, cut short, behind a fold."""

    def named(name: str, v: Value) -> str:
        return f"{name}: {v.type}"

    counts = Counter(n.op.name for n in graph.nodes if n.op.name != "constant").most_common()
    rows = [
        _row("inputs", [named(v.name, v) for v in graph.inputs]),
        _row("outputs", [named(n, v) for n, v in zip(graph.output_names, graph.outputs)]),
        _row("parameters", [named(n, v) for n, v in graph.params.items()]),
        _row("operations", [f"{name} {n}" for name, n in counts]),
    ]
    lines = [_short(node_text(n, brief)) for n in islice((n for n in graph.nodes if n.op.name != "constant"), _LINES)]
    left = sum(n for _, n in counts) - len(lines)
    text = "\n".join([*lines, *([f"… {left} more; str(graph) has all"] if left else [])])
    fold = f"<details><summary>{len(lines) + left} nodes</summary><pre>{text}</pre></details>"
    return f"<div><b>@{_short(graph.name)}</b><table>{''.join(rows)}</table>{fold}</div>"


def program_html(program: Program) -> str:
    """Its graphs, one under another."""
    return "<div>" + "".join(graph_html(g) for g in program.graphs.values()) + "</div>"
