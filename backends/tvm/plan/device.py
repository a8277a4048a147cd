"""What a device can do that kernels are generated for, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Device:
    """A machine whose kernels a host of ours launches."""

    language: Literal["wgsl", "opencl", "cuda"]
    storage: Mapping[str, str] = field(default_factory=dict)
    """Element types that lie in its memory as elements of another one: a number each."""
    lacks: frozenset[str] = frozenset()
    """Element types that it cannot compute with: programs that hold values of them are refused."""
    integers: int = 64
    """Bits of its widest integers; wider ones are carried in so many."""
    threads: int = 256
    """Most of a workgroup."""
    shared: int = 16384
    """Most bytes that a workgroup shares."""
    buffers: int = 8
    """Most arrays that a kernel may take."""
    fused: int = 8
    """Most that a kernel of several operations takes: larger ones compute more than once what they share."""
    f16: bool = False
    """Whether it computes with numbers of 16 bits; else in f32, rounded after each step."""
    vectors: bool = False
    """Whether TVM may put elements that lie side by side into vectors of the language."""

    @property
    def halves(self) -> bool:
        """Whether an f16 lies in its memory as 16 bits."""
        return self.stored("float16") in ("float16", "uint16")

    def stored(self, dtype: str) -> str:
        """The element type that lies in memory for ``dtype``."""
        return self.storage.get(dtype, dtype)


_WORDS = {
    "bool": "int32", "int64": "int32", "int16": "int32", "int8": "int32", "uint16": "uint32", "uint8": "uint32",
    "bfloat16": "uint32", "float16": "uint32",
}  # fmt: skip

WEBGPU = Device("wgsl", _WORDS, frozenset({"float64", "uint64"}), integers=32)
"""What every browser's WebGPU can: the limits that the standard promises. WGSL has numbers of 32 bits alone."""
WEBGPU_F16 = replace(WEBGPU, storage={k: v for k, v in _WORDS.items() if k != "float16"}, f16=True, vectors=True)
"""The same with the feature ``shader-f16``."""
OPENCL = Device("opencl", {"bool": "int8", "bfloat16": "uint16", "float16": "uint16"}, buffers=64)
"""OpenCL 1.2 with f64, as processors have it; without ``cl_khr_fp16``, which few do."""
CUDA = Device("cuda", {"bool": "int8", "bfloat16": "uint16"}, shared=49152, buffers=64, f16=True)
"""Every NVIDIA GPU, without asking for more than what kernels get by themselves. Vectors of i64, TVM writes as no C++."""
