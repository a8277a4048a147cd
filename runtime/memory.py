"""Memory for tensors: zeroed, aligned as compiled code assumes, in huge pages where the system has them.

tvm_ffi is imported where it is used, here and in module.py: what is wrong with its installation is load()'s to say.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
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


def zeros(dtype: str, shape: Sequence[int]) -> tuple[Any, np.ndarray]:
    """A tensor of zeros and its elements as a NumPy array (as unsigned integers of their size where NumPy lacks the type)."""
    memory = allocate(size_of(dtype, shape))
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(f"u{item_size(dtype)}")
    return tensor_in(memory, dtype, shape), memory.view(kind).reshape(shape)


def elements(tensor: Any) -> np.ndarray:
    """The elements of a tensor, not copied (as unsigned integers of their size where NumPy lacks the type)."""
    import tvm_ffi

    try:
        np.dtype(str(tensor.dtype))
    except TypeError:
        view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        kind = tvm_ffi.dtype(f"uint{8 * item_size(str(tensor.dtype))}")
        tensor = view(tensor, tvm_ffi.Shape(tuple(tensor.shape)), kind, 0)
    return np.from_dlpack(tensor)


def copied(dtype: str, array: np.ndarray) -> tuple[Any, np.ndarray]:
    """A tensor of this type with a copy of elements, and these as an array that can be written."""
    made = zeros(dtype, array.shape)
    made[1][...] = array
    return made


def tensor_of(array: np.ndarray) -> Any:
    """A tensor with a copy of ``array``."""
    tensor, view = zeros(array.dtype.name, array.shape)
    view[...] = array
    return tensor
