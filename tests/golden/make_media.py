"""Makes tests/golden/media.npz: resized pictures, mel filters and log-mel features by the public implementations.

Pillow, torch's interpolate (torchvision's resize of floats), librosa and transformers' WhisperFeatureExtractor; their
versions are in the file.
"""

from __future__ import annotations

from pathlib import Path

import librosa
import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from torch.nn.functional import interpolate
from transformers import WhisperFeatureExtractor

SIZES = [(37, 53, 16, 16), (9, 14, 24, 31), (1, 1, 5, 3), (40, 6, 10, 20), (224, 3, 7, 2)]
"""Of pictures, and to what they are resized."""


def main() -> None:
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    for i, (h, w, th, tw) in enumerate(SIZES):
        y, x = np.mgrid[:h, :w]
        waves = 60 * np.sin(y[..., None] * 0.4 + np.arange(3)) * np.cos(x[..., None] * 0.5)
        picture = (127 + waves + rng.normal(0, 8, (h, w, 3))).clip(0, 255).astype(np.uint8)
        out[f"picture.{i}"] = picture
        tensor = torch.tensor(picture).permute(2, 0, 1).float()
        for method in ("bilinear", "bicubic"):
            for antialias in (True, False):  # what torchvision's resize calls for floats
                result = interpolate(tensor[None], [th, tw], mode=method, antialias=antialias, align_corners=False)[0]
                out[f"torch.{method}.{antialias}.{i}"] = result.permute(1, 2, 0).numpy()
            pillow = Image.fromarray(picture).resize((tw, th), Image.Resampling[method.upper()])
            out[f"pillow.{method}.{i}"] = np.asarray(pillow)
    time = np.arange(8000) / 16000
    wave = 0.4 * np.sin(2 * np.pi * (300 * time + 2000 * time**2)) + 0.02 * rng.standard_normal(len(time))
    wave = wave.astype(np.float32)
    out["wave"] = wave
    extractor = WhisperFeatureExtractor()
    features = extractor(wave, sampling_rate=16000, return_tensors="np")["input_features"][0]
    out["whisper"] = features[:, :80]  # what follows is silence
    out["whisper.silence"] = features[:, 80:].max()
    for name, options in {"slaney": {}, "htk": {"htk": True, "norm": None}}.items():
        out[f"filters.{name}"] = librosa.filters.mel(sr=16000, n_fft=512, n_mels=40, fmin=50, fmax=7000, **options)
        out[f"mel.{name}"] = librosa.feature.melspectrogram(
            y=wave, sr=16000, n_fft=512, hop_length=200, n_mels=40, fmin=50, fmax=7000, pad_mode="reflect", **options
        )
    versions = [f"{m.__name__} {m.__version__}" for m in (PIL, torch, librosa, transformers)]
    np.savez_compressed(Path(__file__).with_name("media.npz"), versions=np.array(versions), **out)


if __name__ == "__main__":
    main()
