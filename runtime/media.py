"""Pictures, sounds and videos in a prompt: files, their content or arrays, decoded to the arrays that encoders take.

Files are read with suspicion: their kind is told from their content, sizes are checked before anything is decoded, only
decoders of the formats named here run, none follows a link into another file or the network, and whatever is wrong with a
file becomes a MediaError that names it. Pillow reads pictures, GIF and animated WebP, PyAV sounds and videos (``pip install
'wasat[media]'``); arrays need neither.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import MediaError
from .values import whole

MOST_PIXELS = 80_000_000
"""Of a picture or a frame; 8K video has 33 million."""
MOST_SIDE = 65_535
"""Of a side of them, as JPEG has it: what resizing takes grows with a side, however short the other is."""
MOST_CHANNELS, MOST_RATE = 64, 10_000_000
"""Of a sound, and in samples per second: a frame of it is decoded as a whole."""
MOST_SECONDS = 3600
"""Of a sound."""
MOST_SAMPLES = MOST_SECONDS * 48_000
"""Of a sound at the rate asked for: what is kept of it. Its own rate may be any, and only a piece of that is held."""
FRAME_MEMORY = 1 << 29
"""Bytes of frames kept of one video. Of one that has more, every second, fourth, … frame is kept, evenly."""
_DELAY = 0.1
"""Seconds that a frame of a GIF or WebP without a duration shows, in every browser."""
_PIECE = 1 << 16
"""Samples of an array that are converted at a time."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Kinds of pixels that Pillow makes RGB of."""
_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ANIMATED = ("GIF", "WEBP")
_VIDEOS = ("MP4", "MOV", "WebM", "MKV", "AVI", "MPEG", "FLV")
_SOUNDS = ("WAV", "FLAC", "MP3", "Ogg", "M4A", "AAC", "AIFF", *_VIDEOS)
_OPTIONS = {
    "format_whitelist": "wav,w64,flac,mp3,ogg,aac,aiff,caf,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf"
}
"""For FFmpeg: containers only, no playlists, which name other files."""
_RIFF_UNKNOWN = 0x7FFFF000
"""From here on, the length in the header is what programs write that do not know it yet."""
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""What MP4 and MOV begin with."""

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
            reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
            raise self._wrong(f"cannot be read ({reason}): is it damaged, or not what it seems?") from e

    @contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        assert not isinstance(self.source, np.ndarray)
        if not isinstance(self.source, (str, Path, bytes)):  # a number would be a file that the process has open
            raise self._wrong("is neither a path nor the content of a file nor an array")
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            if not size:
                raise self._wrong("is empty")
            stated = _stated_size(file, size)
            if size < stated:
                raise self._wrong(f"is cut off: it has {size} bytes of {stated}")
            file.seek(0)
            yield file

    @contextmanager
    def _container(self, kinds: Sequence[str]) -> Iterator[Any]:
        """A file opened by FFmpeg: its header is known, and nothing is decoded. ``kinds``: what errors say it may be."""
        import av

        with self._file() as file:
            try:
                container = av.open(file, "r", options=_OPTIONS)
            except av.error.EOFError:
                raise self._wrong("is cut off: it ends where its content should begin") from None
            except av.FFmpegError as e:
                file.seek(0)
                if _rate_of_wav(file.read(4096)) == 0:
                    raise self._no_rate() from None
                raise self._unknown(kinds) from e
            with container:
                yield container

    def _stream(self, streams: Sequence[Any], what: str) -> Any:
        """The first of them, which can be decoded."""
        if not streams:
            raise self._wrong(f"holds no {what}")
        if streams[0].codec_context is None:
            raise self._wrong(f"holds {what} in a format that FFmpeg cannot decode: convert it first")
        return streams[0]

    def _check_whole(self, container: Any, end: float) -> None:
        """``end``: seconds that were decoded of a stream.

        FLAC and FLV state how long they last, a file of several streams only its longest; of most others the size in bytes
        was checked (_stated_size), and what states neither plays as far as it goes.
        """
        kind, stated = container.format.name, (container.duration or 0) / 1e6
        doubt = 0.001 if kind == "flac" else 0.25 + 0.1 * stated
        if end < stated - doubt and (kind == "flac" or (kind == "flv" and len(container.streams) == 1)):
            raise self._wrong(f"is cut off: it lasts {end:.2f} s of the {stated:.2f} s that it states")

    def _wrong(self, what: str) -> MediaError:
        return MediaError(f"{self.name} {what}")

    def _no_rate(self) -> MediaError:
        return self._wrong("states a rate of 0 Hz: write it again with its samples per second")

    def _unknown(self, kinds: Sequence[str]) -> MediaError:
        return self._wrong(f"is none of {', '.join(kinds)}, or its beginning is damaged: convert it to one of them")

    def _picture(self, file: BinaryIO, formats: tuple[str, ...]) -> Any:
        """A file opened by Pillow: its size is known, and nothing is decoded."""
        from PIL import Image as Pillow

        try:
            image = Pillow.open(file, formats=formats)
        except Pillow.DecompressionBombError as e:
            raise self._wrong(f"is too large to be decoded: {e}") from None
        except Pillow.UnidentifiedImageError:
            raise self._unknown(formats) from None
        self._check_size(*image.size)
        return image

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise self._wrong(f"has {width} x {height} pixels: nothing to see")
        if max(width, height) > MOST_SIDE:
            raise self._wrong(f"has {width} x {height} pixels; at most {MOST_SIDE:,} are read of a side: cut it first")
        if width * height > MOST_PIXELS:
            raise self._wrong(f"has {width} x {height} pixels; at most {MOST_PIXELS:,} are decoded: make it smaller first")


class Image(_Media):
    """A picture: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, or an array u8 [h, w], [h, w, 3] or [h, w, 4].

    Of a file with several pictures, it is the first.
    """

    def pixels(self) -> np.ndarray:
        """u8[h, w, 3], upright as its EXIF orientation says, colours as sRGB values, transparency over white.

        Raises MediaError for a file or array that is no such picture, is damaged, or has more than MOST_PIXELS.
        """
        if isinstance(self.source, np.ndarray):
            return _rgb(self, self.source)
        with self._reading("pillow"), self._file() as file, self._picture(file, _PICTURES) as image:
            return _flat(self, image)


@dataclass(frozen=True, eq=False, repr=False)
class Audio(_Media):
    """A sound: WAV, FLAC, MP3, Ogg, M4A, the sound of a video, or an array [n] or [n, channels] of ``rate`` Hz.

    Floats are in [-1, 1], i16 in its own range.
    """

    rate: int | None = None
    """Samples per second of an array; a file says it itself."""

    def samples(self, rate: int) -> np.ndarray:
        """f32[n] at ``rate`` Hz, the mean of its channels.

        Decoded and resampled piece by piece: beside the result, little is held. Raises MediaError for a file or array that is
        no such sound, is damaged, empty, longer than MOST_SECONDS or, at ``rate`` Hz, than MOST_SAMPLES, is too short to be
        resampled, or holds samples that are no numbers.
        """
        rate = whole("rate", rate, 1, MOST_RATE)
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
        with self._container(_SOUNDS) as container:
            stream = self._stream(container.streams.audio, "sound")
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

    def _own_rate(self) -> int:
        """That of an array."""
        if not isinstance(self.rate, Real) or not 1 <= self.rate < np.inf or self.rate % 1:
            raise self._wrong(
                f"has a rate of {self.rate or 0!r} Hz: give the samples per second as a whole number, Audio(array, rate=16000)"
            )
        return int(self.rate)

    def _given(self, x: np.ndarray) -> Iterator[np.ndarray]:
        if x.dtype not in (np.int16, np.float32, np.float64) or x.ndim not in (1, 2) or not x.size:
            raise self._wrong("is no sound: samples are [n] or [n, channels], floats in [-1, 1] or i16, at least one")
        for at in range(0, len(x), _PIECE):
            piece = x[at : at + _PIECE]
            if piece.dtype == np.int16:
                piece = piece.astype(np.float32) / 32768
            yield (piece if piece.ndim == 1 else piece.mean(axis=1)).astype(np.float32)

    def _decoded(self, container: Any, stream: Any) -> Iterator[np.ndarray]:
        import av

        floats = av.AudioResampler(format="fltp", rate=stream.rate)  # channels stay apart: FFmpeg's own downmix is no mean
        length = 0
        for decoded in chain(container.decode(stream), [None]):
            for frame in floats.resample(decoded):
                length += frame.samples
                yield frame.to_ndarray().mean(axis=0)
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


@dataclass(frozen=True, eq=False, repr=False)
class Video(_Media):
    """A video without its sound: MP4, MOV, WebM, MKV, AVI, GIF, WebP, or an array u8 [n, h, w, 3] of frames."""

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
            if _animated(file.read(16)):
                file.seek(0)
                return self._kept(self._of_pictures(file))
        with self._reading("av"), self._container((*_VIDEOS, *_ANIMATED)) as container:
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
        return np.stack([_rgb(self, frame) for frame in x]), (times - times[0]).astype(np.float32)

    def _of_pictures(self, file: BinaryIO) -> Iterator[tuple[np.ndarray, float]]:
        from PIL import ImageSequence

        with self._picture(file, _ANIMATED) as image:
            at = 0.0
            for frame in ImageSequence.Iterator(image):
                yield _flat(self, frame), at
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
            yield np.ascontiguousarray(self._upright(frame, _rgb(self, image))), at
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


Media = Image | Audio | Video


def open_media(path: Path) -> Media:
    """The picture, sound or video of a file, told from its content; a GIF or WebP of several pictures is a video.

    Raises MediaError for a file that is none, or cannot be read.
    """
    image = Image(path)
    with image._reading("pillow"), image._file() as file:
        head = file.read(16)
        if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")):
            return image
        if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
            return image
        if _animated(head):
            file.seek(0)
            with image._picture(file, _ANIMATED) as pictures:
                return Video(path) if getattr(pictures, "n_frames", 1) > 1 else image
    with image._reading("av"), image._container((*_PICTURES, *_SOUNDS)) as container:
        covers = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC: the picture on a record is no video
        if any(not int(s.disposition) & covers for s in container.streams.video):
            return Video(path)
        if container.streams.audio:
            return Audio(path)
    raise MediaError(f"{path} holds neither a picture nor sound")


def _animated(head: bytes) -> bool:
    """Whether a file that begins so is of a kind that holds one picture or several."""
    return head.startswith(b"GIF8") or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")


def _stated_size(file: BinaryIO, size: int) -> int:
    """How many bytes a file of ``size`` says it has, by the sizes of its outermost parts; 0 where it does not say."""
    file.seek(0)
    head = file.read(16)
    if head.startswith((b"RIFF", b"FORM")):  # WAV, AVI, WebP; AIFF
        n = int.from_bytes(head[4:8], "little" if head.startswith(b"RIFF") else "big")
        return 0 if n <= size or n >= _RIFF_UNKNOWN else n + 8  # there are programs that count the 8 in
    part = _box if head[4:8] in _BOXES else _element
    at = 0
    for _ in range(100_000):
        if at + 8 > size:
            return at
        file.seek(at)
        n = part(file.read(16))
        if n <= 0:
            return 0 if n == 0 else at
        at += n
    return 0


def _box(head: bytes) -> int:
    """The size of a part of an MP4 or MOV that begins so; 0: it goes on to the end; -1: this is no part."""
    n = int.from_bytes(head[:4], "big")
    n = int.from_bytes(head[8:16], "big") if n == 1 else n
    return n if head[4:8].isalnum() and (n == 0 or n >= 8) else -1


def _element(head: bytes) -> int:
    """As :func:`_box`, of a Matroska file (WebM)."""
    if not head.startswith((b"\x1aE\xdf\xa3", b"\x18S\x80g")) or not head[4]:  # the header and the segment
        return -1
    width = 9 - head[4].bit_length()
    unknown = (1 << 7 * width) - 1
    n = int.from_bytes(head[4 : 4 + width], "big") & unknown
    return 0 if n == unknown else 4 + width + n


def _rate_of_wav(head: bytes) -> int | None:
    """Samples per second, by the header."""
    at = head.find(b"fmt ", 12)
    return int.from_bytes(head[at + 12 : at + 16], "little") if head[8:12] == b"WAVE" and at > 0 else None


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
    """A Pillow image as u8[h, w, 3]: upright, transparency over white, 16 bits cut to 8."""
    from PIL import ImageOps

    pgm = image.mode == "I" and image.format == "PPM"  # whose range Pillow makes 16 bits
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # white is 0, which Pillow knows of up to 8 bits
    image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if (image.mode.startswith("I;16") and clear is not None) or (isinstance(clear, tuple) and max(clear) > 255):
        raise media._wrong("has 16 bits and a colour that is transparent: give it 8 bits, or an alpha channel")
    if image.mode.startswith("I;16") or pgm:
        x = np.asarray(image).astype(np.uint32)
        x = 65535 - x if inverted else x
        return _rgb(media, ((x * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise media._wrong("has pixels of 32 bits, whose range is its own: scale them to 8 or 16 bits first")
    if image.mode not in _MODES:
        raise media._wrong(f"has colours of the kind {image.mode}: convert it to RGB first")
    return _rgb(media, np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))


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
