"""Configurations and folders: the way there and back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.frontend.fields import ConfigError
from wasat.ir import ArrayParam, CheckpointError, Encoder, Generation, Media, Program, type_of

import wasat as ws
from wasat.models import gemini

TINY = gemini.preset("tiny")
FULL = replace(
    TINY, vision=gemini.ConvNet(16, 4, (8, 16), (1, 1)), video=gemini.Video(4, 1, 2, 4, 48), cross_every=1,
    heads=(gemini.Head("digit", 10, "image"),), bos=1, eos=(2, 3), pad=0,
)  # fmt: skip


@pytest.mark.parametrize("config", [*map(gemini.preset, gemini.PRESETS), FULL], ids=[*gemini.PRESETS, "full"])
def test_json_and_back(config: gemini.Config) -> None:
    assert gemini.Config.from_json(json.loads(json.dumps(config.to_json()))) == config


WRONG: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "unknown field": ([("text.dims", 3)], "text.dims is unknown; did you mean dim"),
    "missing field": ([("audio.mels", None)], "audio.mels = None must be a whole number"),
    "bool for int": ([("text.layers", True)], "text.layers = True must be a whole number"),
    "no such kind": ([("vision.kind", "resnet")], "vision.kind = 'resnet' must be vit or conv"),
    "literal": ([("vision.positions", "none")], "must be 'learned' or 'rope'"),
    "list": ([("audio.strides", 2)], "audio.strides = 2 must be a list"),
    "zero": ([("text.dim", 0)], "Text: dim is 0"),
    "infinite": ([("text.theta", float("inf"))], "text.theta = inf must be finite"),
    "heads": ([("text.kv_heads", 3)], "4 heads do not share 3"),
    "odd head": ([("text.head_dim", 7)], "head_dim is 7"),
    "activation": ([("text.activation", "gelu2")], "activation is 'gelu2'"),
    "patch": ([("vision.patch", 5)], "size 16 is not a multiple of patch 5"),
    "split": ([("vision.heads", 5)], "dim 32 does not split into 5 heads"),
    "rope heads": ([("vision.positions", "rope"), ("vision.heads", 16)], "rope needs heads of a multiple of 4"),
    "image rows": ([("vision.tokens", 9)], "ViT: tokens is 9"),
    "frame rows": ([("video.tokens", 2)], "Video: tokens is 2"),
    "half a time encoder": ([("video.layers", 1)], "layers, heads and hidden are given together"),
    "heads over time": ([("video.layers", 1), ("video.heads", 5), ("video.hidden", 8)], "dim 32 does not split into 5 heads"),
    "pool": ([("audio.pool", 2)], "pool is 2, which does not divide 3"),
    "short": ([("audio.seconds", 0.001)], "8 samples are less than a window"),
    "strides": ([("audio.strides", [2])], "expected two numbers"),
    "cross": ([("cross_every", 3)], "cross_every is 3; expected 1 to 2"),
    "blind cross": ([("cross_every", 1), ("vision", None), ("video", None), ("audio", None)], "needs an encoder"),
    "blind video": ([("vision", None)], "video needs vision"),
    "head": ([("heads", [{"name": "x", "classes": 2, "of": "audio"}]), ("audio", None)], "which the model lacks"),
    "two heads": ([("heads", 2 * [{"name": "x", "classes": 2, "of": "text"}])], "two heads have one name"),
    "head name": ([("heads", [{"name": "x y", "classes": 2, "of": "text"}])], "name is 'x y'"),
    "eos": ([("eos", [64])], "token 64 is outside the vocabulary"),
    "type": ([("model_type", "gemma")], "model_type is 'gemma'"),
}


@pytest.mark.parametrize("edits, message", WRONG.values(), ids=WRONG)
def test_a_wrong_config_is_refused(edits: list[tuple[str, Any]], message: str) -> None:
    data = json.loads(json.dumps(TINY.to_json()))
    for path, value in edits:
        *outer, last = path.split(".")
        at = data
        for key in outer:
            at = at[key]
        at[last] = value
    with pytest.raises(ConfigError, match=message.replace("'", ".")):
        gemini.Config.from_json(data)


@pytest.mark.parametrize("changes, message", [
    ({"channels": ()}, "channels is"), ({"blocks": (1,)}, "blocks is"), ({"kernel": 4}, "it must be odd"),
    ({"size": 18, "tokens": 1}, "cannot be halved 2 times"),
])  # fmt: skip
def test_a_wrong_conv_net_is_refused(changes: dict[str, Any], message: str) -> None:
    assert isinstance(FULL.vision, gemini.ConvNet)
    with pytest.raises(ConfigError, match=message):
        replace(FULL.vision, **changes)


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="there is no preset 'huge'"):
        gemini.preset("huge")
    with pytest.raises(ConfigError, match="the model has no smell; it has image, audio, video"):
        gemini.Gemini(TINY).training_program(("image", "smell"))
    data = TINY.to_json()
    del data["text"]["vocab"]
    with pytest.raises(ConfigError, match=r"config: text\.vocab is missing"):
        gemini.Config.from_json(data)


# -- folders -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def program() -> Program:
    return gemini.Gemini(FULL).program(seed=3)


def test_a_folder_and_back(program: Program, tmp_path: Path) -> None:
    """Names, numbers (of half precision) and what the runtime must know; the tokenizer is found."""
    (tmp_path / "t.json").write_text("{}")
    gemini.save(tmp_path / "m", FULL, program.params, tokenizer=tmp_path / "t.json")
    made = ws.from_pretrained(tmp_path / "m")
    assert list(made.graphs) == list(program.graphs)
    assert made.params.keys() == program.params.keys()
    for name, p in made.params.items():
        np.testing.assert_array_equal(p.load(), program.params[name].load().astype(np.float16).astype(np.float32))
    assert made.origin.tokenizer == str(tmp_path / "m" / "tokenizer.json")
    assert made.interface.generation == Generation(1, (2, 3), 0)
    assert made.interface.context == 128
    encoders = (
        Encoder("image", "encode_image", size=16), Encoder("audio", "encode_audio", rate=8000, samples=800),
        Encoder("video", "encode_video", frames=4),
    )  # fmt: skip
    assert made.interface.media == Media(64, 32, encoders, seen=True)
    gemini.save(tmp_path / "m", FULL, made.params, tokenizer=tmp_path / "m" / "tokenizer.json")  # over itself


@pytest.mark.parametrize("value, message", [
    (None, "is missing"), (np.zeros(3, np.float32), "the configuration asks for"),
    (np.full((64, 32), 1e5, np.float32), "is not finite as f16: save as f32"),
])  # fmt: skip
def test_what_is_not_saved(program: Program, tmp_path: Path, value: np.ndarray | None, message: str) -> None:
    params = dict(program.params)
    params.pop("embedding.weight")
    if value is not None:
        params["embedding.weight"] = ArrayParam(value, type_of(value))
    with pytest.raises(CheckpointError, match=message):
        gemini.save(tmp_path / "m", FULL, params)
    assert not (tmp_path / "m").exists()


def test_what_does_not_fit_is_not_loaded(program: Program, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a checkpoint is stored as"):
        gemini.save(tmp_path, FULL, program.params, dtype="i8")
    gemini.save(tmp_path, FULL, program.params, dtype="f32")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    with pytest.raises(CheckpointError, match=r"missing: vision\.patch_embedding\.weight"):
        gemini.load(tmp_path)


# -- what the model brought to nn --------------------------------------------------------------------------------------------
def test_rope_2d_and_sinusoid_by_formula() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            self.rope = nn.RoPE2D(8, 3)

        def __call__(self, x: nn.Tensor, times: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
            return self.rope(x, nn.positions(x)), nn.sinusoid(times, 6, shortest=1.0, longest=4.0)

    program = nn.trace(Both(), {"x": "f32[1, 6, 1, 8]", "times": "f32[n]"}, outputs=["x", "t"])
    x, times = np.random.default_rng(0).standard_normal((1, 6, 1, 8)).astype(np.float32), np.array([0.0, 0.5, 3.0], np.float32)
    out = ws.run(program, x=x, times=times)
    for i in range(6):
        for half, place in ((0, i // 3), (4, i % 3)):
            pairs = x[0, i, 0, half : half + 2] + 1j * x[0, i, 0, half + 2 : half + 4]
            turned = pairs * np.exp(1j * place * np.array([1.0, 0.1]))  # theta 100
            np.testing.assert_allclose(out["x"][0, i, 0, half : half + 4], [*turned.real, *turned.imag], atol=1e-5)
    waves = np.exp(2j * np.pi * times[:, None] / np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(out["t"], np.concatenate([waves.imag, waves.real], 1), atol=1e-5)


def test_nn_refusals() -> None:
    with pytest.raises(ws.WasatError, match="RoPE2D: heads of a multiple of 4"):
        nn.RoPE2D(6, 3)
    with pytest.raises(ws.WasatError, match=r"nn\.sinusoid: dim is 5"):
        nn.trace(nn.Module(), {"t": "f32[n]"}, method=lambda t: nn.sinusoid(t, 5))


def test_a_folder_says_what_its_weights_were_rounded_for(tmp_path: Path) -> None:
    params = gemini.Gemini(TINY).training_program(seed=0).params
    gemini.save(tmp_path, TINY, params, dtype="f32", rounded="int4-plain")
    assert gemini.load(tmp_path).origin.rounded == "int4-plain"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rounded": 4}))
    with pytest.raises(ConfigError, match="rounded is 4; expected the name of a scheme"):
        gemini.load(tmp_path)
