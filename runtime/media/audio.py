"""Sounds."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..values import integer
from .base import SOUNDS, Media, pictured
from .files import trouble_of_wav

if TYPE_CHECKING:
    from ..interface import Encoder

MOST_CHANNELS, MOST_RATE = 64, 10_000_000
"""Of a sound, and in samples per second: a frame of it is decoded as a whole."""
MOST_SECONDS = 3600
"""Of a sound."""
MOST_SAMPLES = MOST_SECONDS * 48_000
"""Of a sound at the rate asked for: what is kept of it. Its own rate may be any, and only a piece of that is held."""
_PIECE = 1 << 16
"""Samples of an array that are converted at a time."""


@dataclass(frozen=True, eq=False, repr=False)
class Audio(Media):
    """A sound: WAV, FLAC, MP3, Ogg, M4A, the sound of a video, or an array [n] or [n, channels] of ``rate`` Hz.

    Floats are in [-1, 1], i16 in its own range.
    """

    inputs = ("audio",)
    needs = ("rate",)

    rate: int | None = None
    """Samples per second of an array; a file says it itself."""

    def samples(self, rate: int) -> np.ndarray:
        """f32[n] at ``rate`` Hz, the mean of its channels.

        Decoded and resampled piece by piece: beside the result, little is held. Raises MediaError for a file or array that is
        no such sound, is damaged, empty, longer than MOST_SECONDS or, at ``rate`` Hz, than MOST_SAMPLES, is too short to be
        resampled, or holds samples that are no numbers.
        """
        rate = integer("rate", rate, 1, MOST_RATE)
        with self._reading("av"):
            wave = bytearray()
            for piece in self._pieces(rate):
                wave += piece.tobytes()
                if len(wave) > 4 * MOST_SAMPLES:
                    raise self._wrong(f"has more than {MOST_SAMPLES:,} samples at {rate} Hz: cut it first, or lower the rate")
            if not wave:
                raise self._wrong(f"is too short to be heard at {rate} Hz: give a longer sound")
            return np.frombuffer(wave, np.float32)

    def _pieces(self, rate: int) -> Iterator[np.ndarray]:
        """The sound at ``rate`` Hz, f32[k] by f32[k]."""
        if isinstance(self.source, np.ndarray):
            own = self._own_rate()
            self._check_sound(own, self.source.shape[1] if self.source.ndim == 2 else 1)
            yield from _resampled(self._checked(self._given(self.source), own), own, rate)
            return
        with self._file() as file:
            if trouble := trouble_of_wav(file.read(4096)):
                raise self._wrong(f"{trouble}: write it again as WAV of 16 or 32 bits, or as FLAC")
        with self._container(SOUNDS) as container:
            stream = self._stream(container.streams.audio, "sound")
            self._check_order(stream.codec_context.layout)
            own = stream.rate or 0
            if own < 1:
                raise self._no_rate()
            self._check_sound(own, stream.channels)
            yield from _resampled(self._checked(self._decoded(container, stream), own), own, rate)

    def _check_sound(self, rate: int, channels: int) -> None:
        if rate > MOST_RATE:
            raise self._wrong(f"has {rate} samples per second; at most {MOST_RATE:,} are read")
        if channels > MOST_CHANNELS:
            raise self._wrong(f"has {channels} channels; at most {MOST_CHANNELS} are read, and samples are [n, channels]")

    def _check_order(self, layout: Any) -> None:
        """Raises MediaError for channels in an order of the file's own.

        PyAV frees the list of those once for each object that speaks of it, which kills the process: such an object is never
        given back.
        """
        try:
            name = layout.name
        except (RuntimeError, UnicodeError):  # longer than PyAV has room for
            name = "many channels (…)"
        if " channels (" in name:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))
            raise self._wrong("has channels in an unusual order: write it again as mono, stereo, 5.1 or 7.1")

    def _own_rate(self) -> int:
        """That of an array."""
        rate = None if isinstance(self.rate, (bool, np.bool_)) else self.rate
        if not isinstance(rate, Real) or not 1 <= rate < np.inf or rate % 1:
            raise self._wrong(
                f"has a rate of {self.rate or 0!r} Hz: give the samples per second as a whole number, Audio(array, rate=16000)"
            )
        return int(rate)

    def _given(self, x: np.ndarray) -> Iterator[np.ndarray]:
        if x.dtype not in (np.int16, np.float32, np.float64) or x.ndim not in (1, 2) or not x.size:
            raise self._wrong("is no sound: samples are [n] or [n, channels], floats in [-1, 1] or i16, at least one")
        for at in range(0, len(x), _PIECE):
            piece = np.asarray(x[at : at + _PIECE])
            if piece.dtype == np.int16:
                piece = piece.astype(np.float32) / 32768
            with np.errstate(over="ignore"):  # what is beyond f32 becomes infinite, which is refused
                yield (piece if piece.ndim == 1 else piece.mean(axis=1)).astype(np.float32)

    def _decoded(self, container: Any, stream: Any) -> Iterator[np.ndarray]:
        import av

        # Channels stay apart (FFmpeg's own downmix is no mean), and interleaved: of 8 planes and more, PyAV counts what stands
        # behind them in memory.
        floats = av.AudioResampler(format="flt", rate=stream.rate)
        length = 0
        for decoded in chain(container.decode(stream), [None]):
            if decoded is not None:
                self._check_order(decoded.layout)
            for frame in floats.resample(decoded):
                length += frame.samples
                yield frame.to_ndarray().reshape(frame.samples, -1).mean(axis=1)
        self._check_whole(container, length / stream.rate)

    def _checked(self, pieces: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        """The same pieces, of ``rate`` Hz, as long as nothing is wrong with them."""
        length = 0
        for piece in pieces:
            length += len(piece)
            if length > MOST_SECONDS * rate:
                raise self._wrong(f"is longer than {MOST_SECONDS} s, the most that is decoded: cut it first")
            if not np.isfinite(piece).all():
                raise self._wrong("holds samples that are infinite or no numbers")
            yield piece
        if not length:
            raise self._wrong("holds no sound")

    def arrays(self, encoder: Encoder) -> tuple[np.ndarray, ...]:
        assert encoder.rate is not None  # manifests are read so
        return (self.samples(encoder.rate),)

    @classmethod
    def of_streams(cls, path: Path, streams: Any) -> Media | None:
        return cls(path) if streams.audio and not pictured(streams) else None


def _resampled(pieces: Iterable[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    """f32[k] by f32[k] at another rate, by FFmpeg's resampler."""
    if rate == wanted:
        yield from pieces
        return
    import av

    resampler = av.AudioResampler(format="fltp", layout="mono", rate=wanted)
    seconds = (piece[at : at + rate] for piece in pieces for at in range(0, len(piece), rate))  # of 1 Hz, a piece is hours
    for second in chain(seconds, [None]):
        frame = None
        if second is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(second)[None], format="fltp", layout="mono")
            frame.sample_rate = rate
        for made in resampler.resample(frame):
            yield made.to_ndarray()[0]
