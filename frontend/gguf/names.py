"""What GGUF calls the tensors of a model, and its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Names without ``.weight`` and ``.bias``, GGUF's -> the checkpoint's within the part that makes hidden states."""

    layer: Mapping[str, str]
    """Within ``blk.N``; a name that ends in ``.weight`` or ``.bias`` stands for all of its parameter's."""
    whole: Mapping[str, str]
    layers: str = "layers"
    """What ``blk`` is called."""


_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_SANDWICH = {
    **_LAYER, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_WHOLE = {"token_embd": "embed_tokens", "output_norm": "norm"}
LLAMA = Names(_LAYER, _WHOLE)
GEMMA = Names(_SANDWICH, _WHOLE)
_BEHIND = {
    **_LAYER, "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
OLMO2 = Names({k: v for k, v in _BEHIND.items() if k not in ("attn_norm", "ffn_norm")}, _WHOLE)
GLM4 = Names({
    **_LAYER, "ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}, _WHOLE)  # fmt: skip
CHATGLM = Names({**_LAYER, "ffn_up": "mlp.gate_up_proj"}, _WHOLE)
PHI3 = Names({**_LAYER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, _WHOLE)
PHI2 = Names({
    **_LAYER, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}, {**_WHOLE, "output_norm": "final_layernorm"})  # fmt: skip
STARCODER2 = Names({**_LAYER, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, _WHOLE)
HUNYUAN = Names({
    **_LAYER, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm",
}, _WHOLE)  # fmt: skip
GPT_OSS = Names({
    **{k: v for k, v in _LAYER.items() if not k.startswith("ffn_")}, "post_attention_norm": "post_attention_layernorm",
    "attn_sinks.weight": "self_attn.sinks", "ffn_gate_inp": "mlp.router",
    **{f"ffn_{part}_exps.bias": f"mlp.{part}_bias" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_exps": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}, _WHOLE)  # fmt: skip
LFM2 = Names({
    "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv", "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
}, {"token_embd": "embed_tokens", "token_embd_norm": "embedding_norm"})  # fmt: skip
GPT2 = Names({
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}, {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}, "h")  # fmt: skip
GPTJ = Names({
    "attn_norm": "ln_1", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
    "attn_output": "attn.out_proj", "ffn_up": "mlp.fc_in", "ffn_down": "mlp.fc_out",
}, {"token_embd": "wte", "output_norm": "ln_f"}, "h")  # fmt: skip
MPT = Names({
    "attn_norm": "norm_1", "attn_qkv": "attn.Wqkv", "attn_output": "attn.out_proj", "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj", "ffn_down": "ffn.down_proj",
}, {"token_embd": "wte", "output_norm": "norm_f"}, "blocks")  # fmt: skip
_WIDE = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
GPT_NEOX = Names({
    **_WIDE, "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
}, {"token_embd": "embed_in", "output_norm": "final_layer_norm"})  # fmt: skip
BLOOM = Names({
    **_WIDE, "attn_norm": "input_layernorm", "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense", "ffn_norm": "post_attention_layernorm",
}, {
    "token_embd": "word_embeddings", "token_embd_norm": "word_embeddings_layernorm", "output_norm": "ln_f",
}, "h")  # fmt: skip
FALCON_40B = Names({**BLOOM.layer, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}, BLOOM.whole, "h")
SEED_OSS = Names({**_LAYER, "post_attention_norm": "post_attention_layernorm"}, _WHOLE)


def experts(part: str, feed: str = "mlp") -> Names:
    """Of a model whose mixtures are called ``part``, and layers without experts ``feed``."""
    return Names({
        **{k: v.replace("mlp.", f"{feed}.") for k, v in _LAYER.items()},
        "ffn_gate_inp": f"{part}.router", "ffn_gate_exps": f"{part}.gate_proj", "ffn_up_exps": f"{part}.up_proj",
        "ffn_down_exps": f"{part}.down_proj", "ffn_gate_shexp": f"{part}.shared_expert.gate_proj",
        "ffn_up_shexp": f"{part}.shared_expert.up_proj", "ffn_down_shexp": f"{part}.shared_expert.down_proj",
        "ffn_gate_inp_shexp": f"{part}.shared_expert_gate",
    }, _WHOLE)  # fmt: skip


DEEPSEEK2 = Names({
    **{k: v for k, v in experts("mlp").layer.items() if "shexp" not in k and k not in ("attn_k", "attn_v")},
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj", "exp_probs_b.bias": "mlp.correction",
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}, _WHOLE)  # fmt: skip
GLM4_MOE = Names({
    **{k: v for k, v in experts("mlp").layer.items() if k != "ffn_norm"},
    **{k: v for k, v in DEEPSEEK2.layer.items() if "shexp" in k or "exp_probs" in k},
    "post_attention_norm": "post_attention_layernorm",
}, _WHOLE)  # fmt: skip
BERT = Names({
    "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm", "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
}, {
    "token_embd": "embeddings.word_embeddings", "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings", "token_embd_norm": "embeddings.LayerNorm",
}, "encoder.layer")  # fmt: skip
JINA_BERT2 = Names({
    **{k: v for k, v in BERT.layer.items() if k not in ("ffn_up", "ffn_down", "layer_output_norm")},
    "ffn_up": "mlp.gated_layers", "ffn_down": "mlp.wo", "layer_output_norm": "mlp.layernorm",
}, BERT.whole, BERT.layers)  # fmt: skip
JINA_BERT2_APART = Names({
    **JINA_BERT2.layer, "ffn_up": "mlp.gated_layers_v", "ffn_gate": "mlp.gated_layers_w",
}, BERT.whole, BERT.layers)  # fmt: skip
_ROTATED = {"attn_output_norm": "norm1", "ffn_down": "mlp.fc2", "layer_output_norm": "norm2"}
_OF_ROTATED = {
    "token_embd": "embeddings.word_embeddings", "token_types": "embeddings.token_type_embeddings", "token_embd_norm": "emb_ln",
}  # fmt: skip
NOMIC_BERT = Names({
    **_ROTATED, "attn_qkv": "attn.Wqkv", "attn_output": "attn.out_proj", "ffn_up": "mlp.fc11", "ffn_gate": "mlp.fc12",
}, _OF_ROTATED, "encoder.layers")  # fmt: skip
JINA_BERT3 = Names({
    **_ROTATED, "attn_qkv": "mixer.Wqkv", "attn_output": "mixer.out_proj", "ffn_up": "mlp.fc1",
}, _OF_ROTATED, "encoder.layers")  # fmt: skip
MODERN_BERT = Names({
    "attn_norm": "attn_norm", "attn_qkv": "attn.Wqkv", "attn_output": "attn.Wo", "ffn_norm": "mlp_norm", "ffn_up": "mlp.Wi",
    "ffn_down": "mlp.Wo",
}, {"token_embd": "embeddings.tok_embeddings", "token_embd_norm": "embeddings.norm", "output_norm": "final_norm"})  # fmt: skip
