"""Machine code for GPUs, made without one: what is in the library is read by its sections."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from decoder import Decoder
from wasat.backends.tvm import cuda
from wasat.backends.tvm.build import BuildError, check_tools
from wasat.backends.tvm.targets import target_named
from wasat.ir import IRError, Program, parse
from wasat.runtime import ArtifactError, load

import wasat as ws

pytestmark = pytest.mark.machines
needs_nvcc = pytest.mark.skipif(cuda.toolkit() is None, reason="needs nvcc (pip install 'wasat[cuda]')")
FATBIN, PTX, ELF, EM_CUDA = 0xBA55ED50, 1, 2, 190
SMALL = Program({"f": parse("graph @f(%x: f32[m, 64]) {\n %y: f32[m, 64] = softmax(%x) {axis=1}\n return %y\n}")})


class Entry(NamedTuple):
    """Code in a fat binary."""

    kind: int
    arch: int
    data: bytes


def fat_binaries(library: Path) -> list[list[Entry]]:
    """The fat binaries in a file, as NVIDIA's fatbinary writes them: a header with its size and that of what follows, then for
    each code a header (kind, its own size, the size of the code, and the architecture at byte 28) and the code."""
    raw, found, at = library.read_bytes(), [], 0
    while (at := raw.find(struct.pack("<I", FATBIN), at)) >= 0:
        _, head, size = struct.unpack_from("<HHQ", raw, at + 4)
        entries, i = [], at + head
        while i < at + head + size:
            kind, _, own, length = struct.unpack_from("<HHIQ", raw, i)
            (arch,) = struct.unpack_from("<I", raw, i + 28)
            entries.append(Entry(kind, arch, raw[i + own : i + own + length]))
            i += own + length
        found.append(entries)
        at += head + size
    return found


@needs_nvcc
@pytest.mark.parametrize("archs", ["sm_90", "sm_90a,sm_80"])
def test_machine_code_and_nothing_to_compile(archs: str, tmp_path: Path) -> None:
    out = tmp_path / "small.wasat"
    ws.compile(SMALL, out, target=f"cuda:{archs}")
    binaries = fat_binaries(out / "model.so")
    wanted = sorted(int(a[3:5]) for a in archs.split(","))
    assert binaries
    for entries in binaries:
        assert sorted(e.arch for e in entries) == wanted
        assert {e.kind for e in entries} == {ELF}
        for e in entries:
            assert e.data[:4] == b"\x7fELF"
            assert struct.unpack_from("<H", e.data, 18) == (EM_CUDA,)
            assert struct.unpack_from("<I", e.data, 48)[0] >> 8 & 0xFF == e.arch
    assert b"__global__" not in (out / "model.so").read_bytes()  # no source either
    m = json.loads((out / "manifest.json").read_text())
    assert m["target"]["mcpu"] == ",".join(sorted(archs.split(",")))
    assert m["target"]["libraries"] == ["libcudart.so.13", "libtvm_runtime_cuda.so"]
    assert {"libcudart.so.13", "libtvm_runtime_cuda.so"} <= m["files"].keys()
    if cuda_is_here():
        load(out)
    else:
        with pytest.raises(ArtifactError, match=r"compiled for cuda \(sm_.*\) and needs an NVIDIA GPU of the architecture sm_"):
            load(out)


def cuda_is_here() -> bool:
    from wasat.machines import machine

    return machine("cuda:sm_90").lacking is None


@needs_nvcc
def test_a_decoder(tmp_path: Path) -> None:
    """Its kernels are ours; what the compiler refuses would be said."""
    ws.compile(Decoder(weights="int8", windows=(None, 5)).program(), tmp_path / "d.wasat", target="cuda:sm_80")
    [entries] = fat_binaries(tmp_path / "d.wasat" / "model.so")
    names = entries[0].data
    assert b".text." in names
    assert names.count(b".text.") > 5


@needs_nvcc
def test_what_the_compiler_refuses_is_told() -> None:
    with pytest.raises(cuda.CudaError, match=r"(?s)nvcc refuses the code for sm_80: .*error: .*identifier \"no_such\""):
        cuda.fat_binary('extern "C" __global__ void f(float* x) { x[0] = no_such; }', ["sm_80"])


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "toolkit", lambda: None)
    with pytest.raises(BuildError, match=r"compiling for cuda needs CUDA's compiler nvcc: pip install 'wasat\[cuda\]'"):
        check_tools(target_named("cuda"))


@pytest.mark.parametrize("name", ["90", "sm_", "sm_9x", "compute_90", "sm_60", "sm_80,", "sm_90b", "sm_80;sm_90"])
def test_no_architectures(name: str) -> None:
    with pytest.raises(IRError, match="there is no GPU architecture"):
        cuda.architectures(name)


def test_architectures() -> None:
    assert cuda.architectures("sm_90a, sm_80,sm_120,sm_80") == ["sm_80", "sm_90a", "sm_120"]
