"""Artifacts and hosts in C for other systems: Windows, under wine; macOS, whose code is linked and read, and nothing runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from wasat.runtime import ArtifactError, load
from wasat.runtime.artifact import digest
from wasat.runtime.c import write_project
from wasat.runtime.model import Model

import wasat as ws

PYGEMMA = Path(__file__).parents[2] / "examples" / "pygemma"
COMPILER = "x86_64-w64-mingw32-g++-posix"
PROMPT = "def naïve(path): # žluť\n    "
PACKAGES = {COMPILER: "g++-mingw-w64-x86-64-posix", "wine": "wine", "wine64": "wine64"}
MISSING = [package for tool, package in PACKAGES.items() if not (shutil.which(tool) or Path(f"/usr/lib/wine/{tool}").exists())]

pytestmark = pytest.mark.machines
windows = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (packages of Debian)")
zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang (pip install ziglang)")


def compiled(target: str, out: Path) -> Path:
    ws.compile(ws.from_pretrained(PYGEMMA), out, quantize="int8", target=target, threads=2)
    return out


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(compiled("cpu", tmp_path_factory.mktemp("here") / "a"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project for Windows, built as its README says, in a folder whose name is not English."""
    place = tmp_path_factory.mktemp("windows")
    out = place / "Größe"
    write_project(compiled("windows", place / "a"), out)
    sources = sorted(str(p.relative_to(out)) for p in (out / "src").glob("*.cc"))
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-Wall", "-Werror", "-Isrc", "-isystem", "include", *sources, "src/generate.c",
         "artifact/tvm_ffi.dll", "-static", "-o", "artifact/wasat-generate.exe"], cwd=out, check=True)  # fmt: skip
    return out


def run(project: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[bytes]:
    prefix = {"WINEPREFIX": str(project.parent / "wine"), "WINEDEBUG": "-all", "DISPLAY": "", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        ["wine", "artifact/wasat-generate.exe", *arguments], cwd=project, input=text.encode(), capture_output=True,
        env={**os.environ, **prefix}, timeout=600,
    )  # fmt: skip


@windows
def test_windows_writes_the_same_text(project: Path, here: Model) -> None:
    for options, said in (
        (ws.SamplingOptions(), []),
        (ws.SamplingOptions(temperature=0.8, top_p=0.9, seed=7), ["--temperature", "0.8", "--top-p", "0.9", "--seed", "7"]),
    ):
        wanted = here.generate([PROMPT], max_tokens=40, options=options)[0].text
        done = run(project, "artifact", PROMPT, "--max-tokens", "40", *said)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == wanted + "\n"
    done = run(project, "artifact", "-", "--max-tokens", "12", "--quiet", text=PROMPT)
    assert done.stdout.decode() == here.generate([PROMPT], max_tokens=12)[0].text + "\n"


@windows
def test_windows_says_what_is_wrong(project: Path, here: Model, tmp_path: Path) -> None:
    assert b"holds no manifest.json" in run(project, "src", "x").stderr
    other = compiled("cpu", tmp_path / "linux")
    assert b"the artifact is compiled for linux, this is win32" in run(project, str(other), "x").stderr
    demanding = tmp_path / "demanding"
    shutil.copytree(project / "artifact", demanding)
    manifest = json.loads((demanding / "manifest.json").read_text())
    manifest["target"]["features"] = ["avx2", "fma", "popcnt", "xop", "tbm"]
    manifest["digest"] = digest(manifest)
    (demanding / "manifest.json").write_text(json.dumps(manifest))
    assert b"this processor lacks xop, tbm, which" in run(project, str(demanding), "x").stderr
    broken = tmp_path / "broken"
    shutil.copytree(project / "artifact", broken)
    library = bytearray((broken / "model.so").read_bytes())
    library[-1] ^= 1
    (broken / "model.so").write_bytes(library)
    done = run(project, str(broken), "x")
    assert (done.returncode, b"model.so is not the file that was compiled" in done.stderr) == (1, True)
    with pytest.raises(ArtifactError, match=r"needs the system win32: this is linux"):
        load(project / "artifact")


@zig
def test_code_for_macos_is_linked(tmp_path: Path) -> None:
    """A library for arm64 that exports the program; what it calls is TVM's runtime for macOS, or the system's."""
    out = compiled("macos", tmp_path / "a")
    needs = json.loads((out / "manifest.json").read_text())["target"]
    assert (needs["os"], needs["arch"], needs["mcpu"]) == ("darwin", "aarch64", "apple-m1")
    assert "asimddp" in needs["features"]
    defined, undefined = symbols(out / "model.so")
    assert "___tvm_ffi__library_bin" in defined
    runtime = symbols(out / "libtvm_ffi.dylib")[0]
    assert {s for s in undefined if s.startswith("_TVMFFI")} <= runtime
    assert {s for s in undefined if "TVM" in s} <= runtime
    with pytest.raises(ArtifactError, match=r"needs the system darwin: this is linux"):
        load(out)


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """External symbols of a Mach-O library for arm64: those that it defines, and those that it wants (loader.h, nlist.h)."""
    raw = path.read_bytes()
    magic, cpu, _, kind, commands, _, _, _ = struct.unpack_from("<8I", raw)
    assert (magic, cpu, kind) == (0xFEEDFACF, 0x0100000C, 6)  # 64 bits, arm64, a library
    at, defined, undefined = 32, set[str](), set[str]()
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", raw, at)
        if command == 2:  # the table of symbols
            table, count, texts, _ = struct.unpack_from("<4I", raw, at + 8)
            for i in range(count):
                name, type_ = struct.unpack_from("<IB", raw, table + 16 * i)
                if type_ & 1 and not type_ & 0xE0:
                    start = texts + name
                    found = raw[start : raw.index(b"\0", start)].decode()
                    (defined if type_ & 0x0E else undefined).add(found)
        at += size
    return defined, undefined
