"""What a benchmark measured before on this machine: one line of JSON per run, and how the last run compares.

The file is not in the repository: figures of another machine compare to nothing.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE / "history.jsonl"


def machine() -> str:
    """The CPU's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def last(benchmark: str, conditions: Mapping[str, Any], file: Path = FILE) -> dict[str, Any] | None:
    """The newest run of ``benchmark`` under the same conditions on this CPU, None if there is none."""
    lines = file.read_text().splitlines() if file.exists() else []
    key = [benchmark, machine(), dict(conditions)]
    runs = (json.loads(line) for line in reversed(lines) if line.strip())
    return next((r for r in runs if [r["benchmark"], r["machine"], r["conditions"]] == key), None)


def append(benchmark: str, conditions: Mapping[str, Any], figures: Mapping[str, float], file: Path = FILE) -> None:
    """Adds a run; ``figures`` by case."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    run = {
        "benchmark": benchmark, "machine": machine(), "conditions": dict(conditions), "commit": commit,
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "figures": dict(figures),
    }  # fmt: skip
    with file.open("a") as f:
        f.write(json.dumps(run) + "\n")
