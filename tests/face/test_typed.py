"""What a type checker and an editor see of ``import wasat as ws``."""

from __future__ import annotations

import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wasat as ws
from wasat import nn

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("ir", "passes", "backends", "frontend", "runtime", "training")

USER = '''
import wasat as ws
from wasat import nn


class Net(nn.Module):
    def __init__(self) -> None:
        self.a = nn.Linear(4, 8)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.softmax(self.a(x), axis=-1)


program = ws.trace(Net(), {"x": "f32[b, 4]"})
reveal_type(nn.Linear)  # note: Revealed type is "def (inputs: int, outputs: int, bias: bool =
reveal_type(program)  # note: Revealed type is "wasat.ir.program.Program"
reveal_type(ws.load("a"))  # note: Revealed type is "wasat.runtime.model.Model"
nn.Linear(4, 8, bais=True)  # error: Unexpected keyword argument "bais" for "Linear"
ws.compile(program, "out", quantise="int4")  # error: Unexpected keyword argument "quantise" for "compile"
nn.softmax(program)  # error: Argument 1 to "softmax" has incompatible type "Program"; expected "Tensor"
ws.compil(program, "out")  # error: Module has no attribute "compil"
nn.sofmax(program)  # error: Module has no attribute "sofmax"
'''


def test_a_checker_knows_every_name_and_keyword(tmp_path: Path) -> None:
    links = tmp_path / "links" / "wasat"  # the shape that an installed package has
    links.mkdir(parents=True)
    for f in (ROOT / "wasat").iterdir():
        (links / f.name).symlink_to(f)
    for room in ROOMS:
        (links / room).symlink_to(ROOT / room)
    user = tmp_path / "user.py"
    user.write_text(USER)
    flags = ["--ignore-missing-imports", "--follow-imports=silent", "--no-error-summary", f"--cache-dir={tmp_path / 'cache'}"]
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", *flags, "user.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MYPYPATH": str(links.parent)},
    )  # fmt: skip
    found = re.findall(r"^user.py:(\d+): (.*)$", said.stdout, re.M)
    assert found, said.stdout + said.stderr
    lines = USER.splitlines()
    for line, (kind, text) in {
        i: match.groups()
        for i, s in enumerate(lines, 1) if (match := re.search(r"# (note|error): (.*)$", s))
    }.items():
        assert any(int(n) == line and m.startswith(f"{kind}: {text}") for n, m in found), (lines[line - 1], said.stdout)
    wrong = {int(n) for n, m in found if m.startswith("error")}
    assert wrong == {i for i, s in enumerate(lines, 1) if "# error" in s}


def test_the_typed_names_are_those_that_are_imported() -> None:
    text = (ROOT / "wasat" / "__init__.py").read_text()
    typed = {name: home for home, name in re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.M)}
    assert typed == ws._HOME


def test_completion_offers_public_names_only() -> None:
    assert set(dir(ws)) == {*ws._HOME, "__version__"}
    assert dir(nn) == sorted(nn.__all__)
    assert all(getattr(nn, name) is not None for name in dir(nn))
    assert not any(name.startswith("_") for name in dir(nn))


def test_help_begins_with_what_to_do() -> None:
    first = pydoc.plain(pydoc.render_doc(ws)).splitlines()[:12]
    assert any("ws.compile(" in line for line in first)
