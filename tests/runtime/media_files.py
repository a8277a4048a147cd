"""A picture, a sound and a clip, and small files of every kind, as bytes."""

from __future__ import annotations

import io
import wave
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image as Pillow

PICTURE = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
TONE = (0.3 * np.sin(np.arange(4000) * 0.3)).astype(np.float32)
CLIP = np.stack([np.full((16, 24, 3), 40 * i, np.uint8) for i in range(6)])


def png(x: np.ndarray) -> bytes:
    """u8 pixels."""
    out = io.BytesIO()
    Pillow.fromarray(x).save(out, "PNG")
    return out.getvalue()


def gif(frames: np.ndarray, milliseconds: int) -> bytes:
    """u8[n, h, w, 3], each shown for so long."""
    out = io.BytesIO()
    first, *rest = (Pillow.fromarray(x) for x in frames)
    first.save(out, "GIF", save_all=True, append_images=rest, duration=milliseconds)
    return out.getvalue()


def wav(x: np.ndarray, rate: int) -> bytes:
    """Floats [n] or [n, channels] as 16-bit samples."""
    out = io.BytesIO()
    with wave.open(out, "wb") as w:
        w.setnchannels(x.shape[1] if x.ndim == 2 else 1)
        w.setsampwidth(2)
        w.setframerate(rate)
        w.writeframes(np.rint(x * 32767).astype("<i2").tobytes())
    return out.getvalue()


def sound(x: np.ndarray, rate: int, format: str, codec: str) -> bytes:
    """Floats [n], by an encoder of FFmpeg."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(x[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        context = stream.codec_context
        fit = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate, frame_size=context.frame_size or None)
        for piece in (*fit.resample(frame), *fit.resample(None), None):
            container.mux(stream.encode(piece))
    return out.getvalue()


def video(frames: np.ndarray, fps: int, format: str = "mp4", codec: str = "mpeg4") -> bytes:
    """u8[n, h, w, 3], by an encoder of FFmpeg."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for x in (*frames, None):
            container.mux(stream.encode(None if x is None else av.VideoFrame.from_ndarray(x, format="rgb24")))
    return out.getvalue()


def saved(image: Any, format: str, **options: Any) -> bytes:
    """A picture of Pillow."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def webp(frames: np.ndarray, milliseconds: int, **options: Any) -> bytes:
    """u8[n, h, w, 3], animated."""
    first, *rest = (Pillow.fromarray(x) for x in frames)
    return saved(first, "WEBP", save_all=True, append_images=rest, duration=milliseconds, lossless=True, **options)


def film(pictures: int, seconds: float, format: str) -> bytes:
    """Pictures at 4 a second, and so many seconds of sound."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        seen: Any = container.add_stream("flv" if format == "flv" else "mpeg4", rate=4)
        heard: Any = container.add_stream("aac", rate=16000)
        seen.height, seen.width, seen.pix_fmt, heard.layout = 16, 24, "yuv420p", "mono"
        for i in range(pictures):
            container.mux(seen.encode(av.VideoFrame.from_ndarray(CLIP[i % 6], format="rgb24")))
        container.mux(seen.encode(None))
        for at in range(0, int(seconds * 16000), 1024):
            frame = av.AudioFrame.from_ndarray(np.full((1, 1024), 0.1, np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, at, Fraction(1, 16000)
            container.mux(heard.encode(frame))
        container.mux(heard.encode(None))
    return out.getvalue()
