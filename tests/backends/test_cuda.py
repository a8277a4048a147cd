"""CUDA without a GPU: the programs that run on the CPU compile, caches in place and integer weights included."""

from __future__ import annotations

from typing import Any

import pytest
from decoder import Decoder
from wasat.backends.tvm.build import build
from wasat.backends.tvm.targets import target_named


def device_code(module: Any) -> str:
    """The CUDA source in a compiled module."""
    if module.kind == "cuda":
        return str(module.inspect_source("cuda"))
    return "".join(device_code(m) for m in module.imports)


@pytest.mark.parametrize("weights", ["f16", "int4"])
def test_decoder_compiles(weights: str) -> None:
    program = Decoder(weights=weights, windows=(None, 5)).program()
    target = target_named("cuda:sm_90")
    library = build(program, target)
    code = device_code(library.executable.mod)
    assert "__global__" in code
    stored = {"f16": "float16", "int4": "int4b32f16"}[weights]
    products = [f"{kind}_{stored}" for kind in ("gemm", "gemv4", "embedding")]
    assert [k for k in (*products, "cache_write_ring", "attention_whole_full", "decode_split") if k not in code] == []
    assert not library.left
    # states keep their plain form: the layouts of the CPU's kernels are the CPU's affair
    assert all(str(t.shape[2:]) == "(2, 24)" for t in target.state_types(program).values())
