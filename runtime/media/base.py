"""What all kinds of media share: files read with suspicion, errors that name them, and the registry of kinds."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np

from ..errors import MediaError
from .files import rate_of_wav, stated_size

if TYPE_CHECKING:
    from ..interface import Encoder

MOST_PIXELS = 80_000_000
"""Of a picture or a frame; 8K video has 33 million."""
MOST_SIDE = 65_535
"""Of a side of them, as JPEG has it: what resizing takes grows with a side, however short the other is."""
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ANIMATED = ("GIF", "WEBP")
VIDEOS = ("MP4", "MOV", "WebM", "MKV", "AVI", "MPEG", "FLV")
SOUNDS = ("WAV", "FLAC", "MP3", "Ogg", "M4A", "AAC", "AIFF", *VIDEOS)
_OPTIONS = {
    "format_whitelist": "wav,w64,flac,mp3,ogg,aac,aiff,caf,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf"
}
"""For FFmpeg: containers only, no playlists, which name other files."""

Source = str | Path | bytes | np.ndarray

KINDS: dict[str, type[Media]] = {}
"""The kinds of media there are, by name."""


@dataclass(frozen=True, eq=False, repr=False)
class Media:
    """A medium of one kind. A new kind is a class in a file of its own, which ``media/__init__.py`` imports."""

    source: Source
    """A path, the content of a file, or the decoded array."""

    inputs: ClassVar[tuple[str, ...]] = ()
    """What encoders of this kind take."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of an encoder without which its inputs cannot be made."""

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__.lower()] = cls

    def arrays(self, encoder: Encoder) -> tuple[np.ndarray, ...]:
        """The decoded medium, as ``encoder`` takes it. Raises MediaError for what cannot be decoded."""
        raise NotImplementedError

    @classmethod
    def of_head(cls, path: Path, head: bytes) -> Media | None:
        """The medium of a file that begins so, if that tells that it is of this kind."""
        return None

    @classmethod
    def of_streams(cls, path: Path, streams: Any) -> Media | None:
        """The medium of a file in which FFmpeg found these streams, if it is of this kind."""
        return None

    @property
    def kind(self) -> str:
        """Its name in :data:`KINDS`."""
        return type(self).__name__.lower()

    @property
    def name(self) -> str:
        """What errors call it."""
        if isinstance(self.source, np.ndarray):
            return f"{self.kind} array {self.source.dtype}{list(self.source.shape)}"
        return f"{self.kind} of {len(self.source)} bytes" if isinstance(self.source, bytes) else str(self.source)

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
            stated = stated_size(file, size)
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
                if rate_of_wav(file.read(4096)) == 0:
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
        was checked (stated_size), and what states neither plays as far as it goes.
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


def pictured(streams: Any) -> bool:
    """Whether there are moving pictures among the streams of a container."""
    covers = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC: the picture on a record is no video
    return any(not int(s.disposition) & covers for s in streams.video)
