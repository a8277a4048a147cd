"""CUDA without a GPU: the programs that run on the CPU compile, caches in place and integer weights included."""

from __future__ import annotations

import pytest
from decoder import Decoder
from wasat.backends.tvm.build import plan
from wasat.backends.tvm.targets import target_named


@pytest.mark.parametrize("weights", ["f16", "int4"])
def test_decoder_compiles(weights: str) -> None:
    program = Decoder(weights=weights, windows=(None, 5)).program()
    target = target_named("cuda:sm_90")
    made = plan(program, target)
    code = made.launches.source
    assert "__global__" in code
    stored = {"f16": "float16", "int4": "int4b32f16"}[weights]
    wanted = [f"{kind}_{stored}" for kind in ("gemm", "gemv4", "embedding")]
    assert [k for k in (*wanted, "cache_write_ring", "attention_whole_full", "decode_split") if k not in code] == []
    products, attentions = made.left
    assert products.why.startswith("8 products of many rows without tensor cores: its activations are ")
    assert attentions.why == "2 attentions of many queries without tensor cores: its queries are f32"
    # states keep their plain form: the layouts of the CPU's kernels are the CPU's affair
    assert all(str(t.shape[2:]) == "(2, 24)" for t in target.state_types(program).values())
