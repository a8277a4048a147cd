"""``ws.compile``: its options, what it refuses and when, programs that are no language models, models with an encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Reference
from wasat.frontend import nn
from wasat.ir import Generation
from wasat.runtime import ArtifactError, InputError

import wasat as ws
from wasat import driver

VOCAB, DIM = 11, 16


# -- options ---------------------------------------------------------------------------------------------------------------
OPTIONS: dict[str, tuple[dict[str, Any], float, float, float]] = {  # options, loss, KL divergence, MB of weights
    "f32": ({}, 1e-6, 1e-9, 11.7),
    "f16": ({"quantize": "f16"}, 1e-6, 1e-9, 5.9),
    "bf16": ({"quantize": "bf16"}, 1e-6, 1e-9, 5.9),
    "int8": ({"quantize": "int8"}, 0.004, 4e-4, 3.2),
    "int8, f32 activations": ({"quantize": "int8", "activation": None}, 0.002, 2e-4, 3.2),
    # .015 measured, of a KL of .008: the text's own loss moves by more than int4-plain's, whose KL is .023
    "int4": ({"quantize": "int4"}, 0.02, 0.0095, 1.8),
    "int4, all alike": ({"quantize": "int4-plain"}, 0.01, 0.03, 1.7),
    "int4 but embeddings": ({"quantize": "int4", "overrides": {"*embed*": "int8"}}, 0.02, 0.0065, 1.95),
    "six bits": ({"quantize": "s6"}, 0.005, 0.0014, 2.35),
    "caches in f16": ({"cache": "f16"}, 1e-4, 1e-6, 11.7),
    "int8 in the MLPs only": ({"overrides": {"*mlp*": "int8"}}, 0.002, 2e-4, 6.5),
}


QUICK = ("f32", "int8", "int4")  # one of each kind; the others are slow tests


@pytest.mark.parametrize(
    "options, loss, divergence, size",
    [pytest.param(*v, id=k, marks=[] if k in QUICK else [pytest.mark.slow]) for k, v in OPTIONS.items()],
)
def test_weights_in_fewer_bits_stay_near_the_reference(
    pygemma: Path, reference: Reference, tmp_path: Path, options: dict[str, Any], loss: float, divergence: float, size: float
) -> None:
    out = tmp_path / "out"
    ws.compile(ws.from_pretrained(pygemma), out, **options)
    rise, kl = reference.compare(ws.load(out))
    assert abs(rise) <= loss
    assert kl <= divergence
    assert (out / "weights.safetensors").stat().st_size <= size * 1e6
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert {k: settings[k] for k in options} == options


def test_check_runs_around_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that changes the result is caught, and named."""
    from wasat.passes import FuseActivations, PassError

    def spoil(self: FuseActivations, graph: ws.Graph, remarks: object) -> bool:
        node = next(n for n in graph.nodes if n.op.name == "mul")
        graph.set_inputs(node, [node.inputs[0], node.inputs[0]])
        return True

    program = ws.parse("graph @forward(%x: f32[b, 4], %y: f32[b, 4]) {\n  %z: f32[b, 4] = mul(%x, %y)\n  return %z\n}\n")
    monkeypatch.setattr(FuseActivations, "run_graph", spoil)
    driver.optimize(ws.Program({"forward": program}))
    with pytest.raises(PassError, match=r"pass fuse-activations changes output z of @forward at \{'b': 4"):
        driver.optimize(ws.Program({"forward": program}), check=True)


def test_the_program_stays_as_it_was(pygemma: Path) -> None:
    program = ws.from_pretrained(pygemma)
    before, params = str(program), list(program.params)
    ws.optimize(program, quantize="int4")
    assert (str(program), list(program.params)) == (before, params)
    assert not program.interface.states


