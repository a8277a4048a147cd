"""Kernels for sets that this processor lacks, whose instructions are computed in software: `make test` runs a third of them.

Of each test, every set gets another third, so that each case runs on some set; all of them are run with the slow tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
SAMPLE = 3


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[str, dict[str, list[pytest.Item]]] = {}
    """The items of each test, and in it of each set."""
    for item in items:
        isa = item.callspec.params.get("isa") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
        soft = isa is not None and isa.name.startswith("soft-") and item.get_closest_marker("skip") is None
        if soft and HERE in item.path.parents:
            cases.setdefault(item.nodeid.partition("[")[0], {}).setdefault(isa.name, []).append(item)
    for sets in cases.values():
        for first, found in enumerate(sets.values()):
            for i, item in enumerate(found):
                if len(found) >= SAMPLE and (i - first) % SAMPLE:
                    item.add_marker(pytest.mark.slow)
