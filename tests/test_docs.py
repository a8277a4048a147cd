"""What the documents show is run as it stands, from top to bottom; what they print must be what they say; links lead somewhere.

Of a document, these run: every ```python block, and in ```sh blocks the lines that begin with ``wasat``. They share one
process and one folder, in which ``examples`` is the repository's. An ```output block is what the block before it printed, with
``...`` for anything. Blocks of other kinds (```text, ```console) are not run.
"""

from __future__ import annotations

import doctest
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {"media.md", "lora.md", "c.md", "embeddings.md", "targets.md", "compare.md", "chat.md", "accelerator.md"}  # slow
EXAMPLES = {"own_model.py": "finished by length", "own_pass.py": "both tests pass", "hugging_face.py": "def read_file"}
ENTRY = "from wasat.cli import main; main()"
MARK = "\x01block "
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[str, int, str]]:
    """Kind, first line's number and text of every fenced block."""
    text = path.read_text()
    return [(m[1], text.count("\n", 0, m.start(2)) + 1, m[2]) for m in FENCE.finditer(text)]


def script(path: Path) -> str:
    """The document as a program whose line numbers are the document's; it announces each block that it runs."""
    lines = [""] * (path.read_text().count("\n") + 2)
    lines[0] = f"import subprocess as _s, sys as _y; _run = lambda a: _s.run([_y.executable, '-c', {ENTRY!r}, *a], check=True)"
    for kind, at, text in blocks(path):
        if kind in ("python", "sh"):
            lines[at - 2] = f"print({MARK + str(at)!r}, flush=True)"  # where the fence is
        for i, line in enumerate(text.splitlines(), at - 1):
            if kind == "python":
                lines[i] = line
            elif kind == "sh" and line.startswith("wasat "):
                lines[i] = f"_run({shlex.split(line, comments=True)[1:]!r})"
    return "\n".join(lines)


def run(command: list[str], folder: Path) -> str:
    """Standard output of a program that must succeed."""
    env = {**os.environ, "PYTHONPATH": "", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_document(path: Path, folder: Path) -> None:
    (folder / path.name).write_text(script(path))
    printed: dict[int, str] = {}
    for part in run([sys.executable, path.name], folder).split(MARK)[1:]:
        place, _, text = part.partition("\n")
        printed[int(place)] = text
    last = 0
    for kind, at, text in blocks(path):
        if kind == "output":
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = doctest.OutputChecker().check_output(text, printed[last], flags)
            assert same, f"{path.name}:{at}: printed was\n{printed[last]}"
        last = at


def folder_for_documents(folder: Path) -> Path:
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact that the README compiles, for the documents that go on from there."""
    folder = folder_for_documents(tmp_path_factory.mktemp("readme"))
    run_document(README, folder)
    return folder / "pygemma.wasat"


def test_readme(artifact: Path) -> None:
    assert (artifact / "manifest.json").is_file()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=str(p.relative_to(ROOT)), marks=[pytest.mark.slow] if p.name in LONG else [])
        for p in DOCUMENTS[1:]
    ],
)
def test_document(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not any(kind in ("python", "sh") for kind, _, _ in blocks(path)):
        return
    folder_for_documents(tmp_path)
    if "pygemma.wasat" in path.read_text():
        shutil.copytree(request.getfixturevalue("artifact"), tmp_path / "pygemma.wasat")
    run_document(path, tmp_path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    assert EXAMPLES[name] in run([sys.executable, str(ROOT / "examples" / name)], tmp_path)


def anchors(path: Path) -> set[str]:
    """GitHub's names of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}; there is no such heading"


def test_the_list_of_operations_is_the_registry() -> None:
    """To write it anew: python docs/list_operations.py"""
    assert (ROOT / "docs" / "operations.md").read_text() == runpy.run_path(str(ROOT / "docs" / "list_operations.py"))["page"]()


@pytest.mark.slow
def test_the_page_on_attention_is_what_is_made_of_the_collections() -> None:
    """To write it anew: python docs/list_attention.py"""
    assert (ROOT / "docs" / "attention.md").read_text() == runpy.run_path(str(ROOT / "docs" / "list_attention.py"))["page"]()


def test_readme_begins_with_two_commands() -> None:
    first = next(text for kind, _, text in blocks(README) if kind)
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["demo", "test"]
