"""Artifacts are written whole or not at all, and replace only what is one."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from wasat.ir import WasatError
from wasat.runtime import ArtifactError, RuntimeErrorBase, exchange, write_artifact
from wasat.runtime.artifact import digest

import wasat as ws


def _write(out: Path, text: str = "x") -> None:
    write_artifact(out, {"name": "n"}, {"a.bin": lambda path: path.write_text(text)})  # type: ignore[arg-type,dict-item]


def test_files_are_copied_or_written_and_described(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"copied")
    out = tmp_path / "deep" / "model.wasat"
    write_artifact(out, {"name": "n"}, {"copy": tmp_path / "source", "made": lambda path: path.write_bytes(b"made!") and None})
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == {
        "name": "n",
        "digest": digest(manifest),
        "files": {
            "copy": {"sha256": hashlib.sha256(b"copied").hexdigest(), "bytes": 6},
            "made": {"sha256": hashlib.sha256(b"made!").hexdigest(), "bytes": 5},
        },
    }
    assert (out / "copy").read_bytes() == b"copied"
    assert sorted(os.listdir(out.parent)) == ["model.wasat"]


def test_an_artifact_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path / "m")
    _write(tmp_path / "m", "new")
    assert (tmp_path / "m" / "a.bin").read_text() == "new"
    assert os.listdir(tmp_path) == ["m"]


def test_an_artifact_with_an_empty_file_is_one(tmp_path: Path) -> None:
    _write(tmp_path / "m", "")
    _write(tmp_path / "m", "new")
    assert (tmp_path / "m" / "a.bin").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    _write(tmp_path / "m")
    for out in ("m", "other"):
        with pytest.raises(error):
            write_artifact(tmp_path / out, {}, {"a.bin": fail})
    assert os.listdir(tmp_path) == ["m"]
    assert (tmp_path / "m" / "a.bin").read_text() == "x"


def test_a_failed_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "m")
    rename = Path.rename
    monkeypatch.setattr(exchange, "_exchanged", lambda *_: False)  # as on a file system that cannot

    def refuse(self: Path, target: Path) -> Path:
        if ".new." in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        _write(tmp_path / "m", "new")
    assert os.listdir(tmp_path) == ["m"]
    assert (tmp_path / "m" / "a.bin").read_text() == "x"


def test_two_steps_where_the_system_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_exchanged", lambda *_: False)
    _write(tmp_path / "m")
    _write(tmp_path / "m", "new")
    assert (tmp_path / "m" / "a.bin").read_text() == "new"
    assert os.listdir(tmp_path) == ["m"]


def test_the_artifact_is_there_at_any_moment(tmp_path: Path) -> None:
    """A reader looks all the time while it is replaced."""
    _write(tmp_path / "m")
    looks: list[bool] = []
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(lambda: [_write(tmp_path / "m", str(i)) for i in range(30)])
        while not writer.done():
            looks.append((tmp_path / "m" / "manifest.json").exists())
        writer.result()
    assert looks
    assert all(looks)


def test_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    """A killed writer's folders, not a living one's, nor another artifact's; the artifact it took away is put back."""
    left = [tmp_path / f".m.{name}" for name in ("new.0123abcd", "old.0123abcd", "new.mine", "x.new.0123abcd")]
    for folder in left:
        folder.mkdir()
        (folder / "a.bin").write_text("left")
    with exchange.replacement(tmp_path / "m") as fresh:
        assert (tmp_path / "m" / "a.bin").read_text() == "left"  # the only one there was
        assert [f.exists() for f in left] == [False, False, True, True]
        with exchange.replacement(tmp_path / "m") as other:
            assert fresh.exists()
            assert other.exists()
    assert sorted(os.listdir(tmp_path)) == [".m.new.mine", ".m.x.new.0123abcd", "m"]


def test_a_link_to_an_artifact_stays_one(tmp_path: Path) -> None:
    _write(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    _write(tmp_path / "current", "new")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / "a.bin").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["current", "v1"]


@pytest.mark.parametrize("manifest", [
    '{"name": "A web app", "start_url": "."}', "{}", "[]", "null", "{", '{"files": []}', '{"files": {"a": 1}}',
    '{"files": {"a": {"sha256": 1, "bytes": 1}}}', '{"files": {"index.html": {"sha256": "", "bytes": -1}}}',
    '{"files": {"index.html": {"sha256": "", "bytes": 8}, "a": {"sha256": 1, "bytes": 1}}}',
    '{"files": ["index.html"], "format": 3, "wasat": "1"}', "[" * 100_000, '{"files": {}}', '{"files": {}, "format": 3}',
    '{"files": {"index.html": {"sha256": "", "bytes": 8}}}',
    *(f'{{"files": {{"index.html": {{"sha256": "{sha}", "bytes": 8}}}}, {more}}}' for sha, more in (
        ("", '"format": 1, "wasat": "1"'), ("0" * 63 + "g", '"format": 1, "wasat": "1"'), ("0" * 64, '"format": 1'),
        ("0" * 64, '"format": "1", "wasat": "1"'), ("0" * 64, '"digest": "0"'), ("0" * 64, '"format": true, "wasat": "1"'),
    )),
])  # fmt: skip
def test_another_kind_of_manifest_is_not_replaced(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(manifest)
    (tmp_path / "app" / "index.html").write_text("precious")
    with pytest.raises(ArtifactError, match="is no artifact"):
        _write(tmp_path / "app")
    assert (tmp_path / "app" / "index.html").read_text() == "precious"


def test_what_stands_beside_an_artifacts_files_is_kept(tmp_path: Path) -> None:
    _write(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt, which is no file of the artifact"):
        _write(tmp_path / "m")
    assert (tmp_path / "m" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["../x", "a/b", "manifest.json", "", "..", "a" * 300, "a\0", "a\\b"])
def test_names_of_files_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="is no name for a file"):
        write_artifact(tmp_path / "m", {}, {name: lambda path: path.write_text("x") and None})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place, message", [
    ("/", "the root of all folders"), ("a\0b", "has a zero in it"), ("a\ud800", "half a character"),
    ("x" * 250, "longer than names"), ("x/" * 2500, "longer than names"),
], ids=["root", "zero", "half a character", "long", "deep"])
def test_places_that_cannot_be(place: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        _write(Path(place))


def test_what_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    for name in ("folder", "file"):
        with pytest.raises(ArtifactError, match=r"is no artifact .* choose another place"):
            _write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == ["precious"]


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "x" * 5000], ids=["half a character", "zero", "long"])
def test_a_name_that_no_file_has(name: str) -> None:
    """It is refused in our words by all that reads."""
    for read in (ws.load, ws.from_pretrained, ws.from_onnx):
        with pytest.raises((RuntimeErrorBase, WasatError), match=r"artifact|no such file|cannot be read"):
            read(name)
