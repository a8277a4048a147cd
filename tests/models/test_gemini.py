"""The Gemini-style model: one module serves and learns; every variant keeps its meaning through caches, fusion, compilation."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wasat.ir import ArrayParam, Program, verify
from wasat.training.data import Batch
from wasat.training.loop import train
from wasat.training.losses import add_loss, cross_entropy
from wasat.training.step import train_step

import wasat as ws
from wasat.driver import optimize, run
from wasat.models import gemini

TINY = gemini.preset("tiny")
assert isinstance(TINY.vision, gemini.ViT)
CONFIGS = {
    "vit": TINY,
    "conv": replace(TINY, vision=gemini.ConvNet(16, 4, (8, 16), (1, 1))),
    "rope, windows and layers over time": replace(
        TINY, vision=replace(TINY.vision, positions="rope", resize="bicubic"), video=gemini.Video(4, 1, 1, heads=4, hidden=48),
        text=replace(TINY.text, window=4, period=2, rope_factor=2.0, softcap=5.0, post_norm=True, tied=False, qk_norm=False),
    ),
    "cross-attention and heads": replace(
        TINY, cross_every=2, heads=(gemini.Head("digit", 10, "image"), gemini.Head("topic", 3, "text")),
    ),
    "text": gemini.Config(TINY.text),
}  # fmt: skip
VOCAB, FIRST = TINY.text.vocab, TINY.text.vocab  # the id of media row 0
TOKENS = np.array([[3, 64, 65, 66, 67, 5, 9, 68, 69], [72, 73, 74, 4, 75, 76, 77, 78, 63]])  # media first, last, among text
SEEN = np.array([[0, 1, 2, 3, -1], [-1, -1, -1, -1, -1]])  # the second row attends to nothing


def awake(program: Program) -> Program:
    """The gates of cross-attention opened: at 0 they would hide what they gate. Loaded once."""
    for name, p in program.params.items():
        x = np.full((1,), 0.7, np.float32) if name.endswith("_gate") else p.load()
        program.params[name] = ArrayParam(x, p.type)
    return program


def batch(config: gemini.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Two images, one sound, one clip, of the sizes that training has."""
    r = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {"tokens": TOKENS}
    if config.modalities:
        made["images"] = r.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
        made["audio"] = r.standard_normal((1, 800)).astype(np.float32) * np.float32(0.1)
        made["videos"] = r.integers(0, 256, (1, 4, 16, 16, 3)).astype(np.uint8)
        made["times"] = np.array([[2, 2.5, 3, 3.5]], np.float32)
    else:
        made["tokens"] = TOKENS % VOCAB
    if config.cross_every:
        made["seen"] = SEEN
    if any(h.of == "text" for h in config.heads):
        made["last"] = np.array([8, 5])
    return made


def encoded(program: Program, b: dict[str, np.ndarray]) -> np.ndarray:
    """The media rows that the serving program makes of a batch: images, audio, videos."""
    rows = [run(program, "encode_image", image=x)["rows"] for x in b["images"]]
    rows += [run(program, "encode_audio", audio=x)["rows"] for x in b["audio"]]
    rows += [run(program, "encode_video", frames=x, times=t)["rows"] for x, t in zip(b["videos"], b["times"])]
    return np.concatenate(rows)


