"""Pictures, sounds and videos that are damaged or absurd: refused by name; what only looks so is read."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
av = pytest.importorskip("av")
from media_files import CLIP, PICTURE, TONE, film, gif, png, saved, sound, video, wav, webp
from PIL import Image as Pillow
from tiny_media import RATE
from wasat.runtime import Audio, Image, MediaError, Video
from wasat.runtime.interface import Encoder


def _header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT" + bytes(4)
    )


def _no_rate() -> bytes:
    data = bytearray(wav(TONE, RATE))
    data[24:28] = bytes(4)
    return bytes(data)


def _without_rate(format: str) -> bytes:
    return sound(TONE, RATE, format, "pcm_s16le").replace(struct.pack(">d", RATE), bytes(8))


def _not_numbers() -> bytes:
    header = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, RATE, RATE * 4, 4, 32)
    data = np.array([0.1, np.nan] * 50, np.float32).tobytes()
    body = header + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _no_film() -> bytes:
    """An AVI whose video has no frame."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="avi") as file:
        stream = file.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        file.start_encoding()
    return out.getvalue()


def _flac_cut(inside: bool) -> bytes:
    """All but the last of its blocks, or all but its last half."""
    data = sound(TONE, RATE, "flac", "flac")
    with av.open(io.BytesIO(data)) as container:
        last = [packet.size for packet in container.demux() if packet.size][-1]
    return data[: -last // 2 if inside else -last]


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: Image(b""), "image of 0 bytes is empty"),
    "missing": (lambda: Image("/no/such.png"), "/no/such.png does not exist"),
    "a folder": (lambda: Image("/"), r"^/ cannot be read \(Is a directory\)"),
    "a text": (lambda: Image(b"not a picture at all"), "is none of PNG, JPEG, WEBP, .*its beginning is damaged: convert"),
    "truncated picture": (lambda: Image(png(PICTURE)[:900]), "cannot be read .*truncated"),
    "a billion pixels": (lambda: Image(_header(50_000, 20_000)), "too large to be decoded"),
    "90 million pixels": (lambda: Image(_header(30_000, 3_000)), "30000 x 3000 pixels; at most 80,000,000"),
    "more than Pillow reads": (lambda: Image(_header(2**31 - 1, 2**31 - 1)), "too large to be decoded"),
    "no pixels": (lambda: Image(np.zeros((0, 4, 3), np.uint8)), "nothing to see"),
    "floats as pixels": (lambda: Image(np.zeros((4, 4, 3))), "pixels are u8"),
    "32-bit pixels": (lambda: Image(saved(Pillow.fromarray(np.zeros((2, 2), np.float32)), "TIFF")), "pixels of 32 bits"),
    "a sound as picture": (lambda: Image(wav(TONE, RATE)), "is none of PNG"),
    "no rate": (lambda: Audio(TONE), "a rate of 0 Hz"),
    "a rate that is no number": (lambda: Audio(TONE, "8000"), "a rate of '8000' Hz: give .* whole number"),
    "half a sample per second": (lambda: Audio(TONE, 0.5), "a rate of 0.5 Hz"),
    "0 Hz": (lambda: Audio(_no_rate()), "states a rate of 0 Hz: write it again"),
    "0 Hz in a container": (lambda: Audio(_without_rate("matroska")), "states a rate of 0 Hz: write it again"),
    "a text that speaks of formats": (lambda: Audio(b"a text about fmt " + bytes(30)), "is none of WAV"),
    "one sample": (lambda: Audio(TONE[:1], 48000), "too short to be heard at 8000 Hz"),
    "a millionth of a second": (lambda: Audio(TONE[:10], 10**6), "too short to be heard at 8000 Hz"),
    "not a number": (lambda: Audio(np.array([0, np.nan]), RATE), "infinite or no numbers"),
    "not a number in a file": (lambda: Audio(_not_numbers()), "infinite or no numbers"),
    "nothing to hear": (lambda: Audio(np.zeros(0, np.float32), RATE), "no sound"),
    "only a header": (lambda: Audio(wav(TONE[:0], RATE)), "holds no sound"),
    "too long": (lambda: Audio(np.zeros(2 * 3601, np.int16), 2), "longer than 3600 s"),
    "bytes as samples": (lambda: Audio(TONE.astype(np.int8), RATE), "floats in"),
    "truncated WAV": (lambda: Audio(wav(TONE, RATE)[:3000]), "cut off: it has 3000 bytes of 8044"),
    "FLAC without a block": (lambda: Audio(sound(TONE, RATE, "flac", "flac")[:1500]), "cut off: it ends where its content"),
    "FLAC without its last block": (lambda: Audio(_flac_cut(False)), r"cut off: it lasts 0\.43 s of the 0\.50 s"),
    "FLAC with half a block": (lambda: Audio(_flac_cut(True)), r"cannot be read \(Invalid data found when processing input\)"),
    "a picture as sound": (lambda: Audio(png(PICTURE)), "is none of WAV, FLAC"),
    "a playlist": (lambda: Audio(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n"), "is none of WAV"),
    "a silent video as sound": (lambda: Audio(video(CLIP, fps=4)), "holds no sound"),
    "no frames": (lambda: Video(CLIP[:0], fps=1), "at least one"),
    "a film of nothing": (lambda: Video(_no_film()), "holds no frames"),
    "frames without times": (lambda: Video(CLIP), "either times="),
    "times that go back": (lambda: Video(CLIP, times=[0, 1, 2, 1, 3, 4]), "ascending"),
    "no frames per second": (lambda: Video(CLIP, fps=-1), "frames per second"),
    "frames per second in words": (lambda: Video(CLIP, fps="4"), "has '4' frames per second: fps is a number"),
    "times in words": (lambda: Video(CLIP, times=[*"abcdef"]), "times that are no numbers: give the second"),
    "ragged times": (lambda: Video(CLIP, times=[1, [2, 3]]), "times that are no numbers"),
    "truncated video": (lambda: Video(video(CLIP, fps=4)[:300]), "cut off: it has 300 bytes of"),
    "cut video": (lambda: Video((data := video(CLIP, 4, "matroska", "ffv1"))[: len(data) // 2]), "cut off: it has"),
    "cut film": (lambda: Video((data := film(12, 3, "matroska"))[: len(data) // 2]), "cut off: it has"),
    "cut FLV": (lambda: Video(video(CLIP, 4, "flv", "flv")[:-90]), r"cut off: it lasts 1\.00 s of the 1\.50 s"),
    "nobody's codec": (lambda: Video(video(CLIP, 4).replace(b"mp4v", b"none").replace(b"esds", b"none")), "convert it first"),
    "a text as video": (lambda: Video(b"not a video at all"), "is none of MP4, MOV, .*GIF"),
    "truncated GIF": (lambda: Video(gif(CLIP, 100)[:60]), "cannot be read"),
    "truncated WebP": (lambda: Video(webp(CLIP, 100)[:-9]), "cut off: it has"),
    "a sound as video": (lambda: Video(wav(TONE, RATE)), "holds no pictures"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own
@pytest.mark.parametrize("make, message", HOSTILE.values(), ids=HOSTILE)
def test_damaged_or_absurd(make: Callable[[], Any], message: str) -> None:
    part = make()
    with pytest.raises(MediaError, match=message) as raised:
        part.arrays(Encoder(part.kind, "see", size=None, rate=RATE, samples=None, frames=None))
    assert str(raised.value).startswith(part.name + " ")
    assert not any(x in str(raised.value) for x in ("object at", "Errno", "<none>"))  # what only a programmer reads


def _moov_first(path: Path) -> bytes:
    """An MP4 as a server sends it: what it holds is stated at its beginning."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 24, "yuv420p"
        for x in (*CLIP, *CLIP, *CLIP, *CLIP, None):
            container.mux(stream.encode(None if x is None else av.VideoFrame.from_ndarray(x, format="rgb24")))
    return path.read_bytes()


def _rf64() -> bytes:
    """A WAV as it is written beyond 4 GiB."""
    data = wav(TONE, RATE)
    sizes = struct.pack("<IQQQI", 28, len(data) + 28, len(data) - 44, len(TONE), 0)
    return b"RF64\xff\xff\xff\xffWAVEds64" + sizes + data[12:40] + b"\xff\xff\xff\xff" + data[44:]


CUT: dict[str, Callable[[Path], Any]] = {
    "MP4": lambda _: Video(video(np.tile(CLIP, (4, 1, 1, 1)), 24)),
    "MP4, index first": lambda path: Video(_moov_first(path)),
    "MKV": lambda _: Video(video(np.tile(CLIP, (4, 1, 1, 1)), 24, "matroska", "ffv1")),
    "AVI": lambda _: Video(video(np.tile(CLIP, (4, 1, 1, 1)), 24, "avi")),
    "WAV": lambda _: Audio(wav(TONE, RATE)),
    "RF64": lambda _: Audio(_rf64()),
    "AIFF": lambda _: Audio(sound(TONE, RATE, "aiff", "pcm_s16be")),
    "M4A": lambda _: Audio(sound(TONE, RATE, "ipod", "aac")),
    "FLAC": lambda _: Audio(sound(TONE, RATE, "flac", "flac")),
}


@pytest.mark.parametrize("make", CUT.values(), ids=CUT)
def test_every_cut_is_noticed(make: Callable[[Path], Any], tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.mp4")
    read = (lambda x: x.frames()) if isinstance(whole, Video) else (lambda x: x.samples(RATE))
    read(whole)
    for percent in (5, 20, 50, 65, 70, 80, 90, 95, 99):
        with pytest.raises(MediaError):
            read(type(whole)(whole.source[: int(len(whole.source) * percent / 100)]))


def test_what_states_no_length_or_is_followed_by_something_is_whole() -> None:
    flac = bytearray(sound(TONE, RATE, "flac", "flac"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # of its samples
    clip = bytearray(video(CLIP, 4, "matroska", "ffv1"))
    at = clip.index(b"\x18S\x80g") + 4
    clip[at : at + 8] = b"\x01" + b"\xff" * 7  # as a live stream has it
    speech = bytearray(wav(TONE, RATE))
    speech[4:8] = speech[40:44] = b"\xff" * 4  # as a program writes it into a pipe
    for data in (flac, speech):
        assert len(Audio(bytes(data)).samples(RATE)) == len(TONE)
    tails = (b"SEFT", bytes(100), b"\0\0\0\x20abc", b"\x7f\xff\xff\xff\0\1\2\3 from a telephone")
    more = [video(CLIP, 4) + tail for tail in tails]
    for data in (bytes(clip), *more):
        assert len(Video(data).frames()[0]) == len(CLIP)


@pytest.mark.parametrize("kind, codec", [
    ("wav", "pcm_s16le"), ("aiff", "pcm_s16be"), ("w64", "pcm_s16le"), ("caf", "pcm_s16be"), ("mp3", "libmp3lame"),
    ("ogg", "flac"), ("ogg", "libopus"),
])  # fmt: skip
def test_a_sound_that_was_cut_is_not_a_shorter_one(kind: str, codec: str) -> None:
    tone = np.tile(TONE, 6)  # of several pages
    whole = sound(tone, 16000, kind, codec)
    assert len(Audio(whole).samples(16000)) >= len(tone)
    for share in (0.999, 0.9, 0.5, 0.1):
        cut = whole[: int(len(whole) * share)]
        with pytest.raises(MediaError, match=rf"is cut off: it has {len(cut)} bytes of \d+"):
            Audio(cut).samples(16000)
    if kind == "mp3":
        for data in (b"ID3\4\0\0\0\0\2\0" + bytes(256) + whole, whole[whole.index(b"\xff\xf3") :]):
            assert len(Audio(data).samples(16000)) >= len(tone)
            with pytest.raises(MediaError, match=f"is cut off: it has {len(data) - 9} bytes of {len(data)}"):
                Audio(data[:-9]).samples(16000)


@pytest.mark.parametrize("kind, codec, part", [("wav", "pcm_s16le", b"data"), ("aiff", "pcm_s16be", b"SSND")])
def test_the_part_of_the_samples_says_how_many_there_are(kind: str, codec: str, part: bytes) -> None:
    """Where the size of the whole does not: as if from a pipe, mended by a program that did not look further, or as far as it
    goes where neither does."""
    whole = sound(TONE, RATE, kind, codec)
    at = whole.index(part) + 4
    for size in (b"\xff" * 4, bytes(4)):
        cut = whole[:4] + size + whole[8:-700]
        with pytest.raises(MediaError, match=f"is cut off: it has {len(cut)} bytes of {len(whole)}"):
            Audio(cut).samples(RATE)
        if kind == "wav":
            assert len(Audio(cut[:at] + b"\xff" * 4 + cut[at + 4 :]).samples(RATE)) == len(TONE) - 350


def test_a_sound_may_lack_a_thousandth_of_a_second() -> None:
    """Of what its header says: rounded, in some programs' files."""
    for stated, whole in ((4000, True), (4008, True), (4009, False)):
        flac = bytearray(sound(TONE, RATE, "flac", "flac"))
        flac[22:26] = stated.to_bytes(4, "big")
        if whole:
            assert len(Audio(bytes(flac)).samples(RATE)) == len(TONE)
        else:
            with pytest.raises(MediaError, match="cut off"):
                Audio(bytes(flac)).samples(RATE)


def test_no_bomb_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasat.runtime.media.base.MOST_PIXELS", 100)
    monkeypatch.setattr("wasat.runtime.media.image.flat", lambda *_: pytest.fail("decoded"))
    for source in (Image(png(PICTURE)), Video(gif(CLIP, 100)), Video(video(CLIP, fps=4))):
        with pytest.raises(MediaError, match="at most 100 are decoded"):
            source.pixels() if isinstance(source, Image) else source.frames()


@pytest.mark.parametrize("package, part", [("PIL", Image(png(PICTURE))), ("av", Audio(wav(TONE, RATE)))])
def test_a_missing_package_is_named(package: str, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MediaError, match=r"pip install 'wasat\[media\]'"):
        part.pixels() if isinstance(part, Image) else part.samples(RATE)
