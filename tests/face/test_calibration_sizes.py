"""Calibration makes features one size first, where weights were not made for the rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from test_calibration import MODEL, TEXT, with_tokenizer
from wasat.ir import ArrayParam, Program

import wasat as ws
from wasat import calibration
from wasat.testing import random_program


def uneven() -> Program:
    """A norm that makes some features thirty times the others, in front of a layer that reads them as they come."""
    text = MODEL.replace("%u: f32[b, s, 96] = linear(%e", """%n: f32[b, s, 64] = rms_norm(%e, %norm.weight) {eps=1e-06}
  %u: f32[b, s, 96] = linear(%n""").replace("  param %up.weight", "  param %norm.weight: f32[64]\n  param %up.weight")
    program = with_tokenizer(random_program(text))
    gain = np.where(np.arange(64) % 16 == 3, 30, 1).astype(np.float32)
    factors: dict[str, Any] = {"norm.weight": gain, "head.weight": 0.02}
    for name, x in {n: p.load() for n, p in program.params.items()}.items():
        new = gain if name == "norm.weight" else x * np.float32(factors.get(name, 0.125))
        program.params[name] = ArrayParam(new, program.params[name].type)
    return program


def test_features_are_made_one_size_before_weights_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    program, options = uneven(), dict[str, Any](recipe="int4zb32f16", tokens=256, window=64)  # whose codes are only searched
    small, report = ws.quantize(program, TEXT, **options)
    assert small.params.keys() == program.params.keys()
    assert [w.name for w in report.weights] == ["embed.weight", "up.weight", "down.weight", "head.weight"]
    assert np.ptp(small.load("norm.weight")) < 15  # was 29
    monkeypatch.setattr(calibration, "_equalize", lambda *args: None)
    plain, before = ws.quantize(program, TEXT, **options)
    np.testing.assert_array_equal(plain.load("norm.weight"), program.load("norm.weight"))
    [after, then] = ({w.name: w.error for w in r.weights}["up.weight"] for r in (report, before))
    assert after < 0.8 * then, (after, then)
    assert report.bits == before.bits


def test_weights_that_were_rounded_in_training_are_not_scaled() -> None:
    program = uneven()
    program.origin = dataclasses.replace(program.origin, rounded="q4_1")
    for recipe in ("int4-plain", "q4_1"):
        small, _ = ws.quantize(program, TEXT, recipe=recipe, tokens=128, window=64)
        np.testing.assert_array_equal(small.load("norm.weight"), program.load("norm.weight"))
