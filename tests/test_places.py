"""What is new stands in few places: one of each kind is added to a copy of the house, and works (CONTRIBUTING: places)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ADDED, CHECKS

ROOT = Path(__file__).parents[1]
ROOMS = ("ir", "passes", "backends", "frontend", "runtime", "training")
TABLE = dict(re.findall(r"^\| (an? [^|]+) \| (\d+):", (ROOT / "CONTRIBUTING.md").read_text(), re.M))
"""Kind -> how many places CONTRIBUTING says."""
BARS = {
    "an operation": 4, "a pass": 2, "a target": 1, "a model family": 2, "a kind of media": 2, "an ONNX operator": 1,
    "a command": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What does not work in a house to which all was added, by kind."""
    house = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "wasat", house / "wasat", copy_function=os.symlink)
    for room in ROOMS:
        shutil.copytree(ROOT / room, house / "wasat" / room, copy_function=os.symlink)
    for edits in ADDED.values():
        for name, edit in edits.items():
            file = house / "wasat" / name.removeprefix("wasat/")
            text = file.read_text() if file.exists() else ""
            assert bool(text) != (isinstance(edit, str) and edit.startswith('"""')), f"{name}: a new file is a module"
            file.unlink(missing_ok=True)
            file.write_text(text + edit if isinstance(edit, str) else edit(text))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("places.py")], capture_output=True, text=True, cwd=house,
        env={**os.environ, "PYTHONPATH": str(house)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kind", ADDED)
def test_one_more_is_added_in_few_places(wrong: dict[str, str], kind: str) -> None:
    if kind in wrong:
        pytest.fail(wrong[kind])
    assert len(ADDED[kind]) == BARS[kind] == int(TABLE[kind])


def test_every_kind_is_added() -> None:
    assert set(TABLE) == set(ADDED) == set(CHECKS) == set(BARS)
