"""Models that embed texts and score pairs: equal to transformers and sentence-transformers; what is refused, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_files
import numpy as np
import pytest
from rounding import assert_near, bound, spread
from wasat.frontend import CheckpointError, ConfigError, from_pretrained
from wasat.ir import Program, evaluate, parse_program

GOLDEN = Path(__file__).parents[1] / "golden" / "sentence"
CASES = sorted(p.parent for p in GOLDEN.glob("*/golden.npz"))


def result(program: Program, **inputs: Any) -> np.ndarray:
    assert program.interface.embedder is not None
    graph = program[program.interface.embedder.entry]
    return evaluate(graph, inputs, {k: p.load() for k, p in program.params.items()})[0]


def moved(program: Program, **inputs: Any) -> np.ndarray:
    """How far rounding moves each element of the result."""
    assert program.interface.embedder is not None
    return spread(program[program.interface.embedder.entry], inputs, {k: p.load() for k, p in program.params.items()})[0]


@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_equal_to_the_reference(folder: Path) -> None:
    program = from_pretrained(folder)
    program.verify()
    assert str(parse_program(str(program))) == str(program)
    golden = dict(np.load(folder / "golden.npz"))
    wanted = golden.pop("wanted")
    assert_near(result(program, **golden), wanted, bound(wanted, moved(program, **golden)))


@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_a_text_does_not_depend_on_its_batch(folder: Path) -> None:
    """Alone, without padding, and beside longer ones; whatever the padding is."""
    program = from_pretrained(folder)
    golden = dict(np.load(folder / "golden.npz"))
    golden.pop("wanted")
    whole = result(program, **golden)
    allowed = bound(whole, moved(program, **golden))
    for row, n in enumerate(golden["lengths"].tolist()):
        one = {k: x[row : row + 1, :n] if x.ndim == 2 else x[row : row + 1] for k, x in golden.items()}
        assert_near(result(program, **one)[0], whole[row], allowed[row])
        other = {k: x.copy() for k, x in golden.items()}
        other["tokens"][row, n:] = 5
        if "roberta" not in folder.name and "xlmr" not in folder.name and "mpnet" not in folder.name:  # which count the tokens
            np.testing.assert_array_equal(result(program, **other)[row], whole[row])


def test_what_the_program_says_of_itself() -> None:
    e = from_pretrained(GOLDEN / "bert_mean").interface.embedder
    assert e is not None
    assert (e.entry, e.pairs, e.limit, e.pad) == ("embed", False, 32, 0)
    plain = from_pretrained(GOLDEN / "bert_plain").interface
    assert plain.embedder is not None
    assert (plain.embedder.limit, plain.context) == (48, 48)
    scores = from_pretrained(GOLDEN / "roberta_score").interface
    assert scores.embedder is not None
    assert (scores.embedder.entry, scores.embedder.pairs, scores.embedder.limit, scores.embedder.pad) == ("score", True, 48, 1)


def test_a_token_of_padding_within_a_text_has_no_position_of_its_own() -> None:
    """As the reference has it for RoBERTa: positions count the tokens that are not padding."""
    program = from_pretrained(GOLDEN / "xlmr_cls")
    tokens = np.array([[5, 1, 6, 7]])
    table = program.params["0.embeddings.position_embeddings.weight"].load()
    graph = program["embed"]
    name = "0.embeddings.position_embeddings.weight"
    [positions] = [n for n in graph.nodes if n.op.name == "embedding" and n.inputs[0].name == name]
    graph.set_outputs([positions.outputs[0]], ["x"])
    np.testing.assert_array_equal(result(program, tokens=tokens, lengths=np.array([4]))[0], table[[2, 1, 3, 4]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "bert_cls_dense", tmp_path / "m"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def test_names_within_a_model_with_a_head(folder: Path) -> None:
    """As BertForMaskedLM is saved, with its own head; and as older ones were, with their positions."""
    from safetensors.numpy import load_file, save_file

    want = {k: p.load() for k, p in from_pretrained(folder).params.items()}
    tensors = load_file(folder / "model.safetensors")
    inside = {k if k.startswith("cls") else f"bert.{k}": x for k, x in tensors.items()}
    save_file({**inside, "cls.predictions.bias": np.zeros(90, np.float32)}, folder / "model.safetensors")
    edit(folder / "config.json", lambda c: {**c, "architectures": ["BertForMaskedLM"]})
    got = from_pretrained(folder).params
    assert got.keys() == want.keys()
    assert all((got[k].load() == x).all() for k, x in want.items())
    save_file({**tensors, "embeddings.position_ids": np.arange(48)[None]}, folder / "model.safetensors")
    assert from_pretrained(folder).params.keys() == want.keys()


@pytest.mark.parametrize("name", ["gte_cls", "gte_score"])
def test_gte_under_its_authors_name(name: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    want = {k: p.load() for k, p in from_pretrained(folder).params.items()}
    tensors = load_file(folder / "model.safetensors")
    inside = {k if k.startswith("classifier") else f"new.{k.removeprefix('gte.')}": x for k, x in tensors.items()}
    assert inside.keys() != tensors.keys()
    save_file(inside, folder / "model.safetensors")
    got = from_pretrained(folder).params
    assert got.keys() == want.keys()
    assert all((got[k].load() == x).all() for k, x in want.items())


def test_a_transformer_in_a_folder_of_its_own(folder: Path) -> None:
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "sentence_bert_config.json"):
        (folder / name).rename(folder / "0_Transformer" / name)
    edit(folder / "modules.json", lambda m: [{**m[0], "path": "0_Transformer"}, *m[1:]])
    program = from_pretrained(folder)
    golden = dict(np.load(folder / "golden.npz"))
    np.testing.assert_allclose(result(program, tokens=golden["tokens"], lengths=golden["lengths"]), golden["wanted"], atol=1e-5)


def test_lower_case_comes_before_the_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")).save(str(folder / "tokenizer.json"))
    assert "tokenizer.json" not in from_pretrained(folder).origin.texts
    edit(folder / "sentence_bert_config.json", lambda c: {**c, "do_lower_case": True})
    text = from_pretrained(folder).origin.texts["tokenizer.json"]
    assert Tokenizer.from_str(text).encode("A").ids == [0]
    for normalizer in (1.5, {"type": "Sequence", "normalizers": 0}, {"type": "Sequence", "normalizers": ["x"]}):
        (folder / "tokenizer.json").write_text(json.dumps({"normalizer": normalizer}))
        with pytest.raises(CheckpointError, match="its normalizer is none that can be read"):
            from_pretrained(folder)


def test_prompts(folder: Path) -> None:
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"}))
    found = json.loads(from_pretrained(folder).origin.texts["prompts.json"])
    assert found == {"prompts": {"query": "q: ", "document": ""}, "default": "query"}
    path.write_text(json.dumps({"prompts": {"query": 1}}))
    with pytest.raises(CheckpointError, match="prompts are no texts by name"):
        from_pretrained(folder)
    for name in ("query", ["query"]):
        path.write_text(json.dumps({"prompts": {}, "default_prompt_name": name}))
        with pytest.raises(CheckpointError, match=r"default_prompt_name is .*'query'.*, and the prompts are none"):
            from_pretrained(folder)


REFUSED: list[tuple[str, Callable[[Any], Any], str]] = [
    ("1_Pooling/config.json", lambda c: {**c, "pooling_mode": 1.5}, "pooling_mode is 1.5; expected a name"),
    ("config.json", lambda c: {**c, "position_embedding_type": "relative_key"}, "only absolute positions"),
    ("config.json", lambda c: {**c, "hidden_size": 30}, "does not split into 4 heads|misshaped"),
    ("config.json", lambda c: {**c, "hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is not implemented"),
    ("config.json", lambda c: {**c, "is_strange": 3}, "bert has no meaning for is_strange = 3"),
    ("config.json", lambda c: {**c, "add_cross_attention": True}, "add_cross_attention"),
    ("config.json", lambda c: {**c, "auto_map": {"AutoModel": "x"}}, "Python code of its own"),
    ("config.json", lambda c: {**c, "quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ("config.json", lambda c: {**c, "model_type": "t5"}, "model_type 't5' does not embed texts here; there are bert"),
    ("modules.json", lambda m: m[:1], "has no Pooling"),
    ("modules.json", lambda m: m[1:], "module 0 is Pooling; a Transformer comes first"),
    ("modules.json", lambda m: [*m, {"type": "x.WeightedLayerPooling", "path": ""}], "module 4 is WeightedLayerPooling"),
    ("modules.json", lambda m: {"a": 1}, "is no list of modules"),
    ("modules.json", lambda m: [{"type": "Transformer"}], "is no list of modules"),
    ("modules.json", lambda m: [m[0], {**m[1], "path": "../x"}], "which is no folder inside"),
    ("1_Pooling/config.json", lambda c: {**c, "pooling_mode": "best"}, "pooling_mode is 'best'; there are cls"),
    ("1_Pooling/config.json", lambda c: {**c, "strange": 1}, "Pooling has no meaning for strange"),
    ("2_Dense/config.json", lambda c: {**c, "activation_function": "torch.nn.Mish"}, "Mish' is not implemented"),
    ("2_Dense/config.json", lambda c: {**c, "activation_function": "os.Tanh"}, "'os.Tanh' is not implemented"),
    ("2_Dense/config.json", lambda c: {**c, "in_features": 31}, "in_features is 31; what comes in has 32"),
    ("2_Dense/config.json", lambda c: {**c, "strange": 1}, "Dense has no meaning for strange = 1"),
    ("sentence_bert_config.json", lambda c: {**c, "max_seq_length": 0}, "max_seq_length is 0"),
    ("sentence_bert_config.json", lambda c: {**c, "transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
]


@pytest.mark.parametrize("file, change, said", REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_what_is_refused(folder: Path, file: str, change: Callable[[Any], Any], said: str) -> None:
    edit(folder / file, change)
    with pytest.raises((ConfigError, CheckpointError), match=said):
        from_pretrained(folder)


def test_a_module_without_its_weights(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"2_Dense/model.safetensors is missing; there is config.json, pytorch_model.bin"):
        from_pretrained(folder)


def test_heads_that_are_not_there(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "bert_plain", tmp_path / "m"))
    edit(folder / "config.json", lambda c: {**c, "architectures": ["BertForTokenClassification"]})
    with pytest.raises(ConfigError, match=r"BertForTokenClassification.*whose head is not implemented"):
        from_pretrained(folder)


def test_a_score_that_is_activated_otherwise(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "bert_score", tmp_path / "m"))
    old = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    edit(folder / "config.json", lambda c: {**c, **old})
    golden = dict(np.load(folder / "golden.npz"))
    wanted = golden.pop("wanted")
    got = result(from_pretrained(folder), **golden)
    np.testing.assert_allclose(1 / (1 + np.exp(-got)), wanted, rtol=1e-4)
    edit(folder / "config.json", lambda c: {**c, "sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"})
    with pytest.raises(ConfigError, match="of scores is not implemented"):
        from_pretrained(folder)


def test_a_tokenizer_that_does_not_tell_texts_apart(tmp_path: Path) -> None:
    """All tokens are then of the first kind, as transformers has it, whatever the tokenizer's file says of pairs."""
    golden = dict(np.load(GOLDEN / "bert_score" / "golden.npz"))
    given = {k: golden[k] for k in ("tokens", "lengths")}
    want = result(from_pretrained(GOLDEN / "bert_score"), **given, types=np.zeros_like(golden["types"]))
    folder = Path(shutil.copytree(GOLDEN / "bert_score", tmp_path / "m"))
    (folder / "tokenizer_config.json").write_text('{"model_input_names": ["input_ids", "attention_mask"]}')
    program = from_pretrained(folder)
    assert [v.name for v in program["score"].inputs] == ["tokens", "lengths"]
    np.testing.assert_array_equal(result(program, **given), want)


