"""Pictures, sounds and videos in a prompt: files, their content or arrays, decoded to the arrays that encoders take.

Files are read with suspicion: their kind is told from their content, sizes are checked before anything is decoded, only
decoders of the formats named here run, none follows a link into another file or the network, and whatever is wrong with a
file becomes a MediaError that names it. Pillow reads pictures, GIF and animated WebP, PyAV sounds and videos (``pip install
'wasat[media]'``); arrays need neither.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import MediaError
from .audio import Audio
from .base import KINDS, PICTURES, SOUNDS, Media
from .image import Image
from .video import Video


def open_media(path: Path) -> Media:
    """The picture, sound or video of a file, told from its content; a GIF or WebP of several pictures is a video.

    Raises MediaError for a file that is none, or cannot be read.
    """
    some = Image(path)
    with some._reading("pillow"), some._file() as file:
        head = file.read(16)
    for kind in KINDS.values():
        if found := kind.of_head(path, head):
            return found
    with some._reading("av"), some._container((*PICTURES, *SOUNDS)) as container:
        for kind in KINDS.values():
            if found := kind.of_streams(path, container.streams):
                return found
    raise MediaError(f"{path} holds neither a picture nor sound")


__all__ = ["KINDS", "Audio", "Image", "Media", "Video", "open_media"]
