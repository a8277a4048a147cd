"""Decoders that exporters left (tokens beside a mask, positions, a cache) generate: as an artifact, from the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers
from typer.testing import CliRunner
from wasat.frontend.onnx import from_onnx
from wasat.ir import IRError, Program, evaluate

import wasat as ws
from wasat import driver
from wasat.cli.app import app

HERE = Path(__file__).parents[1] / "golden" / "onnx"
VOCAB = 40
PROMPTS = [[5, 9, 3, 7, 11, 4], [8]]


def chosen(program: Program, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after ``prompt``, each from a forward pass over all of them."""
    params = {name: p.load() for name, p in program.params.items()}
    ids = list(prompt)
    for _ in range(count):
        n = len(ids)
        feeds = {}
        for v in program["forward"].inputs:
            feeds[v.name] = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, n), np.int64)}.get(
                v.name, np.arange(n)[None] if v.name == "position_ids" else np.zeros((1, 2, 0, 8), np.float32)
            )
        ids.append(int(evaluate(program["forward"], feeds, params)[0][0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "name, derived, context",
    [("llama_past", 6, None), ("gpt2_sdpa_legacy", 2, 64), ("gemma3_sdpa_legacy", 2, None), ("llama_sdpa_23", 0, None)],
)
def test_generates(name: str, derived: int, context: int | None, tmp_path: Path) -> None:
    """In chunks of four, in a batch, one token at a time: what the forward pass chooses, which keeps no cache."""
    program = driver.load_program(HERE / f"{name}.onnx")
    report = ws.compile(program, tmp_path / "out", chunk=4)
    assert len([r for r in report.remarks("applied") if r.message.startswith("input %")]) == derived
    model = ws.load(tmp_path / "out")
    assert (model.manifest.interface.vocab, model.manifest.interface.context) == (VOCAB, context)
    got = model.generate(PROMPTS, max_tokens=8)
    assert [r.tokens for r in got] == [chosen(program, p, 8) for p in PROMPTS]


def merged(path: Path) -> onnx.ModelProto:
    """What optimum makes of a decoder over a past: an If between it and the same without a past, weights shared."""
    model = onnx.load(path)
    g = model.graph
    branches = {}
    for key in ("then_branch", "else_branch"):
        nodes, names = [], {}
        if key == "else_branch":  # the past is none: zeros [b, 2, 0, 8]
            zero = onnx.numpy_helper.from_array(np.array([0]), "zero")
            rest = onnx.numpy_helper.from_array(np.array([2, 0, 8]), "rest")
            nodes = [
                onnx.helper.make_node("Constant", [], ["zero"], value=zero),
                onnx.helper.make_node("Constant", [], ["rest"], value=rest),
                onnx.helper.make_node("Shape", ["input_ids"], ["sizes"]),
                onnx.helper.make_node("Gather", ["sizes", "zero"], ["b"]),
                onnx.helper.make_node("Concat", ["b", "rest"], ["none_sizes"], axis=0),
                onnx.helper.make_node("ConstantOfShape", ["none_sizes"], ["none"]),
            ]
            names = {i.name: "none" for i in g.input if i.name.startswith("past")}
        made = {o for n in g.node for o in n.output if o}
        names |= {o: f"{key}.{o}" for o in made}
        for node in g.node:
            new = onnx.NodeProto.FromString(node.SerializeToString())
            new.name = f"{key}.{node.name}"
            new.input[:] = [names.get(x, x) for x in node.input]
            new.output[:] = [names.get(x, x) for x in node.output]
            nodes.append(new)
        outputs = [onnx.helper.make_value_info(names[o.name], o.type) for o in g.output]
        branches[key] = onnx.helper.make_graph(nodes, key, [], outputs)
    choice = onnx.helper.make_node("If", ["use_cache_branch"], [o.name for o in g.output], "optimum::if", **branches)
    del g.node[:]
    g.node.append(choice)
    g.input.append(onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))
    onnx.checker.check_model(model)
    return model


def test_merged_decoders(tmp_path: Path) -> None:
    """Of a merged decoder the branch without a past is taken, and a cache derived; ``constants`` may take the other one."""
    onnx.save(merged(HERE / "llama_past.onnx"), tmp_path / "model.onnx")
    program = driver.load_program(tmp_path / "model.onnx")
    assert "use_cache_branch" not in [v.name for v in program["forward"].inputs]
    ws.compile(program, tmp_path / "out", chunk=4)
    want = from_onnx(HERE / "llama_past.onnx")
    got = ws.load(tmp_path / "out").generate(PROMPTS, max_tokens=8)
    assert [r.tokens for r in got] == [chosen(want, p, 8) for p in PROMPTS]
    past = from_onnx(tmp_path / "model.onnx", constants={"use_cache_branch": np.array([True])})
    assert [str(v.type) for v in past["forward"].outputs] == [str(v.type) for v in want["forward"].outputs]


@pytest.mark.slow
def test_relative_positions(tmp_path: Path) -> None:
    """T5's decoder: numbers by the distance of query and key are added to the scores, in chunks and one by one."""
    ws.compile(driver.load_program(HERE / "t5_decoder_legacy.onnx"), tmp_path / "out", chunk=4)
    with np.load(HERE / "t5_decoder_legacy.npz") as z:
        ids, memory, want = z["in.input_ids"], z["in.encoder_hidden_states"], z["out"]
    session = ws.load(tmp_path / "out").session(len(ids), context=32)
    session.encode(encoder_hidden_states=memory)
    at = 0
    for step in (4, 3, *(1,) * (ids.shape[1] - 7)):
        got = session.step(ids[:, at : at + step])
        at += step
        np.testing.assert_allclose(got, want[:, at - 1], rtol=1e-4, atol=1e-5)


def test_a_decoder_is_given_what_its_encoder_made(tmp_path: Path) -> None:
    """On the command line, from files of arrays; what is missing, or no array, is said."""
    shutil.copy(HERE / "whisper_decoder.onnx", tmp_path / "model.onnx")
    words(tmp_path)
    run, out = CliRunner(), str(tmp_path / "out")
    assert run.invoke(app, ["compile", str(tmp_path / "model.onnx"), "-o", out]).exit_code == 0
    memory = np.random.default_rng(0).standard_normal((1, 6, 32), np.float32)
    np.save(tmp_path / "memory.npy", memory)
    np.savez(tmp_path / "memory.npz", encoder_hidden_states=memory)
    program = from_onnx(tmp_path / "model.onnx")
    params = {name: p.load() for name, p in program.params.items()}
    ids = [5, 9]
    for _ in range(4):
        feeds = {"input_ids": np.array([ids]), "encoder_hidden_states": memory}
        ids.append(int(evaluate(program["forward"], feeds, params)[0][0, -1].argmax()))
    (got,) = ws.load(out).generate([[5, 9]], max_tokens=4, inputs={"encoder_hidden_states": memory})
    assert got.tokens == ids[2:]
    command = ["generate", out, "w5 w9", "--max-tokens", "4", "--quiet"]
    for file in ("memory.npy", "memory.npz"):
        result = run.invoke(app, [*command, "--input", f"encoder_hidden_states={tmp_path / file}"])
        assert result.stdout.split() == [f"w{t}" for t in ids[2:]], result.output
    (tmp_path / "text.npy").write_text("none")
    (tmp_path / "five.txt").write_text("w5 w6")
    for item, message in [
        (None, r"more than tokens: encoder_hidden_states float32\['b', 't', 32\]; generate\(inputs=\), --input"),
        ("encoder_hidden_states", "write NAME=FILE"), ("encoder_hidden_states=sound.wav", "the model's own processor"),
        (f"memory={tmp_path / 'memory.npz'}", "the file holds encoder_hidden_states, and no memory"),
        (f"memory={tmp_path / 'memory.npy'}", "memory"), (f"memory={tmp_path / 'text.npy'}", "is no array file"),
        (f"encoder_hidden_states={tmp_path / 'five.txt'}", "encoder_hidden_states"),
    ]:  # fmt: skip
        result = run.invoke(app, [*command, *(["--input", item] if item else [])])
        assert result.exit_code == 1
        assert re.search(message, str(result.exception)), (item, result.exception)


def test_encoder_and_decoder_in_one_file(tmp_path: Path) -> None:
    """The encoder runs once, on its own tokens and mask; the decoder's have a cache."""
    encoder, decoder = (onnx.load(HERE / f"{name}.onnx") for name in ("t5_encoder", "t5_decoder_legacy"))
    decoder = onnx.compose.add_prefix(onnx.version_converter.convert_version(decoder, 18), "decoder_")
    decoder.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "target"
    decoder.ir_version = encoder.ir_version
    between = [(encoder.graph.output[0].name, "decoder_encoder_hidden_states")]
    onnx.save(onnx.compose.merge_models(encoder, decoder, io_map=between), tmp_path / "model.onnx")
    words(tmp_path)
    program = driver.load_program(tmp_path / "model.onnx")
    ws.compile(program, tmp_path / "out", chunk=4)
    model = ws.load(tmp_path / "out")
    params = {name: p.load() for name, p in program.params.items()}
    given = {"input_ids": np.array([[3, 9, 4, 1], [7, 5, 0, 0]]), "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]])}
    want = []
    for row in range(2):
        ids = [0]
        for _ in range(6):
            feeds = {"decoder_input_ids": np.array([ids]), **{k: x[row : row + 1] for k, x in given.items()}}
            ids.append(int(evaluate(program["forward"], feeds, params)[0][0, -1].argmax()))
        want.append(ids[1:])
    assert [r.tokens for r in model.generate([[0], [0]], max_tokens=6, inputs=given)] == want
    (tmp_path / "text.txt").write_text("w3 w9\nw4 w1")
    np.save(tmp_path / "mask.npy", given["attention_mask"][:1])
    inputs = [f"input_ids={tmp_path / 'text.txt'}", f"attention_mask={tmp_path / 'mask.npy'}"]
    command = ["generate", str(tmp_path / "out"), "w0", "--max-tokens", "6", "--quiet"]
    result = CliRunner().invoke(app, [*command, "--input", inputs[0], "--input", inputs[1]])
    assert result.stdout.split() == [f"w{t}" for t in want[0]], result.output


def words(folder: Path) -> None:
    """A tokenizer beside the file: word ``w7`` is token 7."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_what_stands_beside_the_file(tmp_path: Path) -> None:
    """Tokenizer, the end of a text and the context's length come along; the command line answers."""
    shutil.copy(HERE / "llama_legacy.onnx", tmp_path / "model.onnx")
    words(tmp_path)
    want = chosen(from_onnx(tmp_path / "model.onnx"), [5, 9], 6)
    config = {"model_type": "llama", "max_position_embeddings": 32, "eos_token_id": want[4]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = CliRunner()
    out = str(tmp_path / "out")
    assert run.invoke(app, ["compile", str(tmp_path / "model.onnx"), "-o", out]).exit_code == 0
    result = run.invoke(app, ["generate", out, "w5 w9", "--max-tokens", "6", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [f"w{t}" for t in want[: want.index(want[4])]]
    manifest = ws.load(out).manifest
    assert (manifest.interface.context, manifest.interface.generation.eos) == (32, (want[4],))


def test_a_config_that_is_none_of_a_model_is_left_alone(tmp_path: Path) -> None:
    shutil.copy(HERE / "llama_sdpa.onnx", tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 3}')
    program = driver.load_program(tmp_path / "model.onnx")
    assert (program.interface.context, program.interface.generation, program.origin.tokenizer) == (None, None, None)


def test_what_cannot_be_cached_keeps_its_inputs() -> None:
    """A bidirectional encoder needs its mask; asked for a cache all the same, the answer is why not."""
    program = from_onnx(HERE / "bert_eager.onnx")
    optimized, report = ws.optimize(program)
    assert [v.name for v in optimized["forward"].inputs] == ["input_ids", "attention_mask"]
    assert any("it is bidirectional" in r.message for r in report.remarks("missed"))
    with pytest.raises(IRError, match="it is bidirectional"):
        ws.optimize(program, kv_cache=True)


def test_without_a_cache_everything_stays() -> None:
    """``kv_cache=False``: the program as the file has it, its cache an input and an output."""
    optimized, _ = ws.optimize(from_onnx(HERE / "llama_past.onnx"), kv_cache=False)
    assert [v.name for v in optimized["forward"].inputs][2:4] == ["position_ids", "past_key_values.0.key"]
    assert optimized["forward"].output_names[1] == "present.0.key"
