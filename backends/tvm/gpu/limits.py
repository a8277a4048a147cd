"""What a device allows a kernel, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes that kernels are made for. The defaults are what every WebGPU promises."""

    threads: int = 256
    """Most of a workgroup."""
    shared: int = 16384
    """Most bytes that a workgroup shares."""
    f16: bool = False
    """Whether arrays of f16 can be read; else weights of f16 are pairs in words of 32 bits."""
    vectors: bool = False
    """Whether a thread reads 16 bytes that lie side by side at once."""
    lanes: int = 8
    """Threads that share a row of a weight, where there are few rows of x: more of them have more bytes on their way at once,
    and meet at more barriers."""
    columns: int = 4
    """Rows of a weight that a thread has at once, for which it reads x once."""
    tensor: bool = False
    """Whether it has tensor cores that multiply f16 and bf16, asked for as NVIDIA's PTX does."""