def equal(folder: Path) -> None:
    golden = dict(np.load(folder / "golden.npz"))
    wanted = golden.pop("wanted")
    np.testing.assert_allclose(result(from_pretrained(folder), **golden), wanted, rtol=1e-4, atol=1e-5)


def test_older_files_of_modernbert(tmp_path: Path) -> None:
    """As they were published: a period in place of a list of layers, and the bases of its rotations by name."""
    folder = Path(shutil.copytree(GOLDEN / "modernbert_cls", tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("layer_types") == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    bases = {k: v["rope_theta"] for k, v in config.pop("rope_parameters").items()}
    assert bases == {"full_attention": 160000.0, "sliding_attention": 10000.0}
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    for more in ({}, old, {**old, "layer_norm_eps": 1e-5, "position_embedding_type": "absolute", "reference_compile": False}):
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        equal(folder)


def test_a_decoder_that_was_saved_within_a_model_that_writes(tmp_path: Path) -> None:
    """Qwen3-Embedding names a class that writes, and its tensors as if it were none."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(GOLDEN / "qwen3_last", tmp_path / "m"))
    edit(folder / "config.json", lambda c: {**c, "architectures": ["Qwen3ForCausalLM"]})
    equal(folder)
    tensors = {f"model.{k}": x for k, x in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, folder / "model.safetensors")
    equal(folder)


def test_an_encoder_of_gemma_is_told_by_its_configuration(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "embeddinggemma", tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["use_bidirectional_attention"], config["sliding_window"]) == (True, 8)
    (folder / "modules.json").unlink()
    program = from_pretrained(folder)
    assert list(program.graphs) == ["embed"]
    edit(folder / "config.json", lambda c: {**c, "use_bidirectional_attention": False, "architectures": ["Gemma3TextModel"]})
    assert list(from_pretrained(folder).graphs) == ["embed"]


@pytest.mark.parametrize("name, architecture", [
    ("glm4", "Glm4Model"), ("olmo2", "Olmo2Model"), ("starcoder2", "Starcoder2Model"), ("phi3", "Phi3Model"),
])  # fmt: skip
def test_a_decoder_without_its_head_embeds(name: str, architecture: str, tmp_path: Path) -> None:
    """Its hidden states are those that the head makes the reference's logits of."""
    config, shapes, ids, logits = family_files.golden(name)
    where = family_files.write(tmp_path / "m", config, shapes)
    writes = from_pretrained(where)
    head = writes.params["lm_head.weight" if "lm_head.weight" in writes.params else "model.embed_tokens.weight"].load()
    edit(where / "config.json", lambda c: {**c, "architectures": [architecture]})
    program = from_pretrained(where)
    assert program.interface.embedder is not None
    [x] = result(program, tokens=ids[:1, :1], lengths=np.array([1]))
    np.testing.assert_allclose(x @ head.T, logits[0, 0], rtol=1e-3, atol=1e-4)


def test_a_decoder_of_experts_does_not_embed(tmp_path: Path) -> None:
    config, shapes, _, _ = family_files.golden("mixtral")
    where = family_files.write(tmp_path / "m", config, shapes)
    edit(where / "config.json", lambda c: {**c, "architectures": ["MixtralModel"]})
    with pytest.raises(ConfigError, match="model_type 'mixtral' does not embed texts here"):
        from_pretrained(where)


@pytest.mark.parametrize("change, said", [
    ({"head_dim": 16}, "head_dim is 16; 32 features are 4 heads of 8"),
    ({"hidden_size": 30}, "hidden_size 30 does not split into 4 heads"),
    ({"prenorm": True}, "nomic_bert has no meaning for prenorm = True"),
    ({"auto_map": {"AutoModel": "code.py"}}, "Python code of its own"),
])  # fmt: skip
def test_nomic_is_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    where = Path(shutil.copytree(GOLDEN / "nomic_mean", tmp_path / "m"))
    edit(where / "config.json", lambda c: {**c, **change})
    with pytest.raises(ConfigError, match=said):
        from_pretrained(where)
