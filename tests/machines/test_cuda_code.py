"""Machine code for GPUs, made without one: what is in the library is read by its sections."""

from __future__ import annotations

import ctypes
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from decoder import Decoder
from wasat.backends.tvm import cuda
from wasat.backends.tvm.build import BuildError, check_tools
from wasat.backends.tvm.targets import target_named
from wasat.ir import IRError, Program, parse
from wasat.runtime import ArtifactError, load
from wasat.runtime.hosts import cuda_driver

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
    binaries = fat_binaries(out / "kernels.fatbin")
    wanted = sorted(int(a[3:5]) for a in archs.split(","))
    assert binaries
    for entries in binaries:
        assert sorted(e.arch for e in entries) == wanted
        assert {e.kind for e in entries} == {ELF}
        for e in entries:
            assert e.data[:4] == b"\x7fELF"
            assert struct.unpack_from("<H", e.data, 18) == (EM_CUDA,)
            assert struct.unpack_from("<I", e.data, 48)[0] >> 8 & 0xFF == e.arch
    assert b"__global__" not in (out / "kernels.fatbin").read_bytes()  # no source either
    m = json.loads((out / "manifest.json").read_text())
    assert m["target"]["mcpu"] == ",".join(sorted(archs.split(",")))
    assert m["files"].keys() == {"plan.json", "kernels.fatbin", "weights.safetensors"}
    if cuda_is_here():
        load(out)
    else:
        with pytest.raises(ArtifactError, match=r"compiled for cuda \(sm_.*\) and needs an NVIDIA GPU of the architecture sm_"):
            load(out)


def cuda_is_here() -> bool:
    from wasat.machines import machine

    return machine("cuda:sm_90").lacking is None


@needs_nvcc
def test_kernels_take_what_the_plan_gives_them(tmp_path: Path) -> None:
    """A decoder's kernels are ours. In their machine code stand the sizes of parameters and the most threads."""
    ws.compile(Decoder(weights="int8", windows=(None, 5)).program(), tmp_path / "d.wasat", target="cuda:sm_80")
    [entries] = fat_binaries(tmp_path / "d.wasat" / "kernels.fatbin")
    kernels = json.loads((tmp_path / "d.wasat" / "plan.json").read_text())["kernels"]
    found = kernels_in(entries[0].data)
    assert found.keys() == kernels.keys()
    assert sum("attention" in name or "gemm" in name or "gemv" in name for name in kernels) > 5
    for name, k in kernels.items():
        places, end = [], 0
        for size in [8] * len(k["writes"]) + [np.dtype(d).itemsize for d in k["scalars"]]:
            start = -(-end // size) * size
            places.append((start, size))
            end = start + size
        assert found[name] == (math.prod(k["threads"]), places), name


def sections(elf: bytes) -> list[tuple[str, bytes]]:
    """The sections of an ELF file of 64 bits, by name."""
    shoff, shentsize, shnum, shstrndx = *struct.unpack_from("<Q", elf, 40), *struct.unpack_from("<HHH", elf, 58)
    heads = [struct.unpack_from("<IIQQQQ", elf, shoff + i * shentsize) for i in range(shnum)]
    names = [heads[shstrndx][4] + name for name, *_ in heads]
    return [(elf[n : elf.index(0, n)].decode(), elf[at : at + size]) for n, (_, _, _, _, at, size) in zip(names, heads)]


def kernels_in(elf: bytes) -> dict[str, tuple[int, list[tuple[int, int]]]]:
    """Of each kernel of a cubin: the most threads of a workgroup, and offset and size of each parameter, as the section
    ``.nv.info.NAME`` has them: records of a form, a kind, and a value or a size with data."""
    found = {}
    for name, section in sections(elf):
        if not name.startswith(".nv.info."):
            continue
        threads, parameters, i = 0, {}, 0
        while i < len(section):
            form, kind, length = struct.unpack_from("<BBH", section, i)
            data, i = section[i + 4 : i + 4 + length], i + 4 + (length if form == 4 else 0)
            if (form, kind) == (4, 0x05):  # EIATTR_MAX_THREADS
                threads = math.prod(struct.unpack("<III", data))
            elif (form, kind) == (4, 0x17):  # EIATTR_KPARAM_INFO
                _, number, place, what = struct.unpack("<IHHI", data)
                parameters[number] = place, what >> 18
        found[name.removeprefix(".nv.info.")] = threads, [parameters[n] for n in sorted(parameters)]
    return found


@needs_nvcc
def test_the_driver_is_called_as_its_header_says(tmp_path: Path) -> None:
    """Names, order and sizes of arguments, for every function that the host calls: those of cuda.h."""
    root = cuda.toolkit()
    assert root is not None
    (tmp_path / "a.cu").write_text("#include <cuda.h>\n")
    header = subprocess.run([root / "bin" / "nvcc", "-E", tmp_path / "a.cu"], capture_output=True, text=True, check=True).stdout
    declared = {}
    for name, given in re.findall(r"CUresult (cu\w+)\(([^;]*)\);", header):
        declared[name] = [" ".join(p.split()) for p in given.split(",")]
    for name, kinds in cuda_driver._FUNCTIONS.items():
        assert [_kind(p) for p in declared[name]] == [_of(k) for k in kinds], name


_SIZES = {
    "unsigned int": 4, "int": 4, "size_t": 8, "CUdeviceptr": 8, "CUdevice": 4, "CUdevice_attribute": 4, "CUresult": 4,
    "cuuint64_t": 8, "CUstreamCaptureMode": 4, "unsigned long long": 8,
}  # fmt: skip


def _kind(parameter: str) -> object:
    """The size of a number; ``pointer`` for those and for handles, which are such."""
    words = parameter.replace("const ", "")
    type = words if words in _SIZES else words.rpartition(" ")[0].strip()
    if "*" in parameter or type in ("CUcontext", "CUstream", "CUmodule", "CUfunction", "CUgraph", "CUgraphExec"):
        return "pointer"
    return _SIZES[type]


def _of(kind: type) -> object:
    pointer = kind in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(kind, "contents")
    return "pointer" if pointer else ctypes.sizeof(kind)


@needs_nvcc
def test_what_the_compiler_refuses_is_told() -> None:
    with pytest.raises(cuda.NvccError, match=r"(?s)nvcc refuses the code for sm_80: .*error: .*identifier \"no_such\""):
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
