"""Draws which room imports which, from the imports themselves: the drawing in architecture.md.

    python docs/draw_rooms.py            # prints it
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("wasat", "training", "passes", "backends", "frontend", "runtime", "ir")


def imports() -> Counter[tuple[str, str]]:
    """(room, imported room) -> statements that import it."""
    found: Counter[tuple[str, str]] = Counter()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, (ast.Import, ast.ImportFrom)):
                    continue
                base = f"{node.module}." if isinstance(node, ast.ImportFrom) and not node.level else ""
                for parts in ((base + alias.name).split(".") for alias in node.names):
                    other = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "wasat"
                    if parts[0] == "wasat" and other != room and parts[1:2] != ["errors"]:  # the root, below all rooms
                        found[room, other] += 1
    return found


def drawing() -> str:
    """In Mermaid's language."""
    arrows = sorted(imports(), key=lambda arrow: (ROOMS.index(arrow[0]), ROOMS.index(arrow[1])))
    return "\n".join(["```mermaid", "flowchart TD", *(f"  {a} --> {b}" for a, b in arrows), "```"])


if __name__ == "__main__":
    print(drawing())