# -- refusals --------------------------------------------------------------------------------------------------------------
def test_a_missing_compiler_is_said_before_the_long_work(
    pygemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, stages = ws.from_pretrained(pygemma), []
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ws.WasatError, match=r"needs a C\+\+ compiler"):
        ws.compile(program, tmp_path / "out", progress=lambda stage, done=0, total=0: stages.append(stage))
    assert stages == []
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target": "tpu"}, "there is no target 'tpu'; there are cpu, cuda"),
    "processor": ({"target": "cpu:znver9"}, "there is no CPU 'znver9'; near it are znver"),
    "scheme": ({"quantize": "int3"}, "there is no quantization scheme 'int3'"),
    "activation": ({"quantize": "int8", "activation": "int4"}, "activations can be int8 or None"),
    "override": ({"overrides": {"*embedding*": "int8"}}, r"override '\*embedding\*' matches no parameter"),
    "chunk": ({"chunk": 0}, "a chunk holds at least one token"),
    "no threads": ({"threads": 0}, "threads is a whole number from 1 to 4096, not 0"),
    "a hundred million threads": ({"threads": 99999999}, "threads is a whole number from 1 to 4096, not 99999999"),
    "fewer threads": ({"threads": -3}, "threads is a whole number from 1 to 4096, not -3"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_refused_options_leave_nothing(pygemma: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    stages: list[str] = []
    with pytest.raises(ws.WasatError, match=message):
        ws.compile(
            ws.from_pretrained(pygemma), tmp_path / "out", **options,
            progress=lambda stage, done=0, total=0: stages.append(stage),
        )  # fmt: skip
    assert "generating code" not in stages
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_artifact_is_refused_before_the_long_work(pygemma: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    stages: list[str] = []
    with pytest.raises(ArtifactError, match="exists and is no artifact"):
        ws.compile(ws.from_pretrained(pygemma), tmp_path, progress=lambda stage, done=0, total=0: stages.append(stage))
    assert stages == []
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_place_that_cannot_be_written_is_refused_before_the_long_work(
    pygemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    program = ws.from_pretrained(pygemma)
    stages: list[str] = []

    def place(out: Path, message: str) -> None:
        for write in (ws.compile, driver.export_c):
            with pytest.raises(ArtifactError, match=message):
                write(program if write is ws.compile else pygemma, out, progress=lambda stage, *_: stages.append(stage))

    place(tmp_path / "notes.txt" / "deep" / "out", "notes.txt is no folder; choose another place")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # who runs the tests may be allowed to do all
    place(tmp_path / "new" / "out", "there is no permission to write into")
    assert stages == []
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_graph_text_without_numbers_is_refused_before_the_long_work(tmp_path: Path) -> None:
    text = tmp_path / "graph.txt"
    text.write_text("graph @f(%x: f32[b, 4]) {\n  param %w: f32[2, 4]\n  %y: f32[b, 2] = linear(%x, %w)\n  return %y\n}\n")
    with pytest.raises(ws.WasatError, match="parameter w has no data"):
        ws.compile(driver.load_program(text), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["graph.txt"]


def test_a_failure_late_keeps_what_was_there(tmp_path: Path) -> None:
    program = nn.trace(Doubling(), {"x": "f32[b, 3]"}, outputs=["y"])
    ws.compile(program, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_text()
    program.origin = replace(program.origin, tokenizer=str(tmp_path / "nowhere.json"))
    with pytest.raises(FileNotFoundError):
        ws.compile(program, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_text() == before


# -- programs that are no language models ------------------------------------------------------------------------------------
class Doubling(nn.Module):
    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return x + x


class Tripling(nn.Module):
    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return x + x + x


def test_compiling_anew_replaces_the_artifact(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for module, factor in ((Doubling(), 2), (Tripling(), 3)):
        ws.compile(nn.trace(module, {"x": "f32[b, 3]"}, outputs=["y"]), tmp_path / "out")
        np.testing.assert_array_equal(ws.load(tmp_path / "out").run("forward", x=x)["y"], factor * x)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Encoder(nn.Module):
    """Attends both ways: no cache can be derived."""

    def __init__(self) -> None:
        self.norm = nn.RMSNorm(DIM)
        self.attention = nn.CrossAttention(DIM, 4)
        self.mlp = nn.GLU(DIM, 32)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        y = self.norm(x)
        return x + self.mlp(x + self.attention(y, y))


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCAB, DIM)
        self.encoder = Encoder()

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.encoder(self.embed(tokens))


@pytest.mark.parametrize("make, name, type", [(Encoder, "x", "f32[n, m, 16]"), (TextEncoder, "tokens", "i64[n, m]")])
def test_an_encoder_keeps_its_forward(make: Callable[[], nn.Module], name: str, type: str, tmp_path: Path) -> None:
    program = nn.trace(make(), {name: type}, outputs=["y"])
    report = ws.compile(program, tmp_path / "out")
    model = ws.load(tmp_path / "out")
    rng = np.random.default_rng(0)
    for rows, width in ((1, 1), (3, 7), (2, 40)):
        shape = (rows, width, DIM) if name == "x" else (rows, width)
        x = rng.standard_normal(shape).astype(np.float32) if name == "x" else rng.integers(0, VOCAB, shape)
        got, want = model.run("forward", **{name: x})["y"], ws.run(program, **{name: x})["y"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    missed = [r for r in report.remarks("missed") if "no KV cache" in r.message]
    if name == "x":
        assert missed == []  # nobody could want one
    else:
        (remark,) = missed
        assert remark.message.startswith("@forward stays as it is: no KV cache can be derived for output y")
        assert remark.loc is not None
    why = "its forward takes no tokens" if name == "x" else "@forward stays as it is: no KV cache can be derived for output y"
    with pytest.raises(InputError, match=f"has no entry 'prefill'; it has forward: .*it has none, because {why}"):
        model.session()
    with pytest.raises(InputError, match=f"because {why}"):
        model.generate([[1]], max_tokens=1)


def test_a_cache_that_was_asked_for_must_be_derived(pygemma: Path, tmp_path: Path) -> None:
    program = nn.trace(TextEncoder(), {"tokens": "i64[b, s]"}, outputs=["y"])
    with pytest.raises(ws.WasatError, match="no KV cache can be derived"):
        ws.optimize(program, kv_cache=True)
    program.declare(generation=Generation(eos=(0,)))
    with pytest.raises(ws.WasatError, match="no KV cache can be derived"):
        ws.optimize(program)
    plain, _ = ws.optimize(ws.from_pretrained(pygemma), kv_cache=False)
    assert list(plain.graphs) == ["forward"]


# -- models with more inputs than tokens -------------------------------------------------------------------------------------
class Translator(nn.Module):
    """A decoder that attends to encoded features, in a style."""

    def __init__(self) -> None:
        self.encoder = nn.Linear(6, DIM)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.attention = nn.Attention(DIM, 4, 2, 4, rope=nn.RoPE(4))
        self.cross = nn.CrossAttention(DIM, 4)
        self.head = nn.Linear(DIM, VOCAB)

    def __call__(self, style: nn.Tensor, tokens: nn.Tensor, features: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens) + style
        x = x + self.attention(x, nn.positions(tokens))
        return self.head(x + self.cross(x, nn.gelu(self.encoder(features))))


@pytest.fixture(scope="module")
def translator() -> ws.Program:
    """Its symbols are not those of the runtime: ``c`` is the number of features."""
    inputs = {"style": "f32[n, 1, 16]", "tokens": "i64[n, s]", "features": "f32[n, c, 6]"}
    return nn.trace(Translator(), inputs, outputs=["logits"])


@pytest.fixture(scope="module")
def translating(translator: ws.Program, tmp_path_factory: pytest.TempPathFactory) -> ws.Model:
    out = tmp_path_factory.mktemp("translator") / "out"
    ws.compile(translator, out, chunk=5)
    return ws.load(out)


def _inputs(batch: int, features: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "style": rng.standard_normal((batch, 1, DIM)).astype(np.float32),
        "features": rng.standard_normal((batch, features, 6)).astype(np.float32),
    }


def test_encode_then_step(translator: ws.Program, translating: ws.Model) -> None:
    assert list(translating.manifest.entries) == ["encode", "prefill", "decode"]
    session = translating.session(2, context=64)
    for seed, features in ((0, 7), (1, 1)):  # encoding anew starts anew
        others = _inputs(2, features, seed)
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, 14))
        want = ws.run(translator, tokens=tokens, **others)["logits"]
        session.encode(**others)
        np.testing.assert_allclose(session.step(tokens[:, :12]), want[:, 11], rtol=1e-4, atol=1e-5)
        for at in (12, 13):
            np.testing.assert_allclose(session.step(tokens[:, at : at + 1]), want[:, at], rtol=1e-4, atol=1e-5)


def test_rows_fed_one_by_one_keep_their_own_inputs(translator: ws.Program, translating: ws.Model) -> None:
    """Padding has no place in a full cache: each row runs by itself."""
    others, tokens = _inputs(2, 3), np.random.default_rng(2).integers(0, VOCAB, (2, 16))
    session = translating.session(2, context=16)
    session.encode(**others)
    session.step(tokens, [14, 3])
    want = ws.run(translator, tokens=tokens, **others)["logits"]
    tail = np.array([[*tokens[0, 14:], 0, 0, 0], tokens[1, 3:8]])
    got = session.step(tail, [2, 5])
    np.testing.assert_allclose(got, [want[0, 15], want[1, 7]], rtol=1e-4, atol=1e-5)


def test_encode_refuses(translating: ws.Model, int4: Path) -> None:
    session, others = translating.session(2, context=16), _inputs(2, 3)
    with pytest.raises(InputError, match=r"the model takes more than tokens: style .* encode\(\) give it that"):
        session.step([[1], [2]])
    with pytest.raises(InputError, match="encode takes style, features; given: features"):
        session.encode(features=others["features"])
    with pytest.raises(InputError, match=r"features has shape \[3, 3, 6\]; beside the others it must be \[2, 3, 6\]"):
        session.encode(**{**others, "features": np.zeros((3, 3, 6), np.float32)})
    with pytest.raises(InputError, match="style must be float32, not float64"):
        session.encode(**{**others, "style": np.zeros((2, 1, DIM))})
    with pytest.raises(InputError, match="encode takes no inputs; given: x"):
        ws.load(int4).session().encode(x=1)


def test_tokens_outside_a_vocabulary_that_no_one_stated(translating: ws.Model) -> None:
    session = translating.session(1, context=16)
    session.encode(**_inputs(1, 2))
    with pytest.raises(InputError, match=f"token {VOCAB} is outside the vocabulary of {VOCAB}"):
        session.step([[VOCAB]])


class Bigrams(nn.Module):
    """A language model in which no token sees another."""

    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCAB, DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.head(self.embed(tokens))


def test_a_language_model_without_any_cache(tmp_path: Path) -> None:
    program = nn.trace(Bigrams(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    ws.compile(program, tmp_path / "out")
    model = ws.load(tmp_path / "out")
    (result,) = model.generate([[3, 1]], max_tokens=4)
    table = ws.run(program, tokens=np.arange(VOCAB)[None])["logits"][0].argmax(-1)
    want = [int(table[1])]
    while len(want) < 4:
        want.append(int(table[want[-1]]))
    assert result.tokens == want


def test_the_compiler_is_refused_beside_an_artifacts_runtime(int4: Path) -> None:
    """Two TVM runtimes in one process would end it."""
    script = f"""
import wasat as ws
ws.load({str(int4)!r})
try:
    ws.compile(ws.Program({{}}), "never")
except ws.WasatError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    assert "compile in a process of its own, or import tvm before" in done.stdout, done.stderr