def stream(config: gemini.Config, program: Program, b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ``forward`` takes."""
    media = {"media": encoded(program, b)} if config.modalities else {}
    return {"tokens": b["tokens"], **media, **({"seen": SEEN} if config.cross_every else {})}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_serves_is_what_learned(name: str) -> None:
    config = CONFIGS[name]
    model = gemini.Gemini(config)
    serving, training = awake(model.program()), awake(model.training_program())
    for g in (*serving.graphs.values(), *training.graphs.values()):
        verify(g)
    assert serving.params.keys() == training.params.keys() == model.parameters().keys()
    b = batch(config)
    inputs = stream(config, serving, b)
    learned = run(training, **b)
    np.testing.assert_allclose(run(serving, **inputs)["logits"], learned["logits"], rtol=1e-4, atol=1e-5)
    for h in config.heads:
        if h.of == "text":
            given: list[dict[str, Any]] = [{**inputs, "last": b["last"]}]
        else:
            given = [{"image": x} for x in b["images"]]
        got = np.concatenate([np.atleast_2d(run(serving, f"classify_{h.name}", **x)["logits"]) for x in given])
        np.testing.assert_allclose(got, learned[h.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_fuses_and_derives_caches(name: str) -> None:
    """Every attention is fused, none is missed; token by token and in chunks, logits are those of the whole."""
    config = CONFIGS[name]
    program = awake(gemini.Gemini(config).program())
    inputs = stream(config, program, batch(config))
    full = run(program, **inputs)["logits"]
    made, report = optimize(program, chunk=4)
    assert not [r.message for s in report.steps for r in s.remarks if r.kind == "missed" and "softmax" in r.message]
    layers = config.text.layers
    crossed = layers // config.cross_every if config.cross_every else 0
    seen = sum(len(getattr(gemini.Gemini(config), k).blocks) for k in ("audio",) if config.audio is not None)
    counts = {g.name: sum(n.op.name in ("attention", "cached_attention") for n in g.nodes) for g in made.graphs.values()}
    assert counts["prefill"] == counts["decode"] == layers + crossed
    vit = config.vision.layers if isinstance(config.vision, gemini.ViT) else 0
    over_time = (config.video.layers or 0) if config.video else 0
    expected = {"encode_image": vit, "encode_audio": seen, "encode_video": vit + over_time}
    assert {k: counts[k] for k in counts.keys() & expected.keys()} == {k: v for k, v in expected.items() if k in counts}

    tokens, rest = inputs.pop("tokens"), inputs
    memory = run(made, "encode", **{v.name: rest[v.name] for v in made["encode"].inputs}) if "encode" in made.graphs else {}
    given = {**rest, **memory}
    taken = {k: v for k, v in given.items() if any(i.name == k for i in made["prefill"].inputs)}
    states = {
        v.name: np.zeros(v.type.substitute({"b": 2, "c": 16}).concrete({}), np.float32)
        for v in made["decode"].inputs if v.name.startswith("cache.")
    }  # fmt: skip
    at = 0
    for n in (1, 4, 3, 1):
        past = np.full(2, at)
        step: dict[str, Any] = {"tokens": tokens[:, at : at + n], "past": past, **taken, **states}
        out = run(made, "decode", **step) if n == 1 else run(made, "prefill", **step, last=np.full(2, n - 1))
        states = {k: out[k] for k in states}
        at += n
        np.testing.assert_allclose(out["logits"], full[:, at - 1], rtol=1e-4, atol=1e-5)


def test_tokens_take_their_rows_and_only_those() -> None:
    """The logits up to a token do not move with the rows it does not name; without media, a row of zeros is never read."""
    program = awake(gemini.Gemini(TINY).program())
    r = np.random.default_rng(1)
    media = r.standard_normal((6, 32)).astype(np.float32)
    tokens = np.array([[7, FIRST + 5, 8, FIRST + 2]])
    full = run(program, tokens=tokens, media=media)["logits"]
    others = media.copy()
    others[[0, 1, 3, 4]] = 9.0
    np.testing.assert_array_equal(run(program, tokens=tokens, media=others)["logits"], full)
    moved = media.copy()
    moved[2] += 1.0
    got = run(program, tokens=tokens, media=moved)["logits"]
    np.testing.assert_array_equal(got[:, :3], full[:, :3])
    assert np.abs(got[:, 3] - full[:, 3]).max() > 1e-3
    text = np.array([[7, 8, 9]])
    alone = run(program, tokens=text, media=np.zeros((1, 32), np.float32))["logits"]
    np.testing.assert_array_equal(run(program, tokens=text, media=media)["logits"], alone)


def test_media_of_other_sizes() -> None:
    """Pictures are resized, sound is cut off or followed by silence, frames are chosen; the times of a clip are relative."""
    program = awake(gemini.Gemini(TINY).program())
    r = np.random.default_rng(2)
    flat = np.full((23, 9, 3), 77, np.uint8)
    small = run(program, "encode_image", image=flat)["rows"]
    np.testing.assert_allclose(small, run(program, "encode_image", image=flat[:16, :1].repeat(16, 1))["rows"], atol=1e-5)
    wave = r.standard_normal(500).astype(np.float32)
    padded = np.concatenate([wave, np.zeros(300, np.float32)])
    heard = run(program, "encode_audio", audio=wave)["rows"]
    np.testing.assert_allclose(heard, run(program, "encode_audio", audio=padded)["rows"], atol=1e-6)
    longer = np.concatenate([padded, np.ones(100, np.float32)])
    np.testing.assert_allclose(run(program, "encode_audio", audio=longer)["rows"], heard, atol=1e-6)
    frames, times = r.integers(0, 256, (9, 16, 16, 3)).astype(np.uint8), np.arange(9, dtype=np.float32) / 4
    shown = run(program, "encode_video", frames=frames, times=times)["rows"]
    assert shown.shape == (4, 32)
    np.testing.assert_allclose(run(program, "encode_video", frames=frames, times=times + 8)["rows"], shown, atol=1e-4)
    slower = run(program, "encode_video", frames=frames, times=times * 3)["rows"]
    assert np.abs(slower - shown).max() > 1e-3


def test_a_gate_of_zero_is_the_model_without_cross_attention() -> None:
    plain = gemini.Gemini(TINY).program()
    crossed = gemini.Gemini(replace(TINY, cross_every=1)).program()
    assert any("cross" in name for name in crossed.params)
    media = np.random.default_rng(3).standard_normal((6, 32)).astype(np.float32)
    tokens = TOKENS % (VOCAB + 6)
    got = run(crossed, tokens=tokens, media=media, seen=SEEN)["logits"]
    np.testing.assert_array_equal(got, run(plain, tokens=tokens, media=media)["logits"])
    awake(crossed)
    full = run(crossed, tokens=tokens, media=media, seen=SEEN)["logits"]
    assert np.abs(full[0] - got[0]).max() > 1e-3
    other = media.copy()
    other[5] += 1.0
    unseen = np.where(tokens == FIRST + 5, 0, tokens)
    a, b = (run(crossed, tokens=unseen, media=m, seen=SEEN)["logits"] for m in (media, other))
    np.testing.assert_array_equal(a, b)


# -- compiled ----------------------------------------------------------------------------------------------------------------
def test_the_artifact_does_what_the_interpreter_does(tmp_path: Path) -> None:
    config = replace(TINY, text=replace(TINY.text, layers=1), cross_every=1)
    program = awake(gemini.Gemini(config).program())
    gemini.save(tmp_path / "model", config, program.params, dtype="f32")
    ws.compile(ws.from_pretrained(tmp_path / "model"), tmp_path / "artifact")
    model = ws.load(tmp_path / "artifact")
    b = batch(config)
    for entry, given in {
        "encode_image": {"image": b["images"][0]}, "encode_audio": {"audio": b["audio"][0]},
        "encode_video": {"frames": b["videos"][0], "times": b["times"][0]},
    }.items():  # fmt: skip
        want = run(program, entry, **given)["rows"]
        np.testing.assert_allclose(model.run(entry, **given)["rows"], want, rtol=1e-4, atol=1e-5)
    r = np.random.default_rng(4)
    picture = r.integers(0, 256, (37, 21, 3)).astype(np.uint8)
    want = run(program, "encode_image", image=picture)["rows"]
    np.testing.assert_allclose(model.run("encode_image", image=picture)["rows"], want, rtol=1e-4, atol=1e-5)
    inputs = stream(config, program, b)
    full = run(program, **inputs)["logits"]
    session = model.session(2)
    session.encode(media=inputs["media"], seen=SEEN)
    session.step(TOKENS[:, :4])
    session.step(TOKENS[:, 4:8])
    np.testing.assert_allclose(session.step(TOKENS[:, 8:]), full[:, 8], rtol=1e-4, atol=1e-5)


def test_quantized_and_compiled() -> None:
    """Weights of the vision encoder int8, of the backbone int4."""
    config = replace(TINY, text=replace(TINY.text, layers=1))
    program = awake(gemini.Gemini(config).program())
    made, _ = optimize(program, quantize="int8", activation=None, overrides={"backbone.*": "int4"})
    for entry in ("encode_image", "prefill"):
        assert "quantized_linear" in {n.op.name for n in made[entry].nodes}
    made.graphs = {k: made[k] for k in ("encode_image", "prefill")}
    b = batch(config)
    r = np.random.default_rng(5)
    caches = {
        v.name: np.zeros(v.type.substitute({"b": 2, "c": 16}).concrete({}), np.float32)
        for v in made["prefill"].inputs if v.name.startswith("cache.")
    }  # fmt: skip
    prompt = {
        "tokens": TOKENS % (VOCAB + 6), "media": r.standard_normal((6, 32)).astype(np.float32), "past": np.zeros(2, np.int64),
        "last": np.array([8, 4]),
    }  # fmt: skip
    for entry, output, given in (("encode_image", "rows", {"image": b["images"][0]}), ("prefill", "logits", prompt | caches)):
        want = run(made, entry, **given)[output]
        got = run(made, entry, backend="cpu", **given)[output]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# -- training ----------------------------------------------------------------------------------------------------------------
class Repeated:
    """One batch, again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def state(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass


def with_loss(config: gemini.Config, *modalities: str) -> tuple[Program, dict[str, np.ndarray]]:
    program = gemini.Gemini(config).training_program(modalities or None)
    labels = np.where(TOKENS < VOCAB, TOKENS, -1)
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
    given = {**batch(config), "labels": labels}
    return program, {v.name: given[v.name] for v in program["loss"].inputs}


@pytest.mark.parametrize("name", ["vit", "conv", "cross-attention and heads"])
def test_a_step_reaches_every_parameter(name: str) -> None:
    config = replace(CONFIGS[name], heads=())
    program, given = with_loss(config)
    awake(program)
    made = train_step(program)
    out = run(made.program, "train_step", **given, **made.states)
    still = [k for k in program.params if np.array_equal(out[k], made.states[k])]
    assert not still


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path) -> None:
    program, given = with_loss(replace(TINY, text=replace(TINY.text, layers=1)), "image")
    given["tokens"] = TOKENS % (VOCAB + 8)  # of two images
    done = train(program, Repeated(given), tmp_path, steps=8, progress=lambda *_: None)
    losses = [line["loss"] for line in done.log]
    assert losses[-1] < 0.95 * losses[0]
    assert all(b < a for a, b in pairwise(losses))


# -- sizes -------------------------------------------------------------------------------------------------------------------
def millions(config: gemini.Config, part: str) -> float:
    sizes = {k: int(np.prod(p.type.concrete({}))) for k, p in gemini.Gemini(config).parameters().items()}
    return sum(n for k, n in sizes.items() if k.startswith(part)) / 1e6


@pytest.mark.parametrize("name, backbone", [("4b", 3209), ("12b", 10759), ("27b", 25600)])
def test_published_sizes(name: str, backbone: int) -> None:
    """Table 1 of arXiv:2503.19786: parameters of the decoder without embedding, and of the vision encoder."""
    config = gemini.preset(name)
    assert millions(config, "backbone.") == pytest.approx(backbone, rel=0.01)
    assert millions(config, "vision.") == pytest.approx(417, rel=0.02)


def test_the_small_one_is_small() -> None:
    assert millions(gemini.preset("small"), "") < 3.5


@pytest.mark.slow
def test_the_big_one_is_planned_without_its_numbers() -> None:
    """27B: traced, verified, quantized, given caches and planned in less memory than a hundredth of its weights."""
    script = """
from wasat.driver import optimize
from wasat.models import gemini
from wasat.plan import plan
program = gemini.Gemini(gemini.preset("27b")).program()
made, _ = optimize(program, quantize="int4")
kinds = {s.kind for s in made.interface.states}
assert set(made.graphs) == {"encode_image", "encode_audio", "encode_video", "prefill", "decode"} and kinds == {"full", "ring"}
assert len(made.interface.states) == 2 * 62
found = plan(program, schemes=["int4"], context=8192)
assert 28.0e9 < found.parameters < 28.2e9 and 16.5e9 < found.weights["int4"] < 16.8e9 and not found.unknown
assert found.cache_per_token == 10 * 2 * 16 * 128 * 4, "every sixth layer sees everything"
with open("/proc/self/status") as f:  # not ru_maxrss: a child begins with its parent's
    peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
assert peak < 1_000_000, "kilobytes"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
