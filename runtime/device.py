"""Buffers in a machine's memory: here the host's, zeroed, aligned as compiled code assumes, in huge pages where there are any.

tvm_ffi is imported where it is used, here and in module.py: what is wrong with its installation is load()'s to say.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGNMENT = 64
"""What code generation assumes of every tensor's address; NumPy's own arrays are aligned to 16."""
_HUGE = 2 << 20


def allocate(nbytes: int) -> np.ndarray:
    """Zeroed bytes u8[nbytes] that start a page. Weights read through huge pages miss the TLB far less often."""
    if nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, max(nbytes, 1))
    else:  # private: shared memory, which mmap makes by default, gets none
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def item_size(dtype: str) -> int:
    """Bytes of one element. Raises ValueError for a name that is no element type."""
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        import tvm_ffi

        return int(tvm_ffi.dtype(dtype).itemsize)


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return item_size(dtype) * int(np.prod(shape, dtype=np.int64))


def tensor_in(memory: np.ndarray, dtype: str, shape: Sequence[int]) -> Any:
    """The tensor whose data are the bytes ``memory``, which it keeps alive; its address should be a multiple of ALIGNMENT.

    Element types that NumPy lacks (bfloat16) are as good as any. Needs the TVM runtime to be loaded.
    """
    import tvm_ffi

    view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tvm_ffi.from_dlpack(memory), tvm_ffi.Shape(tuple(shape)), tvm_ffi.dtype(dtype), 0)


@dataclass(frozen=True)
class Buffer:
    """A tensor, and its elements as an array: views of one piece of memory, which is the host's.

    Of element types that NumPy lacks, elements are unsigned integers of their size.
    """

    tensor: Any
    array: np.ndarray
    memory: np.ndarray
    dtype: str

    def first(self, start: int, count: int) -> Buffer:
        """So many entries of the first axis, from ``start`` on; its address is aligned if :meth:`may_start` says so."""
        if (start, count) == (0, len(self.array)):
            return self
        each = self.array[:1].nbytes
        return buffer_in(self.memory[start * each : (start + count) * each], self.dtype, (count, *self.array.shape[1:]))

    def may_start(self, entry: int) -> bool:
        """Whether compiled code may be given the part from an entry of the first axis on."""
        return entry * self.array[:1].nbytes % ALIGNMENT == 0

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def set(self, array: np.ndarray) -> None:
        """Sets all elements."""
        self.array[...] = array

    def put(self, first: int, x: np.ndarray, live: np.ndarray | None = None) -> None:
        """Sets entries of the first axis, of those from ``first`` on that are ``live``."""
        part = self.array[first : first + len(x)]
        index: Any = ... if live is None else live
        part[index] = x[index]

    def fill(self, index: Any, value: float | Buffer) -> None:
        """Sets a part, as NumPy indexes it, to a number or to what another buffer holds."""
        if isinstance(value, Buffer):
            self.array[index] = value.array
        elif self.array.dtype.name == self.dtype or not value:
            self.array[index] = value
        else:  # of what NumPy lacks there is bfloat16 alone: the upper half of f32
            self.array[index] = np.float32(value).view(np.uint32) >> 16

    def swap(self, a: Any, b: Any) -> None:
        """Exchanges two parts."""
        kept = self.array[a].copy()
        self.array[a] = self.array[b]
        self.array[b] = kept


def buffer_in(memory: np.ndarray, dtype: str, shape: Sequence[int]) -> Buffer:
    """The buffer whose data are the bytes ``memory``."""
    return Buffer(tensor_in(memory, dtype, shape), memory.view(_element(dtype)).reshape(shape), memory, dtype)


def zeros(dtype: str, shape: Sequence[int]) -> Buffer:
    """A buffer of zeros."""
    return buffer_in(allocate(size_of(dtype, shape)), dtype, shape)


def buffer_of(array: np.ndarray) -> Buffer:
    """A buffer with a copy of ``array``."""
    made = zeros(array.dtype.name, array.shape)
    made.array[...] = array
    return made


def tensor_of(array: np.ndarray) -> Any:
    """A tensor with a copy of ``array``."""
    return buffer_of(array).tensor


def array_of(tensor: Any) -> np.ndarray:
    """The elements of a tensor that compiled code returned; no copy."""
    try:
        return np.from_dlpack(tensor)
    except RuntimeError:  # a type that NumPy lacks
        import tvm_ffi

        dtype = str(tensor.dtype)
        view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        kind = tvm_ffi.dtype(f"uint{8 * item_size(dtype)}")
        found: np.ndarray = np.from_dlpack(view(tensor, tvm_ffi.Shape(tuple(tensor.shape)), kind, 0))
        return found.view(_element(dtype))


def _element(dtype: str) -> np.dtype[Any]:
    """NumPy's own type, or that of a package which knows it, else an unsigned integer of its size."""
    try:
        return np.dtype(dtype)
    except TypeError:
        return np.dtype(f"u{item_size(dtype)}")


class HostMemory:
    """The host's memory, where sessions keep states; what it gives is what compiled code takes."""

    zeros = staticmethod(zeros)
    tensor_of = staticmethod(tensor_of)
    array_of = staticmethod(array_of)
