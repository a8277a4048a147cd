"""The ONNX backend suite's node tests compiled for the CPU, many in one library, against the list of those that fail."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("tvm")
onnx = pytest.importorskip("onnx")
if not onnx.__version__.startswith("1.23."):
    pytest.skip(f"the list is of onnx 1.23, not {onnx.__version__}", allow_module_level=True)

from report import COMPILED, LIST
from suite import expected_failures, is_listed, node_tests, run_compiled

BATCH = 60
INTERPRETED, EXPECTED = expected_failures(LIST), expected_failures(COMPILED)
TESTS = [t for t in node_tests() if t.name not in INTERPRETED]
PASSING = [t for t in TESTS if t.name not in EXPECTED]
EXPANDED = [t for t in PASSING if "_expanded" in t.name]
"""Operators spelled as their function bodies: primitives that other cases are about, in other order."""
PLAIN = [t for t in PASSING if t not in EXPANDED]
FIRST = {t.model.graph.node[0].op_type: t for t in reversed(PLAIN)}.values()
SAMPLE = [t for i, t in enumerate(PLAIN) if t in FIRST or i % 4 == 0]
"""Every operator, and a quarter of its further cases (element types, axes, paddings); the rest are left to the slow tests."""


def batches(tests: list[Any], *marks: pytest.MarkDecorator) -> list[Any]:
    cut = [tests[i : i + BATCH] for i in range(0, len(tests), BATCH)]
    return [pytest.param(b, id=f"{b[0].name}..{b[-1].name}", marks=marks) for b in cut]


@pytest.mark.parametrize("batch", [
    *batches(SAMPLE), *batches([t for t in PLAIN if t not in SAMPLE], pytest.mark.slow),
    *batches(EXPANDED, pytest.mark.slow, pytest.mark.sweep),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_nodes(batch: list[Any]) -> None:
    failed = run_compiled(batch)
    assert not failed, "\n".join(f"{name}: {e}" for name, e in failed.items())


@pytest.mark.parametrize("reason", sorted(set(EXPECTED.values())))
@pytest.mark.filterwarnings("ignore")
def test_listed(reason: str) -> None:
    listed = [t for t in TESTS if EXPECTED.get(t.name) == reason]
    found = {t.name: run_compiled([t]).get(t.name) for t in listed}
    passed = [name for name, e in found.items() if e is None]
    assert not passed, f"they pass now: take {passed} off {COMPILED.name} and run tests/onnx/report.py"
    others = [f"{name}: {e!r}" for name, e in found.items() if e is not None and not is_listed(COMPILED, name, e)]
    assert not others, "they fail in another way than is listed:\n" + "\n".join(others)


def test_the_list_names_tests_that_the_interpreter_passes() -> None:
    assert EXPECTED.keys() <= {t.name for t in TESTS}
