"""Real ONNX files, from the command line: compiled, loaded, and equal to onnxruntime at several sizes. ``make real`` runs this.

The weights of an artifact take no more room than the file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fetch

pytestmark = pytest.mark.real

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Real:
    """One file: options of ``wasat compile``, and inputs at several sizes."""

    runs: list[Callable[[np.random.Generator], Inputs]]
    options: tuple[str, ...] = ()
    constants: Inputs = field(default_factory=dict)
    """What onnxruntime is given besides: an input that the options fix."""
    atol: float = 1e-4


def _f32(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(scale=0.3, size=shape).astype(np.float32)


def _text(batch: int, length: int) -> Callable[[np.random.Generator], Inputs]:
    def make(rng: np.random.Generator) -> Inputs:
        ids = rng.integers(1000, 20000, (batch, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    return make


def _picture(batch: int, height: int, width: int) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: {"x": _f32(rng, batch, 3, height, width)}


def _sound(batch: int, width: int) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: {"input": _f32(rng, batch, width), "state": _f32(rng, 2, batch, 128)}


def _frames(count: int) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: {"input": _f32(rng, count, 576), "h": _f32(rng, 1, 1, 128), "c": _f32(rng, 1, 1, 128)}


RATE = {"sr": np.array(16000)}
SOUNDS = [_sound(1, 512), _sound(3, 512)]
FIXED = ("--constant", "sr=16000")
CASES = {
    "magika": Real([lambda rng: {"bytes": rng.integers(0, 256, (1, 2048)).astype(np.int32)},
                    lambda rng: {"bytes": rng.integers(0, 256, (5, 2048)).astype(np.int32)}]),
    "minilm-int8": Real([_text(1, 1), _text(2, 7), _text(3, 64)]),
    "rapidocr-cls": Real([_picture(1, 48, 192), _picture(3, 48, 192)]),
    "rapidocr-det": Real([_picture(1, 64, 96), _picture(2, 160, 128)]),
    "rapidocr-rec": Real([_picture(1, 48, 160), _picture(2, 48, 320)]),
    "silero": Real(SOUNDS, (*FIXED, "--size", "input_1=512"), RATE),
    "silero-half": Real(SOUNDS, ("--size", "sequence=512")),
    "silero-op15": Real(SOUNDS, (*FIXED, "--size", "sequence=512"), RATE),
    "silero-op18": Real([*SOUNDS, _sound(2, 576)], FIXED, RATE),
    "silero-openvino": Real([_sound(1, 576)]),
    "silero-sequence": Real([_frames(1), _frames(2), _frames(9)]),
}  # fmt: skip


def test_every_file_is_here() -> None:
    assert CASES.keys() == {name for name in fetch.FILES if not name.endswith((".gguf", ".zip"))}


def wasat(*args: object) -> None:
    done = subprocess.run([Path(sys.executable).parent / "wasat", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, f"wasat {' '.join(map(str, args))}\n{done.stderr}"


@pytest.mark.parametrize("name", CASES)
def test_equals_onnxruntime(name: str, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    case, file = CASES[name], fetch.fetch(name)
    wasat("compile", file, "-o", tmp_path / "model", *case.options)
    weights = (tmp_path / "model" / "weights.safetensors").stat().st_size
    assert weights < 1.05 * file.stat().st_size + 1e5
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for i, make in enumerate(case.runs):
        inputs = make(np.random.default_rng(i))
        files = []
        for key, x in inputs.items():
            np.save(tmp_path / f"{key}.npy", x)
            files += ["--input", f"{key}={tmp_path / key}.npy"]
        wasat("run", tmp_path / "model", *files, "-o", tmp_path / "y.npz")
        want = dict(zip((o.name for o in session.get_outputs()), session.run(None, {**inputs, **case.constants})))
        with np.load(tmp_path / "y.npz") as got:
            assert sorted(got) == sorted(want)
            for key, y in want.items():
                assert got[key].shape == y.shape
                np.testing.assert_allclose(got[key], y, rtol=1e-4, atol=case.atol, err_msg=f"{key} at {i}")
                print(f"{name} {key} {y.shape}: largest difference {np.abs(got[key] - y).max():.2g} of {np.abs(y).max():.2g}")
