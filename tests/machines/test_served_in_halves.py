"""A decoder whose activations and caches are in half precision, through the compiler, the driver and a session on CUDA."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from wasat.frontend.huggingface import from_config
from wasat.ir import ArrayParam

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
from rounding import assert_near, bound, spread
from soft_cuda import soft_gpu

import wasat as ws

pytestmark = pytest.mark.machines
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_session(tmp_path: Path) -> None:
    """A prompt, whose products are on tensor cores, then steps: logits are the interpreter's, as far as bf16 has them."""
    half, weights = "bf16", "int8"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    program = from_config(tmp_path / "config.json")
    rng = np.random.default_rng(3)
    for name, p in program.params.items():
        x = (0.1 * rng.standard_normal(p.type.concrete({}))).astype(np.float32)  # type: ignore[union-attr]
        program.params[name] = ArrayParam(x + ("norm" in name), p.type)
    tokens = rng.integers(3, 96, (1, 14))
    whole, _ = ws.optimize(program, kv_cache=False, quantize=weights, activation=half)
    logits = ws.run(whole, tokens=tokens)["logits"]
    [far] = spread(whole["forward"], {"tokens": tokens}, {k: whole.load(k) for k in whole.params})
    with soft_gpu():
        report = ws.compile(program, tmp_path / "a.wasat", target="cuda:sm_90", quantize=weights, activation=half)
        kernels = json.loads((tmp_path / "a.wasat" / "plan.json").read_text())["kernels"]
        session = ws.load(tmp_path / "a.wasat").session(1)
        rows = [session.step(tokens[:, :11]), *(session.step(tokens[:, i : i + 1]) for i in range(11, 14))]
    assert "5 products of many rows on tensor cores" in report.explain()
    assert "2 attentions of many queries on tensor cores" in report.explain()
    assert sum("_mma_" in k for k in kernels) >= 4
    assert not any("_gemm_" in k or "matmul" in k or "softmax" in k for k in kernels)
    assert_near(np.concatenate([np.asarray(r).reshape(1, -1) for r in rows]), logits[0, 10:], bound(logits, far)[0, 10:])
