"""What is exported as a project in C, and what is refused; building and running it is test_c_host.py's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import edit_manifest
from tokenizer_files import KINDS
from wasat.runtime.c import check_tokenizer, unknown_parts, write_project
from wasat.runtime.errors import ArtifactError, InputError


def test_the_folder_holds_all_it_takes(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "project"
    for _ in range(2):  # it may be written over; a build beside it stays
        write_project(artifact, out)
        (out / "build").mkdir(exist_ok=True)
    assert sorted(p.name for p in out.iterdir()) == ["CMakeLists.txt", "README.md", "artifact", "build", "include", "src"]
    names = {p.name: p.read_bytes() for p in artifact.iterdir()}
    assert {p.name: p.read_bytes() for p in (out / "artifact").iterdir()} == names
    assert {p.suffix for p in (out / "src").iterdir()} == {".h", ".cc", ".c", ".inc"}
    assert (out / "include" / "tvm" / "ffi" / "c_api.h").is_file()


def test_what_is_there_and_something_else_stays(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ArtifactError, match="exists and is no exported C project"):
        write_project(artifact, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    out = tmp_path / "project"
    write_project(artifact, out)
    with pytest.raises(ArtifactError, match="is the artifact of"):
        write_project(out / "artifact", out)
    assert (out / "artifact" / "model.so").is_file()


REFUSED: list[tuple[str, Any, str]] = [
    ("target.kind", "hexagon", "is compiled for cpu: the C host runs programs for CPUs"),
    ("entries.decode", ..., "has no entries prefill and decode: the C host generates text"),
    ("entries.prefill.inputs.0.shape", [2, "s"], "the program is for 2 rows"),
    ("entries.decode.inputs.1.name", "mask", r"the model takes more than tokens \(mask\)"),
]


@pytest.mark.parametrize("path, value, message", REFUSED, ids=lambda x: str(x)[:30])
def test_models_that_the_host_does_not_run(copy: Path, tmp_path: Path, path: str, value: Any, message: str) -> None:
    edit_manifest(copy, "entries.decode.indices", [])
    edit_manifest(copy, path, value)
    with pytest.raises(InputError, match=message):
        write_project(copy, tmp_path / "project")
    assert not (tmp_path / "project").exists()


def test_artifacts_for_other_machines_are_exported(copy: Path, tmp_path: Path) -> None:
    edit_manifest(copy, "target.arch", "riscv64")
    write_project(copy, tmp_path / "project")
    assert json.loads((tmp_path / "project" / "artifact" / "manifest.json").read_text())["target"]["arch"] == "riscv64"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_is_known(kind: str) -> None:
    assert list(unknown_parts(json.loads(KINDS[kind]().to_str()))) == []


def _with(part: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[part] = value

    return change


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
ODD: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_with("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}), "the normalizer Precompiled"),
    (_with("normalizer", {"type": "Sequence", "normalizers": [{"type": "Nmt"}]}), "the normalizer Nmt"),
    (_with("pre_tokenizer", {"type": "UnicodeScripts"}), "the pre_tokenizer UnicodeScripts"),
    (_with("pre_tokenizer", {**SPLIT, "pattern": {"Regex": r"\p{Han}+"}}), r"\\p\{Han\} in regular expressions"),
    (_with("pre_tokenizer", {**SPLIT, "pattern": {"Regex": r"[a-z&&[^q]]"}}), "&& in regular expressions"),
    (_with("decoder", {"type": "CTC"}), "the decoder CTC"),
    (lambda data: data["model"].update(dropout=0.1), "dropout"),
]


@pytest.mark.parametrize("change, message", ODD, ids=lambda x: x if isinstance(x, str) else "")
def test_tokenizers_that_the_host_does_not_know(
    tmp_path: Path, tokenizer_file: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = json.loads(tokenizer_file.read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=f"the C host's tokenizer lacks {message}"):
        check_tokenizer(tmp_path / "tokenizer.json")


def test_an_artifact_with_such_a_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    data = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**data, "decoder": {"type": "CTC"}}))
    edit_manifest(copy, "files.tokenizer%json.bytes", (copy / "tokenizer.json").stat().st_size)
    with pytest.raises(InputError, match="the decoder CTC"):
        write_project(copy, tmp_path / "project")
    shutil.rmtree(copy)
