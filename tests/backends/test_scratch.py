"""Where a kernel's scratch lies: small buffers on the stack, in any loop or branch; the others in TVM's pool."""

from __future__ import annotations

import pytest

tvm = pytest.importorskip("tvm")
from wasat.backends.tvm.cpu.kernels.emit import Kernel, symbol
from wasat.backends.tvm.cpu.tir_pipeline import lowering

MARK = "disable_lower_builtin"


def lowered(kernel: Kernel) -> str:
    module = tvm.IRModule({"f": kernel.build().with_attr("target", tvm.target.Target("llvm"))})
    for step in lowering().passes:
        module = step(module)
        if step.info.name == "ScratchOnStack":
            return str(module)
    raise AssertionError("the pass is not in the pipeline")


@pytest.mark.parametrize("size, marked", [(1, True), (4096, True), (4097, False), (symbol("n"), False)])
def test_what_is_small_and_known_is_marked(size: int, marked: bool) -> None:
    k = Kernel("f")
    y = k.param("y", (4,), "float32")
    with k.loop(4) as i:
        scratch = k.scratch(size, "float32")
        k.store(scratch, i, y[i])
        k.store(y, i, scratch[3 - i])
    assert (MARK in lowered(k)) == marked


def test_inside_branches_and_parallel_loops() -> None:
    k = Kernel("f")
    y = k.param("y", (8,), "float32")
    with k.loop(8, parallel=True) as i, k.when(i > 2):
        scratch = k.scratch(512, "float32")
        k.store(scratch, i, y[i])
        k.store(y, i, scratch[i])
    assert lowered(k).count(MARK) == 1


def test_a_function_keeps_no_more_than_its_share_of_the_stack() -> None:
    k = Kernel("f")
    y = k.param("y", (4,), "float32")
    buffers = [k.scratch(4096, "float32") for _ in range(12)]  # all needed to the end: none lies in another's place
    for i, b in enumerate(buffers):
        k.store(b, i, y[i % 4])
    k.store(y, 0, sum(b[i] for i, b in enumerate(buffers)))
    assert lowered(k).count(MARK) == 8  # 128 KB
