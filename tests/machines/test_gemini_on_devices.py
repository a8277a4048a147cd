"""The Gemini-style model on a software device: pictures, sound and text in, the tokens that the CPU writes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from plan_help import need
from tokenizers import Tokenizer, models, pre_tokenizers
from wasat.ir import ArrayParam, Program
from wasat.runtime import Audio, Image

import wasat as ws
from wasat.models import gemini

pytestmark = pytest.mark.machines
TINY = gemini.preset("tiny")
CONFIG = replace(TINY, text=replace(TINY.text, layers=2, context=64), cross_every=2, heads=())
RNG = np.random.default_rng(11)
RED = Image(RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8))
TONE = Audio((0.3 * np.sin(np.arange(700) * 0.4)).astype(np.float32), 8000)


WORDS = ["what", "is", "this", "and", "that", "red", "blue"]


def program(folder: Path) -> Program:
    """Gates open, and numbers large enough for pictures to decide what comes next; its tokens are words."""
    p = gemini.Gemini(CONFIG).program(seed=2)
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="what"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.save(str(folder / "tokenizer.json"))
    p.origin = replace(p.origin, tokenizer=str(folder / "tokenizer.json"))
    for name, source in p.params.items():
        x = np.full((1,), 0.9, np.float32) if name.endswith("_gate") else source.load()
        p.params[name] = ArrayParam(x * np.float32(3 if "projection.linear" in name else 1), source.type)
    return p


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
def test_pictures_sound_and_text(target: str, tmp_path: Path) -> None:
    need(target)
    made = program(tmp_path)
    for name in ("cpu", target):
        ws.compile(made, tmp_path / name, target=name, chunk=8)
    cpu, device = (ws.load(tmp_path / name) for name in ("cpu", target))
    for medium in (RED, TONE):
        np.testing.assert_allclose(device.embed(medium), cpu.embed(medium), atol=1e-4)
    prompts = [[RED, "what is this"], ["what is this and that red blue and what is that"], [TONE, "is this", RED]]
    want = [cpu.generate([prompt], max_tokens=6)[0].tokens for prompt in prompts]
    assert [device.generate([prompt], max_tokens=6)[0].tokens for prompt in prompts] == want
    assert [g.tokens for g in device.generate(prompts, max_tokens=6)] == want
