"""Videos, without their sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .base import ANIMATED, VIDEOS, Media, pictured
from .files import animated
from .image import flat, pictures_in, rgb

if TYPE_CHECKING:
    from ..interface import Encoder

FRAME_MEMORY = 1 << 29
"""Bytes of frames kept of one video. Of one that has more, every second, fourth, … frame is kept, evenly."""
_DELAY = 0.1
"""Seconds that a frame of a GIF or WebP without a duration shows, in every browser."""


@dataclass(frozen=True, eq=False, repr=False)
class Video(Media):
    """A video without its sound: MP4, MOV, WebM, MKV, AVI, GIF, WebP, or an array u8 [n, h, w, 3] of frames."""

    inputs = ("frames", "times")

    times: Sequence[float] | None = None
    """Seconds at which the frames of an array show, ascending."""
    fps: float | None = None
    """Frames per second of an array, where they are evenly spaced."""

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """u8[n, h, w, 3], upright, and f32[n]: when each shows, in seconds from the first.

        A video of more than FRAME_MEMORY bytes is thinned out while it is decoded, evenly. Raises MediaError for a file or
        array that is no such video, is damaged, or has frames of more than MOST_PIXELS.
        """
        if isinstance(self.source, np.ndarray):
            return self._given(self.source)
        with self._reading("pillow"), self._file() as file:
            if animated(file.read(16)):
                file.seek(0)
                return self._kept(self._of_pictures(file))
        with self._reading("av"), self._container((*VIDEOS, *ANIMATED)) as container:
            return self._kept(self._of_container(container))

    def _given(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if x.ndim != 4 or not len(x):
            raise self._wrong("is no video: frames are u8 [n, h, w, 3], at least one")
        if (self.times is None) == (self.fps is None):
            raise self._wrong("needs either times= (seconds, one for each frame) or fps=")
        if self.fps is not None:
            if not isinstance(self.fps, Real) or not 0 < self.fps < np.inf:
                raise self._wrong(f"has {self.fps!r} frames per second: fps is a number above 0")
            times = np.arange(len(x)) / float(self.fps)
        else:
            try:
                times = np.asarray(self.times)
            except ValueError:  # rows of different lengths
                times = np.array(None)
            if times.dtype.kind not in "iuf":
                raise self._wrong("has times that are no numbers: give the second at which each frame shows")
            times = times.astype(np.float64)
        if times.shape != (len(x),) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise self._wrong(f"needs {len(x)} times in ascending order, one for each frame")
        return np.stack([rgb(self, frame) for frame in x]), (times - times[0]).astype(np.float32)

    def _of_pictures(self, file: BinaryIO) -> Iterator[tuple[np.ndarray, float]]:
        from PIL import ImageSequence

        with self._picture(file, ANIMATED) as image:
            at = 0.0
            for frame in ImageSequence.Iterator(image):
                yield flat(self, frame), at
                at += frame.info.get("duration", 0) / 1000 or _DELAY

    def _of_container(self, container: Any) -> Iterator[tuple[np.ndarray, float]]:
        stream = self._stream(container.streams.video, "pictures")
        self._check_size(stream.width, stream.height)
        each = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
        at = -each
        for frame in container.decode(stream):
            self._check_size(frame.width, frame.height)
            at = at + each if frame.time is None else max(frame.time, at)
            clear = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
            image = frame.to_ndarray(format="rgba" if clear else "rgb24", width=stream.width, height=stream.height)
            yield np.ascontiguousarray(self._upright(frame, rgb(self, image))), at
        self._check_whole(container, at + each)

    def _upright(self, frame: Any, image: np.ndarray) -> np.ndarray:
        """Turned and mirrored as the display matrix says: x' = a x + c y, y' = b x + d y."""
        data = next((bytes(x) for x in frame.side_data if x.type.name == "DISPLAYMATRIX"), b"")
        a, b, _, c, d = np.frombuffer(data, np.int32, 5).astype(float) / 65536 if data else (1, 0, 0, 0, 1)
        across, along = max(abs(a), abs(d)), max(abs(b), abs(c))
        if min(across, along) > 0.01 * max(across, along):
            raise self._wrong("is to be shown turned by no multiple of 90 degrees: turn it first")
        if along > across:
            image, a, d = image.swapaxes(0, 1), c, b
        return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]

    def _kept(self, frames: Iterator[tuple[np.ndarray, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Every frame, or every second, fourth, … so that they fit into FRAME_MEMORY."""
        kept: list[np.ndarray] = []
        times: list[float] = []
        stride = 1
        for i, (image, at) in enumerate(frames):
            if i % stride:
                continue
            kept.append(image)
            times.append(at)
            if len(kept) > max(2, FRAME_MEMORY // image.nbytes):
                del kept[1::2], times[1::2]
                stride *= 2
        if not kept:
            raise self._wrong("holds no frames")
        return np.stack(kept), (np.array(times) - times[0]).astype(np.float32)

    def arrays(self, encoder: Encoder) -> tuple[np.ndarray, ...]:
        return self.frames()

    @classmethod
    def of_head(cls, path: Path, head: bytes) -> Media | None:
        return cls(path) if animated(head) and pictures_in(cls(path)) > 1 else None

    @classmethod
    def of_streams(cls, path: Path, streams: Any) -> Media | None:
        return cls(path) if pictured(streams) else None
