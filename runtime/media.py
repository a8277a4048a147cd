"""Pictures, sounds and videos in a prompt: files, their content or arrays, decoded to the arrays that encoders take.

Files are read with suspicion: their kind is told from their content, sizes are checked before anything is decoded, only
decoders of the formats named here run, none follows a link into another file or the network, and whatever is wrong with a
file becomes a MediaError that names it. Pillow reads pictures and GIF, PyAV sounds and videos (``pip install
'wasat[media]'``); arrays need neither.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import MediaError

MOST_PIXELS = 80_000_000
"""Of a picture or a frame; 8K video has 33 million."""
MOST_SECONDS = 3600
"""Of a sound."""
FRAME_MEMORY = 1 << 29
"""Bytes of frames kept of one video. Of one that has more, every second, fourth, … frame is kept, evenly."""
_GIF_DELAY = 0.1
"""Seconds that a frame without a duration shows, in every browser."""
_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_OPTIONS = {
    "format_whitelist": "wav,w64,flac,mp3,ogg,aac,aiff,caf,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf"
}
"""For FFmpeg: containers only, no playlists, which name other files."""

_ENDLESS = ("mp3", "aac", "mpeg", "mpegts")
"""Containers without a length, which FFmpeg can only guess: cut anywhere, they play as far as they go."""
_RIFF_UNKNOWN = 0x7FFFF000
"""From here on, the length in the header is what programs write that do not know it yet."""

Source = str | Path | bytes | np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class _Media:
    source: Source
    """A path, the content of a file, or the decoded array."""

    @property
    def name(self) -> str:
        """What errors call it."""
        kind = type(self).__name__.lower()
        if isinstance(self.source, np.ndarray):
            return f"{kind} array {self.source.dtype}{list(self.source.shape)}"
        return f"{kind} of {len(self.source)} bytes" if isinstance(self.source, bytes) else str(self.source)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @contextmanager
    def _reading(self, package: str) -> Iterator[None]:
        """What the libraries raise (they raise anything) becomes a MediaError."""
        try:
            yield
        except MediaError:
            raise
        except ModuleNotFoundError:
            raise self._wrong(f"needs the package {package}: pip install 'wasat[media]'") from None
        except FileNotFoundError:
            raise self._wrong("does not exist") from None
        except Exception as e:
            raise self._wrong(f"cannot be read ({str(e) or type(e).__name__}): is it damaged, or not what it seems?") from e

    @contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        assert not isinstance(self.source, np.ndarray)
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb") as file:
            head, size = file.read(8), file.seek(0, io.SEEK_END)
            if not size:
                raise self._wrong("is empty")
            promised = int.from_bytes(head[4:], "little") if head.startswith(b"RIFF") else 0
            if size < promised < _RIFF_UNKNOWN:
                raise self._wrong(f"is cut off: it has {size} bytes of {promised + 8}")
            file.seek(0)
            yield file

    def _wrong(self, what: str) -> MediaError:
        return MediaError(f"{self.name} {what}")

    def _check_whole(self, container: Any, end: float) -> None:
        """``end``: seconds that were decoded."""
        stated = (container.duration or 0) / 1e6
        if end < 0.9 * stated - 0.25 and container.format.name not in _ENDLESS:
            raise self._wrong(f"is cut off: it lasts {end:.2f} s of the {stated:.2f} s that it states")

    def _picture(self, file: BinaryIO, formats: tuple[str, ...]) -> Any:
        """A file opened by Pillow: its size is known, and nothing is decoded."""
        from PIL import Image as Pillow

        try:
            image = Pillow.open(file, formats=formats)
        except Pillow.DecompressionBombError as e:
            raise self._wrong(f"is too large to be decoded: {e}") from None
        self._check_size(*image.size)
        return image

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise self._wrong(f"has {width} x {height} pixels: nothing to see")
        if width * height > MOST_PIXELS:
            raise self._wrong(f"has {width} x {height} pixels; at most {MOST_PIXELS:,} are decoded: make it smaller first")


class Image(_Media):
    """A picture: PNG, JPEG, WebP, GIF (its first frame), BMP, TIFF, PPM, or an array u8 [h, w], [h, w, 3] or [h, w, 4]."""

    def pixels(self) -> np.ndarray:
        """u8[h, w, 3], upright as its EXIF orientation says, colours as sRGB values, transparency over white.

        Raises MediaError for a file or array that is no such picture, is damaged, or has more than MOST_PIXELS.
        """
        if isinstance(self.source, np.ndarray):
            return _rgb(self, self.source)
        with self._reading("pillow"), self._file() as file:
            from PIL import ImageOps

            with self._picture(file, _PICTURES) as image:
                return _flat(self, ImageOps.exif_transpose(image))


@dataclass(frozen=True, eq=False, repr=False)
class Audio(_Media):
    """A sound: WAV, FLAC, MP3, Ogg, M4A, the sound of a video, or an array [n] or [n, channels] of ``rate`` Hz.

    Floats are in [-1, 1], i16 in its own range.
    """

    rate: int | None = None
    """Samples per second of an array; a file says it itself."""

    def samples(self, rate: int) -> np.ndarray:
        """f32[n] at ``rate`` Hz, the mean of its channels.

        Raises MediaError for a file or array that is no such sound, is damaged, empty or longer than MOST_SECONDS, or holds
        samples that are no numbers.
        """
        with self._reading("av"):
            wave, own = self._given(self.source) if isinstance(self.source, np.ndarray) else self._decoded()
            if not np.isfinite(wave).all():
                raise self._wrong("holds samples that are infinite or no numbers")
            return wave if own == rate else _resampled(wave, own, rate)

    def _given(self, x: np.ndarray) -> tuple[np.ndarray, int]:
        if not self.rate or self.rate < 0:
            raise self._wrong(f"has a rate of {self.rate or 0} Hz: give the samples per second, Audio(array, rate=16000)")
        if x.dtype == np.int16:
            x = x.astype(np.float32) / 32768
        if x.dtype not in (np.float32, np.float64) or x.ndim not in (1, 2) or not x.size:
            raise self._wrong("is no sound: samples are [n] or [n, channels], floats in [-1, 1] or i16, at least one")
        self._check_length(len(x), self.rate)
        return (x if x.ndim == 1 else x.mean(axis=1)).astype(np.float32), self.rate

    def _decoded(self) -> tuple[np.ndarray, int]:
        import av

        with self._file() as file, av.open(file, "r", options=_OPTIONS) as container:
            if not container.streams.audio:
                raise self._wrong("holds no sound")
            stream = container.streams.audio[0]
            rate = stream.rate
            if rate < 1:
                raise self._wrong(f"states a rate of {rate} Hz")
            floats = av.AudioResampler(format="fltp", rate=rate)  # channels stay apart: FFmpeg's own downmix is no mean
            pieces: list[np.ndarray] = []
            length = 0
            for decoded in chain(container.decode(stream), [None]):
                for frame in floats.resample(decoded):
                    pieces.append(frame.to_ndarray().mean(axis=0))
                    length += frame.samples
                    self._check_length(length, rate)
            if not length:
                raise self._wrong("holds no sound")
            self._check_whole(container, length / rate)
        return np.concatenate(pieces), rate

    def _check_length(self, samples: int, rate: int) -> None:
        if samples > MOST_SECONDS * rate:
            raise self._wrong(f"is longer than {MOST_SECONDS} s, the most that is decoded: cut it first")


@dataclass(frozen=True, eq=False, repr=False)
class Video(_Media):
    """A video without its sound: MP4, MOV, WebM, MKV, AVI, GIF, or an array u8 [n, h, w, 3] of frames."""

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
            if file.read(4) == b"GIF8":
                file.seek(0)
                return self._kept(self._of_gif(file))
        with self._reading("av"), self._file() as file:
            return self._kept(self._of_container(file))

    def _given(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if x.ndim != 4 or not len(x):
            raise self._wrong("is no video: frames are u8 [n, h, w, 3], at least one")
        if (self.times is None) == (self.fps is None):
            raise self._wrong("needs either times= (seconds, one for each frame) or fps=")
        if self.fps is not None and not 0 < self.fps < np.inf:
            raise self._wrong(f"has {self.fps} frames per second")
        times = np.arange(len(x)) / self.fps if self.fps else np.asarray(self.times, np.float64)
        if times.shape != (len(x),) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise self._wrong(f"needs {len(x)} times in ascending order, one for each frame")
        return np.stack([_rgb(self, frame) for frame in x]), (times - times[0]).astype(np.float32)

    def _of_gif(self, file: BinaryIO) -> Iterator[tuple[np.ndarray, float]]:
        from PIL import ImageSequence

        with self._picture(file, ("GIF",)) as image:
            at = 0.0
            for frame in ImageSequence.Iterator(image):
                yield _flat(self, frame), at
                at += frame.info.get("duration", 0) / 1000 or _GIF_DELAY

    def _of_container(self, file: BinaryIO) -> Iterator[tuple[np.ndarray, float]]:
        import av

        with av.open(file, "r", options=_OPTIONS) as container:
            if not container.streams.video:
                raise self._wrong("holds no pictures")
            stream = container.streams.video[0]
            self._check_size(stream.width, stream.height)
            each = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
            at = -each
            for frame in container.decode(stream):
                self._check_size(frame.width, frame.height)
                at = at + each if frame.time is None else max(frame.time, at)
                image = frame.to_ndarray(format="rgb24", width=stream.width, height=stream.height)
                yield np.rot90(image, round(frame.rotation / 90)), at
            self._check_whole(container, at + each)

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


Media = Image | Audio | Video


def open_media(path: Path) -> Media:
    """The picture, sound or video of a file, told from its content; of several pictures, it is a video.

    Raises MediaError for a file that is none, or cannot be read.
    """
    image = Image(path)
    with image._reading("pillow"), image._file() as file:
        head = file.read(16)
        if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")) or head[8:12] == b"WEBP":
            return image
        if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
            return image
        if head.startswith(b"GIF8"):
            file.seek(0)
            with image._picture(file, ("GIF",)) as gif:
                return Video(path) if getattr(gif, "n_frames", 1) > 1 else image
    with image._reading("av"), image._file() as file:
        import av

        with av.open(file, "r", options=_OPTIONS) as container:
            covers = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC: the picture on a record is no video
            if any(not int(s.disposition) & covers for s in container.streams.video):
                return Video(path)
            if container.streams.audio:
                return Audio(path)
    raise MediaError(f"{path} holds neither a picture nor sound")


def _rgb(media: _Media, x: np.ndarray) -> np.ndarray:
    """An array of pixels as u8[h, w, 3]."""
    if x.dtype != np.uint8 or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[2] not in (1, 3, 4)):
        raise media._wrong("is no picture: pixels are u8, 0 to 255, [h, w], [h, w, 3] or, with opacity, [h, w, 4]")
    media._check_size(x.shape[1], x.shape[0])
    x = x[..., None] if x.ndim == 2 else x
    if x.shape[2] == 4:
        opacity = x[..., 3:].astype(np.uint16)
        x = ((x[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:2], 3)))


def _flat(media: _Media, image: Any) -> np.ndarray:
    """A Pillow image as u8[h, w, 3]: transparency over white, 16 bits cut to 8."""
    if image.mode.startswith("I;16"):
        return _rgb(media, ((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise media._wrong("has pixels of 32 bits, whose range is its own: scale them to 8 or 16 bits first")
    return _rgb(media, np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))


def _resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """f32[n] at another rate, by FFmpeg's resampler."""
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave)[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=wanted)
    return np.concatenate([f.to_ndarray()[0] for f in (*resampler.resample(frame), *resampler.resample(None))])
