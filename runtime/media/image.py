"""Pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import ANIMATED, PICTURES, Media
from .files import animated

if TYPE_CHECKING:
    from ..interface import Encoder

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Kinds of pixels that Pillow makes RGB of."""


class Image(Media):
    """A picture: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, or an array u8 [h, w], [h, w, 3] or [h, w, 4].

    Of a file with several pictures, it is the first.
    """

    inputs = ("image",)

    def pixels(self) -> np.ndarray:
        """u8[h, w, 3], upright as its EXIF orientation says, colours as sRGB values, transparency over white.

        Raises MediaError for a file or array that is no such picture, is damaged, or has more than MOST_PIXELS.
        """
        if isinstance(self.source, np.ndarray):
            return rgb(self, self.source)
        with self._reading("pillow"), self._file() as file, self._picture(file, PICTURES) as image:
            return flat(self, image)

    def arrays(self, encoder: Encoder) -> tuple[np.ndarray, ...]:
        return (self.pixels(),)

    @classmethod
    def of_head(cls, path: Path, head: bytes) -> Media | None:
        plain = head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*"))
        if plain or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace()):
            return cls(path)
        return cls(path) if animated(head) and pictures_in(cls(path)) == 1 else None


def pictures_in(media: Media) -> int:
    """How many pictures a file that may hold several has."""
    with media._reading("pillow"), media._file() as file, media._picture(file, ANIMATED) as pictures:
        return int(getattr(pictures, "n_frames", 1))


def rgb(media: Media, x: np.ndarray) -> np.ndarray:
    """An array of pixels as u8[h, w, 3]."""
    if x.dtype != np.uint8 or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[2] not in (1, 3, 4)):
        raise media._wrong("is no picture: pixels are u8, 0 to 255, [h, w], [h, w, 3] or, with opacity, [h, w, 4]")
    media._check_size(x.shape[1], x.shape[0])
    x = x[..., None] if x.ndim == 2 else x
    if x.shape[2] == 4:
        opacity = x[..., 3:].astype(np.uint16)
        x = ((x[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:2], 3)))


def flat(media: Media, image: Any) -> np.ndarray:
    """A Pillow image as u8[h, w, 3]: upright, transparency over white, 16 bits cut to 8."""
    from PIL import ImageOps

    pgm = image.mode == "I" and image.format == "PPM"  # whose range Pillow makes 16 bits
    inverted, most = False, 65535
    if image.format == "TIFF":
        inverted = image.tag_v2.get(262) == 0  # white is 0, which Pillow knows of up to 8 bits
        most = _most_of_tiff(media, image)
    few = re.fullmatch(r"L;([24])", str(image.tile[0].args)) if image.format == "PNG" and image.tile else None
    image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if few and isinstance(clear, int):  # of 2 or 4 bits, as it is stored; Pillow's pixels are of 8
        clear = image.info["transparency"] = clear * 255 // (2 ** int(few[1]) - 1)
    if (image.mode.startswith("I;16") and clear is not None) or (isinstance(clear, tuple) and max(clear) > 255):
        raise media._wrong("has 16 bits and a colour that is transparent: give it 8 bits, or an alpha channel")
    if image.mode.startswith("I;16") or pgm:
        x = np.asarray(image).astype(np.uint32)
        x = most - x if inverted else x
        return rgb(media, ((x * 255 + most // 2) // most).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise media._wrong("has pixels of 32 bits, whose range is its own: scale them to 8 or 16 bits first")
    if image.mode not in _MODES:
        raise media._wrong(f"has colours of the kind {image.mode}: convert it to RGB first")
    return rgb(media, np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))


def _most_of_tiff(media: Media, image: Any) -> int:
    """The largest value of a grey pixel of more than 8 bits. Raises MediaError for samples that Pillow takes for others."""
    bits = max(image.tag_v2.get(258, (1,)))
    if 2 in image.tag_v2.get(339, (1,)) and bits <= 8:
        raise media._wrong("has pixels with a sign, whose range is its own: make them 0 to 255 first")
    if bits > 8 and image.tag_v2.get(284) == 2 and image.tag_v2.get(259) == 1 and len(image.getbands()) > 1:
        raise media._wrong(f"has {bits} bits and colours one after the other, uncompressed: give it 8 bits, or compress it")
    return int(2**bits - 1) if 8 < bits < 16 else 65535
