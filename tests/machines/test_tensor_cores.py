"""Products of many rows on tensor cores: run on a GPU in software, which has the instructions as the PTX ISA describes them;
and the machine code that NVIDIA's compiler makes of them."""
from __future__ import annotations

import struct
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
import kernel_help
from gpu_help import BF16, MACHINES, run
from kernel_help import EPS, products
from soft_cuda import soft_gpu
from test_cuda_code import fat_binaries, needs_nvcc, sections
from test_gpu_kernels import RNG, made, normal
from wasat.backends.tvm import cuda
from wasat.backends.tvm.gpu.kernels.formats import Floats, format_of
from wasat.backends.tvm.gpu.kernels.linear import Linear, linear
from wasat.backends.tvm.plan import ptx
from wasat.backends.tvm.plan.kernels import functions
from wasat.backends.tvm.targets import limits_of
from wasat.ir import DType, QArray, TensorType

pytestmark = pytest.mark.machines
MACHINE = MACHINES[-1]
F16 = np.dtype(np.float16)
HMMA, LDSM, LDGSTS, LDL, STL = 0x23C, 0x83B, 0xFAE, 0x983, 0x387
"""The lowest twelve bits of an instruction: a product of fragments, fragments from workgroup memory, copies to it, and
registers that are kept in memory."""


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


def described(w: Any, n: int, k: int, half: np.dtype[Any], **more: Any) -> Linear:
    f = format_of(w.type if isinstance(w, QArray) else TensorType(DType.of(w.dtype), w.shape), True)
    assert not isinstance(f, str)
    return Linear(MACHINE.limits, n, k, f, 32, dtype=half.name, **more)


@pytest.mark.parametrize("kind, m, n, k, half", [
    ("bfloat16", 70, 71, 96, BF16), ("float16", 9, 130, 77, F16), ("bfloat16", 65, 64, 3, BF16), ("float16", 1, 3, 8, F16),
    ("bfloat16", 130, 1030, 40, BF16), ("int8", 70, 71, 77, BF16), ("int4", 5, 71, 96, F16), ("q5_k", 33, 40, 256, BF16),
    ("int4b16f32", 64, 64, 64, BF16), ("mxfp4", 20, 65, 32, F16), ("float16", 0, 8, 8, F16), ("bfloat16", 17, 20, 37, BF16),
])  # fmt: skip
def test_products(kind: str, m: int, n: int, k: int, half: np.dtype[Any]) -> None:
    """Weights count as they are rounded to the type of x; what stands behind a row takes no part."""
    w, dense = made(kind, n, k)
    desc = described(w, n, k, half, bias=True)
    x, bias = normal(m, k).astype(half), normal(n).astype(half)
    got = run(MACHINE, linear(desc), [x, desc.weights.pack(w), bias, np.full((m, n), 77, half)])[-1]
    want = products(x, dense.astype(half).T) + bias.astype(np.float32)
    unit = {F16: 2.0**-11, BF16: 2.0**-8}[half]
    kernel_help.assert_within(got, want.sum, unit * np.abs(want.sum) + (want.roundings() * EPS) * want.size)


def test_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread of a workgroup comes first; and without its wait for what is copied, the kernel is wrong here."""
    w, _ = made("bfloat16", 40, 104)
    desc = described(w, 40, 104, BF16)
    x = normal(20, 104).astype(BF16)

    def results() -> np.ndarray[Any, Any]:
        arrays = [x, desc.weights.pack(w), np.full((20, 40), 77, BF16)]
        return run(MACHINE, linear(desc), arrays)[-1].astype(np.float32)

    first = results()
    monkeypatch.setattr("gpu_help.soft_gpu", lambda: soft_gpu(backwards=1))
    np.testing.assert_array_equal(results(), first)
    monkeypatch.setitem(ptx._FUNCTIONS, "wasat_copied", "static __device__ void wasat_copied() {}")
    assert np.isnan(results()).any()


def test_what_has_no_tensor_cores() -> None:
    w, _ = made("int8", 40, 64)
    d = described(w, 40, 64, BF16)
    assert d.name == "mma_int8b32f16_40x64"
    plain = {
        "its activations are f32": replace(d, dtype="float32"),
        "its activations are rounded to int8": replace(d, of_f32=True),
        "its weight is f32, its activations bf16": replace(d, weights=Floats("float32")),
        "its weight is f16, its activations bf16": replace(d, weights=Floats("float16")),
        "the device has none that take f16 and bf16": replace(d, limits=limits_of(MACHINE.device)),
    }
    for why, desc in plain.items():
        assert (desc.slow, desc.name[:4]) == (why, "gemm")
    assert replace(d, rows=4).name[:5] == "gemv4"


@needs_nvcc
def test_machine_code(tmp_path: Path) -> None:
    """Of a tile of 128 by 128: in the loop, 32 products of fragments (4 by 4 of each of two sixteens of k) to 12 reads of
    fragments; few enough registers that a multiprocessor has two workgroups, and none of them in memory."""
    kinds = {"bfloat16": Floats("bfloat16", True), "int4": described(made("int4", 4, 32)[0], 4, 32, BF16).weights}
    for name, f in kinds.items():
        func = linear(Linear(MACHINE.limits, 2048, 2048, f, 32, dtype="bfloat16")).with_attr("global_symbol", name)
        [launch] = functions(tvm.IRModule({name: func}), MACHINE.target, MACHINE.device)[name].launches
        path = tmp_path / f"{name}.fatbin"
        path.write_bytes(cuda.fat_binary(launch.kernel.source, ["sm_80", "sm_90a"]))
        [entries] = fat_binaries(path)
        assert [e.arch for e in entries] == [80, 90]
        for e in entries:
            found, registers = instructions(e.data)
            assert (found[HMMA], found[LDSM]) == (32, 12)
            assert found[LDGSTS] == (8 if name == "bfloat16" else 4)  # of the first part, and of the next one in the loop
            assert found[LDL] == found[STL] == 0
            assert registers <= 128
        assert "wasat_mma_f16" not in launch.kernel.source  # no function that it does not call


def instructions(elf: bytes) -> tuple[Counter[int], int]:
    """How often each instruction stands in the code of a cubin of one kernel, and the registers of a thread."""
    found, registers = Counter[int](), 0
    for name, data in sections(elf):
        if name.startswith(".text."):
            found += Counter(struct.unpack_from("<Q", data, i)[0] & 0xFFF for i in range(0, len(data), 16))
        if name == ".nv.info":
            at = 0
            while at < len(data):
                form, kind, length = struct.unpack_from("<BBH", data, at)
                if (form, kind) == (4, 0x2F):  # EIATTR_REGCOUNT: of which function, how many
                    registers = max(registers, struct.unpack_from("<I", data, at + 8)[0])
                at += 4 + (length if form == 4 else 0)
    return found, registers
