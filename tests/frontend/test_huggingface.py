"""Hugging Face folders: logits equal to transformers', and configurations that must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rounding import DRAWS, assert_near, bound, spread
from safetensors.numpy import save_file
from wasat.frontend import FAMILIES, CheckpointError, ConfigError, Fields, FileParam, from_pretrained
from wasat.frontend.huggingface import build
from wasat.ir import Generation, Origin, Program, evaluate, parse, verify

GOLDEN = Path(__file__).parent.parent / "golden" / "hf"
PYGEMMA = GOLDEN.parent.parent.parent / "examples" / "pygemma"
CASES = sorted(p.parent for p in GOLDEN.glob("*/golden.npz"))

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "bfloat16", "use_cache": True, "hidden_act": "silu",
}  # fmt: skip


def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    return build(Fields(config, "config"))[1].init(0)


def save(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def shard(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(weights)
    where: dict[str, str] = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def logits(program: Program, ids: np.ndarray) -> np.ndarray:
    return evaluate(program["forward"], {"tokens": ids}, {k: p.load() for k, p in program.params.items()})[0]


def allowed(program: Program, ids: np.ndarray, want: np.ndarray, runs: int = DRAWS) -> np.ndarray:
    """How far each logit may be off: twice what rounding moves it by, whatever the largest one is."""
    params = {k: p.load() for k, p in program.params.items()}
    return bound(want, spread(program["forward"], {"tokens": ids}, params, runs)[0] / 2)


def assert_logits(program: Program, ids: np.ndarray, want: np.ndarray, runs: int = DRAWS) -> None:
    assert_near(logits(program, ids), want, allowed(program, ids, want, runs))


@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_logits_equal_transformers(folder: Path) -> None:
    program = from_pretrained(folder)
    graph = program["forward"]
    program.verify()
    assert str(graph.outputs[0].type).startswith("f32[b, s, ")
    assert str(parse(str(graph))) == str(graph)
    golden = np.load(folder / "golden.npz")
    assert_logits(program, golden["ids"], golden["logits"])


@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_an_error_in_a_small_logit_is_seen(folder: Path) -> None:
    """One of 5e-5 in the smallest of each row, which is next to nothing beside the largest, in nine of ten rows and more."""
    golden = np.load(folder / "golden.npz")
    ids, want = golden["ids"][:, :12], golden["logits"][:, :12]
    smallest = np.abs(want).argmin(-1)[..., None]
    assert (np.take_along_axis(allowed(from_pretrained(folder), ids, want), smallest, -1) < 5e-5).mean() > 0.9


def test_the_trained_example_equals_transformers() -> None:
    program = from_pretrained(PYGEMMA)
    golden = np.load(PYGEMMA / "golden.npz")
    assert_logits(program, golden["ids"][None], golden["logits"][None], runs=12)
    # of 409,600 elements, five draws happen to move one by a hundredth of what they move its neighbours by
    for name in ("greedy_0", "greedy_1", "greedy_2"):
        ids = golden[name]
        written = logits(program, ids[None])[0].argmax(-1)[:-1]
        assert_array_equal(written[-100:], ids[-100:])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_golden_case(family: str) -> None:
    here = any(json.loads((c / "config.json").read_text())["model_type"] == family for c in CASES)
    assert here or (GOLDEN.parent / "families" / f"{family}.npz").exists()  # tests/frontend/test_families.py


def test_interface_and_lazy_parameters(tmp_path: Path) -> None:
    weights = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors(LLAMA).items()}
    folder = save(tmp_path / "tiny", LLAMA, weights)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    program = from_pretrained(folder)
    m = program.interface
    assert (m.name, m.context, m.vocab, m.generation) == ("tiny", 64, 40, Generation(1, (7,)))
    assert program.origin == Origin("llama", str(folder / "tokenizer.json"))
    source = program.params["model.embed_tokens.weight"]
    assert isinstance(source, FileParam)
    assert str(source.type) == "f32[40, 16]"
    loaded = source.load()
    assert loaded.dtype == np.float32
    assert_array_equal(loaded, weights["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_types_and_shards_do_not_change_the_result(tmp_path: Path, dtype: Any) -> None:
    weights = {k: v.astype(ml_dtypes.float8_e4m3fn).astype(dtype) for k, v in tensors(LLAMA).items()}
    ids = np.arange(9, dtype=np.int64)[None]
    one = logits(from_pretrained(save(tmp_path / "one", LLAMA, weights)), ids)
    two = logits(from_pretrained(shard(tmp_path / "two", LLAMA, weights)), ids)
    assert_array_equal(one, two)
    wide = {k: v.astype(np.float32) for k, v in weights.items()}
    assert_array_equal(one, logits(from_pretrained(save(tmp_path / "wide", LLAMA, wide)), ids))


def test_tied_heads(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    weights = tensors(config)
    assert "lm_head.weight" not in weights
    ids = np.arange(9, dtype=np.int64)[None]
    want = logits(from_pretrained(save(tmp_path / "tied", config, weights)), ids)
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    assert_array_equal(logits(from_pretrained(save(tmp_path / "both", config, both)), ids), want)
    only = {k: v for k, v in both.items() if k != "model.embed_tokens.weight"}
    assert_array_equal(logits(from_pretrained(save(tmp_path / "only", config, only)), ids), want)
    both["lm_head.weight"] = both["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="different numbers"):
        from_pretrained(save(tmp_path / "other", config, both))


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    weights = {**tensors(LLAMA), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    from_pretrained(save(tmp_path / "old", LLAMA, weights))


CHANGES: dict[str, list[dict[str, Any]]] = {
    "llama": [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_theta": 600.0}}, {"hidden_act": "gelu"}],
    "llama3_rope_tied": [{"rope_parameters": {"rope_theta": 5000.0}}],
    "llama_bias_sharded": [
        {"rope_parameters": {"rope_theta": 1000.0}}, {"hidden_act": "gelu_pytorch_tanh"}, {"rms_norm_eps": 1e-3}],
    "qwen2": [{"sliding_window": 6}, {"layer_types": ["full_attention"] * 3}, {"layer_types": ["sliding_attention"] * 3}],
    "qwen2_yarn_tied": [{"rope_parameters": {"rope_theta": 1000.0}}],
    "mistral": [{"sliding_window": 5}, {"sliding_window": None}],
    "gemma3": [
        {"sliding_window": 8}, {"query_pre_attn_scalar": 16}, {"hidden_activation": "gelu"},
        {"rope_parameters": {"full_attention": {"rope_theta": 5000.0}, "sliding_attention": {"rope_theta": 100.0}}}],
    "gemma2": [
        {"attn_logit_softcapping": None}, {"final_logit_softcapping": 30.0}, {"sliding_window": 8},
        {"query_pre_attn_scalar": 16}, {"rope_parameters": {"rope_theta": 5000.0}},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}],
    "gemma3_softcap_untied": [{"final_logit_softcapping": None}, {"layer_types": ["sliding_attention"] * 3}],
}  # fmt: skip


@pytest.mark.parametrize("name, change", [(name, c) for name, changes in CHANGES.items() for c in changes])
def test_the_golden_cases_notice_each_field(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    golden = np.load(GOLDEN / name / "golden.npz")
    folder = _copy(GOLDEN / name, tmp_path / "m", {**config, **change})
    assert float(np.abs(logits(from_pretrained(folder), golden["ids"]) - golden["logits"]).max()) > 1e-3


def _copy(source: Path, folder: Path, config: dict[str, Any]) -> Path:
    """A model folder with another config.json."""
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_older_config_files_of_gemma2_mean_the_same(tmp_path: Path) -> None:
    """As its checkpoints have them: the base of RoPE by itself, no kinds of layers, an activation that nobody reads."""
    config = json.loads((GOLDEN / "gemma2" / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["layer_types"]
    older = {**config, "rope_theta": theta, "cache_implementation": "hybrid", "hidden_act": "relu"}
    golden = np.load(GOLDEN / "gemma2" / "golden.npz")
    program = from_pretrained(_copy(GOLDEN / "gemma2", tmp_path / "m", older))
    assert_logits(program, golden["ids"], golden["logits"])


def test_older_config_files_of_gemma3_mean_the_same(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern", "dtype", "tie_word_embeddings"):
        del config[name]
    config |= {
        "rope_theta": 5000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 6, "torch_dtype": "float32", "cache_implementation": "hybrid",
    }  # fmt: skip
    golden = np.load(GOLDEN / "gemma3" / "golden.npz")
    program = from_pretrained(_copy(GOLDEN / "gemma3", tmp_path / "m", config))
    assert_logits(program, golden["ids"], golden["logits"])


def test_what_a_family_means_by_absent_fields() -> None:
    def built(change: dict[str, Any], base: dict[str, Any]) -> Any:
        return build(Fields(_config(change, base), "config"))[1].model.layers

    assert built({"num_key_value_heads": None}, QWEN2)[0].self_attn.kv_heads == 4
    assert built({"num_key_value_heads": "absent"}, LLAMA)[0].self_attn.kv_heads == 4
    assert built({"head_dim": "absent"}, QWEN3)[0].self_attn.q_norm.weight.shape == (128,)
    assert built({"sliding_window": "absent"}, MISTRAL)[0].self_attn.window == 4096
    assert built({"sliding_window": None}, MISTRAL)[0].self_attn.window is None
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert [x.self_attn.window for x in built(sliding, QWEN2)] == [None, 4]
    assert [x.self_attn.window for x in built({**sliding, "sliding_window": None}, QWEN3)] == [None, None]
    assert [x.self_attn.window for x in built({"num_hidden_layers": 7}, GEMMA3)] == [4] * 5 + [None, 4]


def test_token_ids_of_a_family_that_config_leaves_out(tmp_path: Path) -> None:
    bare = _config({"bos_token_id": "absent", "eos_token_id": "absent"})
    program = from_pretrained(save(tmp_path / "m", bare, tensors(bare)))
    assert program.interface.generation == Generation(1, (2,))
    none = {**bare, "eos_token_id": None}
    assert from_pretrained(save(tmp_path / "n", none, tensors(none))).interface.generation.eos == ()


def test_older_config_files_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**scaling, "rope_type": "llama3"}}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = {**scaling, "rope_type": "llama3", "rope_theta": 5e5}
    a, b = (build(Fields(c, "config"))[1].model.layers[0].self_attn.rope for c in (old, new))
    assert_array_equal(a.inv_freq, b.inv_freq)


def _config(change: dict[str, Any], base: dict[str, Any] = LLAMA) -> dict[str, Any]:
    return {k: v for k, v in {**base, **change}.items() if v != "absent"}


QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
GEMMA3 = {
    **_config({"rope_theta": "absent", "hidden_act": "absent"}), "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"], "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


@pytest.mark.parametrize(
    "config, messages",
    [
        (_config({"model_type": "lama"}),
         ["model_type 'lama' is not supported", "gemma2, gemma3_text, llama", "nearest: llama"]),
        (_config({"model_type": "absent"}), ["model_type is missing"]),
        (_config({"architectures": ["LlamaForSequenceClassification"]}),
         ["LlamaForSequenceClassification", "only LlamaForCausalLM"]),
        (_config({"hidden_size": "absent"}), ["hidden_size is missing"]),
        (_config({"hidden_size": "16"}), ["hidden_size = '16' must be a whole number"]),
        (_config({"hidden_size": True}), ["hidden_size = True must be a whole number"]),
        (_config({"num_hidden_layers": 0}), ["num_hidden_layers = 0 must be at least 1"]),
        (_config({"hidden_size": 18}), ["does not split into 4 heads"]),
        (_config({"num_key_value_heads": 3}), ["num_attention_heads 4 is not a multiple of num_key_value_heads 3"]),
        (_config({"embedding_multiplier": 12.0, "new_idea": "x"}),
         ["embedding_multiplier = 12.0; new_idea = 'x'", "ignored"]),
        (_config({"hidden_act": "quick_gelu"}), ["hidden_act 'quick_gelu' is not implemented"]),
        (_config({"pretraining_tp": 2}), ["pretraining_tp is 2"]),
        (_config({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
         ["rope_scaling: short_factor is missing"]),
        (_config({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), ["rope_scaling: rope_type 'dynamic'"]),
        (_config({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}), ["'llama3' needs low_freq_factor"]),
        (_config({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 3}}),
         ["has no meaning for twist = 3"]),
        (_config({"partial_rotary_factor": 0.5}), ["partial_rotary_factor is 0.5"]),
        (_config({"sliding_window": 8}), ["sliding_window = 8"]),
        (_config({"model_type": ["llama"]}), ["model_type = ['llama'] must be text"]),
        (_config({"architectures": "LlamaForCausalLM"}), ["architectures = 'LlamaForCausalLM' must be a list"]),
        (_config({"quantization_config": "int8"}), ["quantization_config = 'int8' must be an object"]),
        (_config({"auto_map": {"AutoModelForCausalLM": "own.Model"}}), ["auto_map is", "Python code of its own"]),
        (_config({"auto_map": {"AutoModelForCausalLM": "own.LlamaForCausalLM", "AutoModel": "own.Model"}}), ["auto_map is"]),
        (_config({"auto_map": ["own.LlamaForCausalLM"]}), ["auto_map is"]),
        (_config({"new_idea": False}), ["new_idea = False"]),
        (_config({"sliding_windov": 8}), ["sliding_windov = 8. A field"]),
        (_config({"atention_bias": True}), ["atention_bias = True (did you mean attention_bias?). A field"]),
        (_config({"attention_bias": False, "atention_bias": True}), ["atention_bias = True. A field"]),
        (_config({"is_causal": False}), ["is_causal = False"]),
        (_config({"is_causal": None}), ["is_causal = None"]),
        (_config({"add_cross_attention": True}), ["add_cross_attention = True"]),
        (_config({"pruned_heads": {"0": [1]}}), ["pruned_heads = "]),
        (_config({"rope_interleaved": True}), ["rope_interleaved = True"]),
        (_config({"per_layer_config": {"0": {"hidden_act": "relu"}}}), ["per_layer_config = "]),
        (_config({"original_max_position_embeddings": 32}), ["original_max_position_embeddings = 32"]),
        (_config({"layer_types": ["full_attention"] * 2}), ["layer_types = "]),
        (_config({"use_bidirectional_attention": True}), ["use_bidirectional_attention = True"]),
        (_config({"rms_norm_eps": None}), ["rms_norm_eps = None must be a number"]),
        (_config({"rms_norm_eps": -1e-6}), ["rms_norm_eps = -1e-06 must be above 0"]),
        (_config({"rms_norm_eps": float("nan")}), ["rms_norm_eps = nan"]),
        (_config({"rope_theta": 0}), ["rope_theta = 0.0 must be above 0"]),
        (_config({"rope_theta": float("inf")}), ["rope_theta = inf"]),
        (_config({"rope_theta": "10000"}), ["rope_theta = '10000' must be a number"]),
        (_config({"head_dim": 0}), ["head_dim = 0"]),
        (_config({"head_dim": 5}), ["5 of 5 is not an even number"]),
        (_config({"hidden_act": None}), ["hidden_act = None must be text"]),
        (_config({"tie_word_embeddings": None}), ["tie_word_embeddings = None must be true or false"]),
        (_config({"attention_bias": 1}), ["attention_bias = 1 must be true or false"]),
        (_config({"rope_scaling": [2.0]}), ["rope_scaling = [2.0] must be an object"]),
        (_config({"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}}),
         ["rope_type is 'linear' and type is 'llama3'"]),
        (_config({"rope_scaling": {"rope_type": "linear", "factor": "2"}}), ["rope_scaling: factor = '2'"]),
        (_config({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), ["rope_scaling: factor = 0.0"]),
        (_config({"rope_scaling": {"factor": 2.0}}), ["rope_type 'default' has no meaning for factor = 2.0"]),
        (_config({"rope_parameters": {"rope_theta": 5e5}}), ["rope_theta is 500000.0, and 10000.0 outside"]),
        (_config({"rope_parameters": {"partial_rotary_factor": 0.5}}), ["rope_parameters: partial_rotary_factor is 0.5"]),
        (_config({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), ["no meaning for full_attention"]),
        (_config({"attention_bias": True}, QWEN2), ["attention_bias = True"]),
        (_config({"use_mrope": True}, QWEN2), ["use_mrope = True"]),
        (_config({"max_window_layers": None}, QWEN2), ["max_window_layers = None must be a whole number"]),
        (_config({"layer_types": ["full_attention"] * 2}, MISTRAL), ["layer_types = "]),
        (_config({"sliding_window": 2.5}, MISTRAL), ["sliding_window = 2.5 must be a whole number"]),
        (_config({"query_pre_attn_scalar": 0}, GEMMA3), ["query_pre_attn_scalar = 0"]),
        (_config({"final_logit_softcapping": 0.0}, GEMMA3), ["final_logit_softcapping = 0.0"]),
        (_config({"sliding_window_pattern": 0}, GEMMA3), ["sliding_window_pattern = 0"]),
        (_config({"partial_rotary_factor": 0.5}, GEMMA3), ["partial_rotary_factor = 0.5"]),
        (_config({"rope_scaling": {"type": "linear", "factor": 8.0}}, GEMMA3), ["call it rope_type"]),
        (_config({"rope_parameters": {"full_attention": [1]}}, GEMMA3),
         ["rope_parameters.full_attention = [1] must be an object"]),
        (_config({"rope_parameters": {"sliding_attention": {"rope_type": "dynamic"}}}, GEMMA3),
         ["rope_parameters.sliding_attention: rope_type 'dynamic'"]),
        (_config({"num_key_value_heads": "absent"}, QWEN2), ["num_key_value_heads is missing"]),
        (_config({"layer_types": ["full_attention"]}, QWEN2), ["layer_types has 1 entries for 2 layers"]),
        (_config({"layer_types": ["full_attention", "linear_attention"]}, QWEN2),
         ["layer_types holds 'linear_attention'"]),
        (_config({"layer_types": ["full_attention", "sliding_attention"]}, QWEN2), ["use_sliding_window is false"]),
        (_config({"use_bidirectional_attention": True}, GEMMA3),
         ["use_bidirectional_attention is True", "only causal"]),
        (_config({"attn_logit_softcapping": 50.0}, GEMMA3), ["attn_logit_softcapping is 50.0", "never applies it"]),
        (_config({"sliding_window": None}, GEMMA3), ["sliding_window is null"]),
        (_config({"sliding_window": 0}, GEMMA3), ["sliding_window = 0 must be at least 1"]),
        (_config({"hidden_act": "silu"}, GEMMA3), ["hidden_act = 'silu'"]),
        (_config({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
         ["both rope_parameters and rope_scaling"]),
        (_config({"rope_parameters": {"rope_theta": 1e4}}, GEMMA3), ["rope_parameters has rope_theta"]),
    ],
)  # fmt: skip
def test_configurations_are_refused_by_name(config: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        build(Fields(config, "folder/config.json"))
    assert "folder/config.json: " in str(e.value)
    for m in messages:
        assert m in str(e.value)


def test_the_base_configurations_of_these_tests_are_accepted() -> None:
    for config in (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA3):
        build(Fields(config, "config"))


def test_graphs_of_all_families_verify_for_symbolic_sizes() -> None:
    from wasat.frontend import nn

    for config in (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA3):
        program = nn.trace(build(Fields(config, "config"))[1], {"tokens": "i64[b, s]"})
        verify(program["forward"])
        assert program["forward"].symbols == ("b", "s")
