"""Preprocessing as graphs against Pillow, torchvision, librosa and Whisper's feature extractor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import TypeMismatch, evaluate, parse_program

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "media.npz")
PICTURES = sorted(int(k.split(".")[1]) for k in GOLDEN if k.startswith("picture."))


class _Call(nn.Module):
    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f

    def __call__(self, **inputs: nn.Tensor) -> Any:
        return self.f(**inputs)


def _run(f: Callable[..., Any], types: dict[str, str], **inputs: np.ndarray) -> Any:
    graph = nn.trace(_Call(f), types)["forward"]
    assert str(parse_program(str(graph))["forward"]) == str(graph)
    out = evaluate(graph, inputs, {})
    return out[0] if len(out) == 1 else out


def _picture(i: int) -> tuple[np.ndarray, tuple[int, int]]:
    return GOLDEN[f"picture.{i}"], GOLDEN[f"pillow.bilinear.{i}"].shape[:2]


@pytest.mark.parametrize("i", PICTURES)
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_resize_equals_torchvision(i: int, method: str, antialias: bool) -> None:
    x, size = _picture(i)
    want = GOLDEN[f"torch.{method}.{antialias}.{i}"]
    for type, given in (("u8[h, w, 3]", x), (f"f32[{x.shape[0]}, w, 3]", x.astype(np.float32))):
        got = _run(lambda x: nn.resize(x, size, method, antialias), {"x": type}, x=given)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("i", PICTURES)
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resize_equals_pillow_to_a_level(i: int, method: str) -> None:
    x, size = _picture(i)
    got = _run(lambda x: nn.resize(x, size, method), {"x": "u8[h, w, 3]"}, x=x)
    assert np.abs(np.rint(got.clip(0, 255)) - GOLDEN[f"pillow.{method}.{i}"]).max() <= 1


def test_resize_to_its_own_size_is_nothing() -> None:
    x, _ = _picture(0)
    got = _run(lambda x: nn.resize(x, (37, 53), "bicubic"), {"x": "u8[h, w, 3]"}, x=x)
    np.testing.assert_allclose(got, x, atol=1e-4)


def test_patches_in_reading_order() -> None:
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    got = _run(lambda x: nn.patches(x, (2, 3)), {"x": "f32[b, 4, 6, 3]"}, x=x)
    assert got.shape == (2, 4, 18)
    assert np.array_equal(got[1, 1], x[1, :2, 3:].ravel())
    assert np.array_equal(got[0, 2], x[0, 2:, :3].ravel())


@pytest.mark.parametrize(
    "n, want", [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3]), (8, [1, 3, 5, 7]), (12, [1, 4, 7, 10])]
)
def test_frames_evenly_in_time(n: int, want: list[int]) -> None:
    frames, times = np.arange(n, dtype=np.float32), (np.arange(n) / 30).astype(np.float32)
    for start in (0, 100):
        got, at = _run(
            lambda frames, times: nn.sample_frames(frames, times, 4), {"frames": "f32[n]", "times": "f32[n]"}, frames=frames,
            times=times + np.float32(start),
        )  # fmt: skip
        assert got.tolist() == want
        np.testing.assert_array_equal(at, (times + np.float32(start))[want])


def test_a_frame_that_stays_is_taken_more_often() -> None:
    frames, times = np.arange(3, dtype=np.float32), np.array([0, 0.1, 1.0], np.float32)
    got, _ = _run(
        lambda frames, times: nn.sample_frames(frames, times, 5), {"frames": "f32[n]", "times": "f32[n]"}, frames=frames,
        times=times,
    )  # fmt: skip
    assert got.tolist() == [1, 1, 1, 2, 2]


def test_log_mel_equals_whisper() -> None:
    def features(wave: nn.Tensor) -> nn.Tensor:
        return nn.log_mel(nn.pad(wave, (0,), (480_000,))[:480_000], 16000)

    got = _run(features, {"wave": "f32[n]"}, wave=GOLDEN["wave"])
    assert got.shape == (3000, 80)
    np.testing.assert_allclose(got[:80], GOLDEN["whisper"].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[80:].max(), GOLDEN["whisper.silence"], rtol=1e-4)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_mel_equals_librosa(scale: Any) -> None:
    def mel(wave: nn.Tensor) -> Any:
        filters = nn.mel_filters(16000, 512, 40, 50, 7000, scale)
        plain = nn.log_mel(wave, 16000, mels=40, size=512, hop=200, low=50, high=7000, scale=scale, method="plain")
        return filters, nn.power_spectrum(wave, 512, 200) @ filters, plain

    filters, power, plain = _run(mel, {"wave": "f32[n]"}, wave=GOLDEN["wave"])
    want = GOLDEN[f"mel.{scale}"].T
    np.testing.assert_allclose(filters, GOLDEN[f"filters.{scale}"].T, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(power, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(plain, np.log10(np.maximum(want, 1e-10)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_reflection_of_any_length(n: int) -> None:
    x = np.arange(n, dtype=np.float32)
    got = _run(lambda x: nn.reflect(x, 7), {"x": "f32[n]"}, x=x)
    np.testing.assert_array_equal(got, np.pad(x, 7, "reflect"))


@pytest.mark.parametrize("f, type, message", [
    (lambda x: nn.resize(x, (2, 2), "nearest"), "f32[h, w, 3]", "the method is"),
    (lambda x: nn.resize(x, (2, 2)), "i64[h, w, 3]", "takes u8 or float"),
    (lambda x: nn.resize(x, (2,)), "f32[h, w, 3]", "the size is"),
    (lambda x: nn.patches(x, 4), "f32[6, 8, 3]", "does not split into patches of 4 x 4"),
    (lambda x: nn.frame(x, 8, 2), "f32[5]", "shorter than a frame"),
    (lambda x: nn.log_mel(x, 8000, high=5000), "f32[n]", "does not lie within 0 to 4000 Hz"),
    (lambda x: nn.log_mel(x, 8000, method="loud"), "f32[n]", "the method is"),
    (lambda x: nn.sample_frames(x, x, 2), "f32[n, 3]", "one time for each frame"),
])  # fmt: skip
def test_refusals(f: Callable[..., Any], type: str, message: str) -> None:
    with pytest.raises(TypeMismatch, match=message):
        nn.trace(_Call(f), {"x": type})
