"""Folders of encoders as their authors published them, with code and names of their own: GTE, Nomic, Jina 2."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_sentence import GOLDEN, result
from wasat.frontend import ConfigError, from_pretrained
from wasat.frontend.models.config import Fields
from wasat.frontend.models.nomic import gte_of_its_authors

NEW = {
    "model_type": "new", "architectures": ["NewModel"], "logn_attention_clip1": False, "logn_attention_scale": False,
    "auto_map": {"AutoConfig": "configuration.NewConfig", "AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    "pack_qkv": True, "position_embedding_type": "rope", "layer_norm_type": "layer_norm", "unpad_inputs": False,
    "use_memory_efficient_attention": False, "rope_theta": 5000.0, "rope_scaling": None,
}  # fmt: skip
NOMIC = {
    "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0, "bos_token_id": None,
    "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"}, "causal": False,
    "dense_seq_output": True, "embd_pdrop": 0.0, "eos_token_id": None, "fused_bias_fc": True, "fused_dropout_add_ln": True,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048, "mlp_fc1_bias": False,
    "mlp_fc2_bias": False, "model_type": "nomic_bert", "n_embd": 32, "n_head": 4, "n_inner": 40, "n_layer": 2,
    "n_positions": 8192, "pad_vocab_size_multiple": 64, "parallel_block": False, "parallel_block_tied_norm": False,
    "prenorm": False, "qkv_proj_bias": False, "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None,
    "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "summary_type": "cls_index", "torch_dtype": "float32",
    "type_vocab_size": 2, "use_cache": True, "use_flash_attn": True, "use_rms_norm": False, "use_xentropy": True,
    "vocab_size": 90,
}  # fmt: skip


def published(name: str, to: Path, config: dict[str, Any], *drop: str) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder of a golden case with this configuration, and what is wanted of it."""
    folder = Path(shutil.copytree(GOLDEN / name, to))
    given = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in given.items() if k not in drop} if config["model_type"] == "new" else {}
    (folder / "config.json").write_text(json.dumps({**kept, **config}))
    return folder, dict(np.load(folder / "golden.npz"))


def test_gte_as_its_authors_published_it(tmp_path: Path) -> None:
    folder, golden = published("gte_cls", tmp_path / "m", NEW, "rope_parameters")
    found = result(from_pretrained(folder), tokens=golden["tokens"], lengths=golden["lengths"])
    np.testing.assert_allclose(found, golden["wanted"], atol=1e-5)


def test_gte_stretched_by_a_larger_base() -> None:
    """The formula as vLLM and its authors' code have it."""
    given = json.loads((GOLDEN / "gte_cls" / "config.json").read_text())
    del given["rope_parameters"], given["model_type"]
    fields = {**given, **NEW, "rope_scaling": {"type": "ntk", "factor": 2.0}}
    del fields["auto_map"], fields["model_type"]
    model = gte_of_its_authors(Fields(fields, "c"))
    rope = model.stack[0].rope
    exponents = np.arange(0, 8, 2) / 8
    want = 1.0 / (5000.0 * 2.0) ** exponents / 2.0 ** (2 / 8)
    np.testing.assert_allclose(rope.inv_freq, want, rtol=1e-6)
    assert rope.factor == 1.0


