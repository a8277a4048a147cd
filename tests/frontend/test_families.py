"""Families of decoders: logits equal to transformers', and what of them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_files as files
import numpy as np
import pytest
from rounding import assert_near, bound, spread
from safetensors.numpy import load_file, save_file
from wasat.frontend import CheckpointError, ConfigError, Fields, from_pretrained
from wasat.frontend.huggingface import build
from wasat.ir import evaluate

CASES = sorted(p.stem for p in files.FAMILIES.glob("*.npz"))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config, shapes, ids, logits = files.golden(name)
    context = 32 if name == "phi3_longrope_long" else None  # more than the first 16, so with the factors of long texts
    program = from_pretrained(files.write(tmp_path / "m", config, shapes), context)
    params = {k: p.load() for k, p in program.params.items()}
    g, inputs = program["forward"], {"tokens": ids}
    assert logits.std() > 0.2
    assert_near(evaluate(g, inputs, params)[0], logits, bound(logits, spread(g, inputs, params)[0]))


@pytest.mark.parametrize("name, change, message", [
    ("codegen", {"n_head": 2}, "n_head is 2: the reference implementation has four parts of them"),
    ("glm4_moe", {"n_group": 3}, "8 experts in 3 groups"),
    ("glm4_moe", {"scoring_func": "softmax"}, "knows no other"),
    ("gpt_bigcode", {"num_key_value_heads": 2}, "multi_query says how many heads keys have"),
    ("granitemoe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 4 experts"),
    ("lfm2", {"layer_types": ["conv", "sliding_attention", "conv"]}, "expected full_attention or conv for each of 3 layers"),
    ("llama4_text", {"num_experts_per_tok": 2}, "a token that several experts read"),
    ("llama4_text", {"moe_layers": [1, 4]}, "moe_layers is [1, 4]; expected numbers of layers, of which there are 4"),
    ("llama4_text", {"no_rope_layers": [1, 2, 1, 0]}, "expected 1 (rotated) or 0 for each of 4 layers"),
    ("llama4_text", {"layer_types": ["full_attention"]}, "expected chunked_attention or full_attention for each of 4"),
    ("cohere", {"use_qk_norm": True}, "norms of queries and keys are not implemented"),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern is 0: only a period is read"),
    ("exaone4", {"layer_types": "absent", "sliding_window_pattern": "LLLG"}, "only a period is read"),
    ("glm", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor = 1.5 must be at most 1"),
    ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "alpha": 1e3}}, "rope_type 'dynamic' is not implemented"),
    ("ministral", {"sliding_window": None}, "sliding_window is null"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 4 experts"),
    ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has rope_theta"),
    ("phi", {"tie_word_embeddings": True}, "a head with a bias of its own"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is True"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "every head has keys of its own"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "knows softmax alone"),
    ("deepseek_v2", {"topk_method": "best"}, "topk_method 'best' is not implemented"),
    ("deepseek_v3", {"n_group": 3}, "8 experts in 3 groups"),
    ("deepseek_v3", {"topk_group": 1}, "no 3 of them (num_experts_per_tok) can be chosen so"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "layers with and without experts by turns"),
    ("bloom", {"n_embed": 40}, "hidden_size is 48, and n_embed 40; keep the one that is meant"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "residuals behind norms are not implemented"),
    ("falcon", {"num_kv_heads": 3}, "num_attention_heads 4 is not a multiple of num_kv_heads 3"),
    ("falcon", {"parallel_attn": False}, "the newer architecture has attention and feed-forward side by side"),
    ("falcon_7b", {"num_ln_in_parallel_attn": 2}, "only the newer architecture has two norms"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "divided by the number of the layer"),
    ("gpt2", {"n_head": 5}, "n_embd 32 does not split into 5 heads"),
    ("gpt_neox", {"rotary_pct": 0.3, "partial_rotary_factor": 0.4}, "keep the one that is meant"),
    ("gptj", {"rotary_dim": 9}, "rotary_dim is 9"),
    ("gptj", {"tie_word_embeddings": True}, "a head with a bias of its own"),
    ("mpt", {"attn_config": {"alibi": False}}, "only causal attention of many heads with ALiBi"),
    ("mpt", {"attn_config": {"alibi_bias_max": 4}}, "the reference implementation knows no other"),
    ("mpt", {"expansion_ratio": 3}, "the reference implementation widens four times"),
    ("opt", {"do_layer_norm_before": False}, "norms behind layers"),
    ("opt", {"word_embed_proj_dim": 16}, "embeddings of another width"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("gpt_oss", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 4 experts"),
    ("phi3_longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
     "short_factor has 1 numbers, of 4 frequencies"),
    ("phi3_longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": ["a"], "long_factor": [1.0]}},
     "short_factor.at = 'a' must be a number"),
    ("phi3", {"original_max_position_embeddings": "absent", "rope_parameters": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
     "original_max_position_embeddings is missing"),
    ("qwen2_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ("qwen3_moe", {"num_local_experts": "absent"}, "num_local_experts is missing"),
    ("seed_oss", {"num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
    ("smollm3", {"no_rope_layers": [1, 2, 0]}, "no_rope_layers is [1, 2, 0]"),
    ("smollm3", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
    ("granite", {"new_multiplier": 2.0}, "granite has no meaning for new_multiplier = 2.0"),
    ("starcoder2", {"hidden_act": "xielu"}, "hidden_act 'xielu' is not implemented"),
])  # fmt: skip
def test_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    config = {k: v for k, v in {**files.golden(name)[0], **change}.items() if v != "absent"}
    with pytest.raises(ConfigError) as e:
        build(Fields(config, "config.json"))
    assert message in str(e.value)


def test_what_a_family_means_by_absent_fields() -> None:
    def built(name: str, *absent: str, **change: Any) -> Any:
        config = {k: v for k, v in {**files.golden(name)[0], **change}.items() if k not in absent}
        return build(Fields(config, "config.json"))[1].model.layers

    assert [x.self_attn.window for x in built("cohere2", "layer_types", num_hidden_layers=5)] == [6, 6, 6, None, 6]
    assert [x.self_attn.window for x in built("olmo3", "layer_types", num_hidden_layers=5)] == [6, 6, 6, None, 6]
    assert [x.self_attn.window for x in built("exaone4", "layer_types", num_hidden_layers=5)] == [6, 6, 6, None, 6]
    assert [x.self_attn.window for x in built("ministral", "layer_types")] == [6, 6]
    exaone = built("exaone4", sliding_window=None, layer_types=["full_attention"] * 3)
    assert all(x.self_attn.rope is not None for x in exaone)
    smollm = built("smollm3", "no_rope_layers", num_hidden_layers=4)
    assert [x.self_attn.rope is None for x in smollm] == [False, False, False, True]
    assert built("glm", "attention_bias")[0].self_attn.q_proj.bias is not None
    bare = {"rope_parameters": {"rope_type": "default"}}
    pairs = {n: len(built(n, **bare)[0].self_attn.rope.inv_freq) for n in ("phi", "stablelm", "nemotron", "glm")}
    assert pairs == {"phi": 2, "stablelm": 1, "nemotron": 4, "glm": 4}


def test_a_stack_of_experts_is_read_from_its_matrices(tmp_path: Path) -> None:
    config, shapes, _, _ = files.golden("mixtral")
    program = from_pretrained(files.write(tmp_path / "m", config, shapes))
    name = "model.layers.1.block_sparse_moe"
    stack = program.load(f"{name}.up_proj")
    for i in range(4):
        np.testing.assert_array_equal(stack[i], files.weight(f"{name}.experts.{i}.w3.weight", (40, 32), 1))
    del shapes[f"{name}.experts.2.w3.weight"]
    shapes[f"{name}.experts.1.w1.weight"] = (41, 32)
    with pytest.raises(CheckpointError) as e:
        from_pretrained(files.write(tmp_path / "m", config, shapes))
    assert f"missing: {name}.experts.2.w3.weight f32[40, 32]" in str(e.value)
    assert f"misshaped: {name}.experts.1.w1.weight is [41, 32]" in str(e.value)


def test_older_files_of_gemma_say_gelu_and_mean_its_approximation(tmp_path: Path) -> None:
    config, shapes, ids, logits = files.golden("gemma")
    config["hidden_act"] = "gelu"
    program = from_pretrained(files.write(tmp_path / "m", config, shapes))
    found = evaluate(program["forward"], {"tokens": ids}, {k: p.load() for k, p in program.params.items()})[0]
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=2e-5)


def test_latent_attention_keeps_the_latent_vectors(tmp_path: Path) -> None:
    from wasat.driver import optimize

    config, shapes, _, _ = files.golden("deepseek_v3")
    program = optimize(from_pretrained(files.write(tmp_path / "m", config, shapes)))[0]
    kept = [str(i.type) for i in program["decode"].inputs if i.name not in ("tokens", "past")]
    assert kept == ["f32[b, c, 1, 20]"] * 2  # 16 and the 4 that are rotated, not 4 heads of 10 and 10


@pytest.mark.parametrize("name, first, buffers", [
    ("gpt2", "transformer.", {"h.0.attn.bias": (1, 1, 64, 64), "h.1.attn.masked_bias": (1,)}),
    ("gpt_neox", "gpt_neox.", {"layers.0.attention.bias": (1, 1, 64, 64), "layers.1.attention.rotary_emb.inv_freq": (2,)}),
    ("bloom", "transformer.", {}),
    ("opt", "model.", {}),
])  # fmt: skip
def test_checkpoints_without_the_first_part_of_names(
    name: str, first: str, buffers: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """As their authors published them: of the part without a head, with tensors that transformers no longer has."""
    config, shapes, _, _ = files.golden(name)
    whole = from_pretrained(files.write(tmp_path / "whole", config, shapes))
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    bare = {k.removeprefix(first): x for k, x in tensors.items()} | {k: np.ones(s, np.float32) for k, s in buffers.items()}
    save_file(bare, tmp_path / "whole" / "model.safetensors")
    program = from_pretrained(tmp_path / "whole")
    assert program.params.keys() == whole.params.keys()
    for k in whole.params:
        assert np.array_equal(program.load(k), files.weight(k, tensors[k].shape, 1.0).T if "c_" in k and tensors[k].ndim > 1
                              else tensors[k]), k  # fmt: skip


def test_longrope_holds_up_to_its_original_context(tmp_path: Path) -> None:
    """The names and places that files had before are read to the same frequencies."""
    config, shapes, _, _ = files.golden("phi3_longrope")
    program = from_pretrained(files.write(tmp_path / "m", config, shapes))
    assert program.interface.context == 32
    given = config.pop("rope_parameters")
    older = {"type": "su", **{k: given[k] for k in ("short_factor", "long_factor")}}
    configs = ({**config, "rope_scaling": older, "rope_theta": given["rope_theta"]}, {**config, "rope_parameters": given})
    turned = [build(Fields(c, "c"))[1].model.layers[0].self_attn.rope for c in configs]
    assert turned[0].factor == turned[1].factor > 1.1
    np.testing.assert_array_equal(turned[0].inv_freq, turned[1].inv_freq)


def test_a_context_is_chosen(tmp_path: Path) -> None:
    """Up to the first context the short factors, beyond it the long ones; of any model at most what it has."""
    import wasat as ws
    from wasat.driver import described

    config, shapes, _, _ = files.golden("phi3_longrope")
    folder = files.write(tmp_path / "m", config, shapes)
    rates = {}
    for context, stated in ((None, 32), (32, 32), (5, 5), (33, 33), (128, 128)):
        program = ws.load_program(folder, context=context)
        assert program.interface.context == stated
        rope = build(_asked(Fields(config, "c"), context))[1].model.layers[0].self_attn.rope
        rates[context] = rope.inv_freq.tolist()
    assert rates[None] == rates[32] == rates[5] != rates[33] == rates[128]
    assert described(folder, 100).interface.context == 100
    assert described(folder, 20).interface.context == 32
    for context in (0, -1, 129):
        with pytest.raises(ConfigError, match=f"context is {context}; the model takes 1 to "):
            from_pretrained(folder, context)
    with pytest.raises(ConfigError, match="context is 'many'; expected a number"):
        from_pretrained(folder, "many")  # type: ignore[arg-type]
    del config["rope_parameters"]["long_factor"]
    with pytest.raises(ConfigError, match="long_factor is missing"):
        from_pretrained(files.write(tmp_path / "n", config, shapes))
    (tmp_path / "text.txt").write_text("graph @f(%x: f32[2]) -> (%x) { return %x }")
    with pytest.raises(ws.WasatError, match="only of these, the context is chosen"):
        ws.load_program(tmp_path / "text.txt", context=3)


def _asked(fields: Fields, context: int | None) -> Fields:
    fields.serve(context)
    return fields


@pytest.mark.parametrize("name", ["falcon_rw", "bloom"])
def test_alibi_is_of_the_cached_attention(name: str, tmp_path: Path) -> None:
    from wasat.driver import optimize

    config, shapes, _, _ = files.golden(name)
    ops = [n.op.name for n in optimize(from_pretrained(files.write(tmp_path / "m", config, shapes)))[0]["decode"].nodes]
    assert (ops.count("cached_attention"), ops.count("softmax")) == (2, 0)


def test_short_convolutions_keep_their_last_inputs(tmp_path: Path) -> None:
    from wasat.driver import optimize

    config, shapes, _, _ = files.golden("lfm2_older")
    program = optimize(from_pretrained(files.write(tmp_path / "m", config, shapes)))[0]
    kept = [str(i.type) for i in program["decode"].inputs if i.name not in ("tokens", "past")]
    assert kept == ["f32[b, c, 2, 8]"] * 2 + ["f32[b, 3, 32]"] * 2


def test_gates_and_what_they_gate_stand_one_after_the_other(tmp_path: Path) -> None:
    config, shapes, _, _ = files.golden("granitemoe")
    program = from_pretrained(files.write(tmp_path / "m", config, shapes))
    name = "model.layers.1.block_sparse_moe"
    both = files.weight(f"{name}.input_linear.weight", (4, 80, 32), 1)
    np.testing.assert_array_equal(program.load(f"{name}.gate_proj"), both[:, :40])
    np.testing.assert_array_equal(program.load(f"{name}.up_proj"), both[:, 40:])


@pytest.mark.parametrize("name", ["glm", "mixtral", "cohere2", "gpt_oss", "falcon", "granitemoe"])
def test_caches_are_derived_and_rotation_and_attention_fused(name: str, tmp_path: Path) -> None:
    from wasat.driver import optimize

    config, shapes, _, _ = files.golden(name)
    program = optimize(from_pretrained(files.write(tmp_path / "m", config, shapes)))[0]
    ops = [n.op.name for n in program["decode"].nodes]
    turned = 2 if name == "cohere2" else 4  # one layer of it is not
    assert (ops.count("cached_attention"), ops.count("rope"), ops.count("sin")) == (2, turned, 0)