@pytest.mark.parametrize("change, message", [
    ({"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.5}}, "mixed_b is 0.5"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "only type ntk is implemented"),
    ({"rope_scaling": [2]}, "only type ntk is implemented"),
    ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
    ({"logn_attention_scale": True}, "logn_attention_scale is True"),
    ({"auto_map": {"AutoModel": "mine.MyModel"}}, "brings Python code of its own"),
])  # fmt: skip
def test_what_of_gte_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder, _ = published("gte_cls", tmp_path / "m", {**NEW, **change}, "rope_parameters")
    with pytest.raises(ConfigError) as e:
        from_pretrained(folder)
    assert message in str(e.value)


def test_nomic_as_its_authors_published_it(tmp_path: Path) -> None:
    folder, golden = published("nomic_mean", tmp_path / "m", NOMIC)
    program = from_pretrained(folder)
    assert program.interface.context == 8192
    found = result(program, tokens=golden["tokens"], lengths=golden["lengths"])
    np.testing.assert_allclose(found, golden["wanted"], atol=1e-5)
    longer, _ = published("nomic_mean", tmp_path / "longer", {**NOMIC, "rotary_scaling_factor": 2})
    assert from_pretrained(longer).interface.context == 2048  # beyond it each text is rotated by its length
    for change in ({"prenorm": True}, {"qkv_proj_bias": True}, {"activation_function": "gelu"}, {"rotary_emb_fraction": 0.5}):
        other, _ = published("nomic_mean", tmp_path / next(iter(change)), {**NOMIC, **change})
        with pytest.raises(ConfigError, match=f"{next(iter(change))} is "):
            from_pretrained(other)


JINA = {
    "model_type": "bert", "architectures": ["JinaBertModel"], "position_embedding_type": "alibi", "emb_pooler": "mean",
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}, "attn_implementation": None,
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 64, "model_max_length": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "feed_forward_type": "geglu", "pad_token_id": 0,
}  # fmt: skip


def jina(folder: Path, config: dict[str, Any]) -> tuple[Path, dict[str, np.ndarray]]:
    rng, shapes = np.random.default_rng(0), {
        "embeddings.word_embeddings.weight": (50, 24), "embeddings.token_type_embeddings.weight": (2, 24),
        "embeddings.LayerNorm.weight": (24,), "embeddings.LayerNorm.bias": (24,),
    }  # fmt: skip
    for i in range(2):
        at = f"encoder.layer.{i}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{at}.{part}.weight": (24, 24), f"{at}.{part}.bias": (24,)}
        for part in ("attention.output.LayerNorm", "mlp.layernorm"):
            shapes |= {f"{at}.{part}.weight": (24,), f"{at}.{part}.bias": (24,)}
        shapes |= {f"{at}.mlp.gated_layers.weight": (40, 24), f"{at}.mlp.wo.weight": (24, 20), f"{at}.mlp.wo.bias": (24,)}
    tensors = {k: rng.standard_normal(s).astype(np.float32) * np.float32(0.3) for k, s in shapes.items()}
    tensors |= {k: x + 1 for k, x in tensors.items() if "orm.weight" in k}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors


@pytest.mark.parametrize("kind", ["geglu", "reglu"])
def test_jina_2(kind: str, tmp_path: Path) -> None:
    """Beside the published computation, written down in f64: six heads, whose steepness is not all powers of one number."""
    folder, given = jina(tmp_path / "m", {**JINA, "feed_forward_type": kind})
    w = {k: x.astype(np.float64) for k, x in given.items()}
    slopes = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])

    def norm(x: np.ndarray, at: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return y * w[f"{at}.weight"] + w[f"{at}.bias"]

    def act(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0) if kind == "reglu" else x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))

    def embedding(ids: np.ndarray) -> np.ndarray:
        n = len(ids)
        x = norm(w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0],
                 "embeddings.LayerNorm")  # fmt: skip
        far = -slopes[:, None, None] * np.abs(np.arange(n)[:, None] - np.arange(n)[None, :])
        for i in range(2):
            at = f"encoder.layer.{i}"
            q, k, v = (
                (x @ w[f"{p}.weight"].T + w[f"{p}.bias"]).reshape(n, 6, 4).swapaxes(0, 1)
                for p in (f"{at}.attention.self.{name}" for name in ("query", "key", "value"))
            )
            scores = np.exp(q @ k.swapaxes(1, 2) / 2 + far)
            mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(n, 24)
            out = mixed @ w[f"{at}.attention.output.dense.weight"].T + w[f"{at}.attention.output.dense.bias"]
            x = norm(out + x, f"{at}.attention.output.LayerNorm")
            gate, wide = np.split(x @ w[f"{at}.mlp.gated_layers.weight"].T, 2, -1)
            x = norm(act(gate) * wide @ w[f"{at}.mlp.wo.weight"].T + w[f"{at}.mlp.wo.bias"] + x, f"{at}.mlp.layernorm")
        return np.asarray(x.mean(0))

    tokens, lengths = np.random.default_rng(1).integers(1, 50, (3, 17)), np.array([17, 4, 9])
    program = from_pretrained(folder)
    found = result(program, tokens=tokens, lengths=lengths)
    want = np.stack([embedding(row[:n]) for row, n in zip(tokens, lengths)])
    assert want.std() > 0.3
    np.testing.assert_allclose(found, want, atol=2e-5)


def test_what_of_jina_2_is_refused(tmp_path: Path) -> None:
    for i, (change, message) in enumerate([
        ({"feed_forward_type": "original"}, "feed_forward_type 'original' is not implemented with ALiBi"),
        ({"auto_map": {"AutoModel": "x.OtherBert"}}, "brings Python code of its own"),
    ]):  # fmt: skip
        folder, _ = jina(tmp_path / str(i), {**JINA, **change})
        with pytest.raises(ConfigError, match=message):
            from_pretrained(folder)
