"""Every orientation, depth, sample format, transparency and meaning of pixels that the readers accept; bounds of sizes."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
av = pytest.importorskip("av")

from media_files import png, video, wav
from PIL import Image as Pillow
from wasat.runtime import Audio, Image, InputError, MediaError, Video

RNG = np.random.default_rng(2)
PIXELS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
TURNED: dict[int, Any] = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
"""What a viewer makes of the stored pixels, by the EXIF orientation."""
MATRICES = {
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1), 5: (0, 1, 1, 0), 6: (0, 1, -1, 0),
    7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip
"""The display matrix (a, b, c, d) of the same: x' = a x + c y, y' = b x + d y."""


def _saved(image: Any, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_the_orientations_of_pictures(orientation: int, format: str) -> None:
    exif = Pillow.Exif()
    exif[0x112] = orientation
    data = _saved(Pillow.fromarray(PIXELS), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(Image(data).pixels(), TURNED[orientation](PIXELS))


def _shown(matrix: tuple[float, float, float, float]) -> np.ndarray:
    """The first frame of a clip of three grey corners with a display matrix."""
    data = bytearray(video(np.stack([CORNERS] * 2), fps=4))
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(x * 65536) for x in matrix)
    data[at : at + 20] = struct.pack(">5i", a, b, 0, c, d)
    return Video(bytes(data)).frames()[0][0]


CORNERS = np.zeros((16, 32, 3), np.uint8)
CORNERS[:8, :16], CORNERS[:8, 16:], CORNERS[8:, :16] = 240, 160, 80


@pytest.mark.parametrize("orientation", MATRICES)
def test_the_orientations_of_videos(orientation: int) -> None:
    got, want = _shown(MATRICES[orientation]), TURNED[orientation](CORNERS)
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).mean() < 8


def test_a_video_shown_smaller_is_upright() -> None:
    assert np.abs(_shown((0.5, 0, 0, 0.5)).astype(int) - CORNERS).mean() < 8
    assert np.abs(_shown((0.5, 0, 0, -0.25)).astype(int) - CORNERS[::-1]).mean() < 8


def test_a_video_turned_by_another_angle_is_refused() -> None:
    with pytest.raises(MediaError, match="turned by no multiple of 90 degrees"):
        _shown((0.7, 0.7, -0.7, 0.7))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP", "PPM", "BMP", "GIF"])
def test_pixels_mean_what_pillow_says(mode: str, format: str) -> None:
    """All opaque: Pillow's own conversion to RGB."""
    grey = Pillow.fromarray(PIXELS).convert("L" if mode in ("1", "LA") else "P" if mode == "PA" else "RGB")
    try:
        data = _saved(grey.convert(mode), format)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"{format} holds no {mode}")
    assert np.array_equal(Image(data).pixels(), np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB")))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(depth: int, colour: int, row: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, as its specification has it."""
    head = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*p) for p in parts)


PALETTE = (b"PLTE", bytes([10, 20, 30, 200, 100, 0]))
DEEP = struct.pack(">3H", 0, 32768, 65535)


@pytest.mark.parametrize("data, want", [
    (_png(1, 0, b"\xa0", 3), [255, 0, 255]), (_png(2, 0, b"\x1b", 4), [0, 85, 170, 255]),
    (_png(4, 0, b"\x0f\x80", 3), [0, 255, 136]), (_png(8, 0, b"\0\x07\xff", 3), [0, 7, 255]),
    (_png(16, 0, DEEP, 3), [0, 128, 255]), (_png(8, 4, b"\0\xff\0\x80\0\0", 3), [0, 127, 255]),
    (_png(8, 0, b"\0\x07\xff", 3, (b"tRNS", b"\0\x07")), [0, 255, 255]),
    (_png(1, 3, b"\x40", 2, PALETTE), [[10, 20, 30], [200, 100, 0]]),
    (_png(8, 3, b"\0\1", 2, PALETTE, (b"tRNS", b"\0")), [[255, 255, 255], [200, 100, 0]]),
    (_png(8, 3, b"\0\1", 2, PALETTE, (b"tRNS", b"\xff\x80")), [[10, 20, 30], [227, 177, 127]]),
    (_png(2, 0, b"\x1b", 4, (b"tRNS", b"\0\1")), [0, 255, 170, 255]),  # as it is stored, not as 8 bits
    (_png(4, 0, b"\x1f\x80", 3, (b"tRNS", b"\0\1")), [255, 255, 136]),
    (_png(4, 0, b"\x1f\x11", 4, (b"tRNS", b"\0\x11")), [17, 255, 17, 17]),
    (_png(8, 2, bytes([1, 2, 3, 4, 5, 6]), 2, (b"tRNS", b"\0\1\0\2\0\3")), [[255, 255, 255], [4, 5, 6]]),
    (_png(8, 6, bytes([0, 100, 200, 51]), 1), [[204, 224, 244]]),
])  # fmt: skip
def test_depths_and_transparency_of_png(data: bytes, want: Any) -> None:
    rows = np.array(want).reshape(len(want), -1) * np.ones((1, 3), int) if np.ndim(want) == 1 else np.array(want)
    assert Image(data).pixels()[0].tolist() == rows.tolist()


@pytest.mark.parametrize("data", [
    _png(16, 0, DEEP, 3, (b"tRNS", b"\x80\0")), _png(16, 2, DEEP, 1, (b"tRNS", b"\x80\0\x80\0\x80\0")),
])  # fmt: skip
def test_a_transparent_colour_of_16_bits_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="16 bits and a colour that is transparent"):
        Image(data).pixels()


def _tiff(bits: int, photometric: int, data: bytes, **more: int) -> bytes:
    """4 x 2 grey pixels; photometric 0: white is 0. ``more``: other tags, by number."""
    tags = {256: 4, 257: 2, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 2, 279: len(data)}
    tags |= {int(tag[1:]): value for tag, value in more.items()}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


@pytest.mark.parametrize("bits, data, want", [
    (1, b"\x50\xa0", [0, 255, 0, 255, 255, 0, 255, 0]), (4, b"\x01\x23\x45\x67", [17 * i for i in range(8)]),
    (8, bytes(range(0, 240, 30)), list(range(0, 240, 30))), (16, struct.pack("<8H", *range(0, 65535, 9000)), None),
])  # fmt: skip
def test_black_or_white_is_zero(bits: int, data: bytes, want: list[int] | None) -> None:
    grey = np.array(want) if want is not None else np.rint(np.arange(0, 65535, 9000) / 257)
    assert np.array_equal(Image(_tiff(bits, 1, data)).pixels()[..., 0].ravel(), grey)
    assert np.abs(Image(_tiff(bits, 0, data)).pixels()[..., 0].ravel() - (255 - grey)).max() <= (bits == 16)


def test_a_tiff_of_12_bits_ends_at_4095() -> None:
    data = bytes.fromhex("000 800 fff 001 010 100 7ff 801".replace(" ", ""))
    want = [round(v * 255 / 4095) for v in (0, 0x800, 0xFFF, 1, 16, 256, 0x7FF, 0x801)]
    assert Image(_tiff(12, 1, data)).pixels()[..., 0].ravel().tolist() == want


def test_samples_of_a_tiff_that_pillow_takes_for_others() -> None:
    with pytest.raises(MediaError, match="pixels with a sign"):
        Image(_tiff(8, 1, bytes(8), t339=2)).pixels()
    assert Image(_tiff(8, 1, bytes(8), t339=1)).pixels().shape == (2, 4, 3)


def test_a_tiff_of_16_bits_in_planes() -> None:
    """Uncompressed, Pillow takes halves of numbers for pixels; compressed, it does not."""
    x = (PIXELS[:2, :4].astype(np.uint16) * 257 + 1).clip(max=65535).astype("<u2")
    planes = [x[..., c].tobytes() for c in range(3)]
    for packed in (False, True):
        parts = [zlib.compress(p) for p in planes] if packed else planes
        tags = {256: [4], 257: [2], 258: [16] * 3, 259: [8 if packed else 1], 262: [2], 277: [3], 278: [2]}
        tags |= {273: [0] * 3, 279: [len(p) for p in parts], 284: [2]}
        start = 8 + 2 + 12 * len(tags) + 4
        lists = b""
        starts = [start + 36 + sum(map(len, parts[:i])) for i in range(3)]
        body = b""
        for tag, values in sorted(tags.items()):
            values = starts if tag == 273 else values
            at = values[0] if len(values) == 1 else start + len(lists)
            lists += b"" if len(values) == 1 else struct.pack(f"<{len(values)}I", *values)
            body += struct.pack("<HHII", tag, 4, len(values), at)
        data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + lists + b"".join(parts)
        if packed:
            assert np.abs(Image(data).pixels().astype(int) - PIXELS[:2, :4]).max() <= 1
        else:
            with pytest.raises(MediaError, match="16 bits and colours one after the other"):
                Image(data).pixels()


def test_a_pgm_of_16_bits() -> None:
    data = b"P5 3 1 65535\n" + DEEP
    assert Image(data).pixels()[0, :, 0].tolist() == [0, 128, 255]


def test_colours_of_another_kind_are_refused() -> None:
    with pytest.raises(MediaError, match="colours of the kind LAB"):
        Image(_saved(Pillow.new("LAB", (4, 4)), "TIFF")).pixels()


@pytest.mark.parametrize("codec, bits", [
    ("pcm_u8", 7), ("pcm_s16le", 15), ("pcm_s24le", 20), ("pcm_s32le", 20), ("pcm_f32le", 20), ("pcm_f64le", 20),
])  # fmt: skip
def test_sample_formats(codec: str, bits: int) -> None:
    x = np.stack([np.linspace(-0.9, 0.9, 400), np.linspace(0.5, -0.3, 400)]).astype(np.float32)
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as container:
        stream: Any = container.add_stream(codec, rate=8000)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(x, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        fit = av.AudioResampler(format=stream.format.name, layout="stereo", rate=8000)
        for piece in (*fit.resample(frame), None):
            container.mux(stream.encode(piece))
    assert np.abs(Audio(out.getvalue()).samples(8000) - x.mean(0)).max() <= 1.01 * 2.0**-bits


@pytest.mark.parametrize("codec, format, channels", [
    ("pcm_s16le", "wav", "7.1"), ("pcm_s24le", "wav", "hexadecagonal"), ("flac", "flac", "7.1"), ("pcm_f32be", "mov", "7.1"),
])  # fmt: skip
def test_the_mean_of_many_channels(codec: str, format: str, channels: str) -> None:
    """Of 8 planes and more, PyAV reads what stands behind them."""
    x = np.linspace(-0.9, 0.9, 3200).reshape(-1, av.AudioLayout(channels).nb_channels).astype(np.float32)
    assert np.abs(Audio(_channels(x, codec, format, channels)).samples(8000) - x.mean(1)).max() < 1e-4


@pytest.mark.parametrize("format, codec, channels", [
    ("aiff", "pcm_s16be", "7.1"), ("caf", "pcm_f32be", "7.1"), ("flac", "flac", "FL+FR+LFE+BC"),
])  # fmt: skip
def test_channels_in_an_order_of_the_files_own(format: str, codec: str, channels: str) -> None:
    """Whose list PyAV frees twice: the process must live on."""
    x = np.zeros((400, av.AudioLayout(channels).nb_channels), np.float32)
    for _ in range(3):
        with pytest.raises(MediaError, match="channels in an unusual order"):
            Audio(_channels(x, codec, format, channels)).samples(8000)


def _channels(x: np.ndarray, codec: str, format: str, layout: str) -> bytes:
    """f32[n, channels] at 8000 Hz."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=8000)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(x.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        fit = av.AudioResampler(format=stream.format.name, layout=layout, rate=8000)
        for piece in (*fit.resample(frame), None):
            container.mux(stream.encode(piece))
    return out.getvalue()


def _extensible(bits: int, valid: int) -> bytes:
    """A WAV whose samples are smaller than the room that each has."""
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 8000, 1000 * bits, bits // 8, bits, 22, valid, 0) + guid
    body = b"WAVEfmt " + struct.pack("<I", 40) + form + b"data" + struct.pack("<I", 240) + bytes(range(240))
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("bits, valid", [(32, 24), (32, 20), (24, 16), (16, 8), (16, 24)])
def test_samples_that_do_not_fill_their_room(bits: int, valid: int) -> None:
    """FFmpeg takes them for samples of another size, or for floats."""
    with pytest.raises(MediaError, match=f"samples of {valid} bits in {bits}: write it again"):
        Audio(_extensible(bits, valid)).samples(8000)
    assert len(Audio(_extensible(bits, bits - 4)).samples(8000)) == 240 * 8 // bits


@pytest.mark.parametrize("tag, bits, block", [(1, 24, 4), (1, 16, 4), (3, 32, 8), (1, 12, 4)])
def test_samples_in_blocks_that_they_do_not_fill(tag: int, bits: int, block: int) -> None:
    """As programs write them that know no extensible header; FFmpeg reads one sample behind the other."""
    for channels, layout in ((1, "mono"), (2, "stereo")):
        data = bytearray(_channels(np.zeros((60, channels), np.float32), "pcm_s16le", "wav", layout))
        at = data.index(b"fmt ") + 8
        data[at : at + 16] = struct.pack("<HHIIHH", tag, channels, 8000, 8000 * block * channels, block * channels, bits)
        with pytest.raises(MediaError, match=f"samples of {bits} bits in {8 * block}: write it again"):
            Audio(bytes(data)).samples(8000)
        data[at + 12 : at + 14] = struct.pack("<H", (bits + 7) // 8 * channels)
        assert len(Audio(bytes(data)).samples(8000)) == 60 * 16 // (bits + 7 & ~7)


def test_a_wav_of_big_endian_numbers_is_refused() -> None:
    with pytest.raises(MediaError, match="from the highest byte on"):
        Audio(b"RIFX" + wav(np.zeros(9, np.float32), 8000)[4:]).samples(8000)


def test_masked_samples_are_what_stands_behind_the_mask() -> None:
    x = np.linspace(-0.5, 0.5, 50).astype(np.float32)
    assert np.array_equal(Audio(np.ma.masked_array(x, mask=x > 0), 8000).samples(8000), x)


@pytest.mark.parametrize("pixel_format, alpha", [("rgba", 51), ("rgba", 255), ("bgra", 0)])
def test_transparency_of_videos_is_over_white(pixel_format: str, alpha: int) -> None:
    x = np.full((2, 16, 16, 4), [0, 100, 200, alpha], np.uint8)
    out = io.BytesIO()
    with av.open(out, "w", format="mov") as container:
        stream: Any = container.add_stream("png" if pixel_format == "rgba" else "qtrle", rate=4)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "rgba" if pixel_format == "rgba" else "argb"
        for frame in x:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format=stream.pix_fmt)))
        container.mux(stream.encode(None))
    want = np.rint((np.array([0, 100, 200]) * alpha + 255 * (255 - alpha)) / 255)
    assert np.abs(Video(out.getvalue()).frames()[0][0, 0, 0] - want).max() <= 1


@pytest.mark.parametrize("make, message", [
    (lambda: Image(png(np.zeros((1, 70_000), np.uint8))), "70000 x 1 pixels; at most 65,535 are read of a side"),
    (lambda: Image(np.zeros((70_000, 1, 3), np.uint8)), "1 x 70000 pixels"),
    (lambda: Video(np.zeros((1, 1, 70_000, 3), np.uint8), fps=1), "70000 x 1 pixels"),
    (lambda: Audio(np.zeros((2, 48_000), np.float32), 8000), r"48000 channels; .* samples are \[n, channels\]"),
    (lambda: Audio(wav(np.zeros((10, 65), np.float32), 8000)), "65 channels"),
    (lambda: Audio(np.zeros(10, np.float32), 2**31), "2147483648 samples per second; at most 10,000,000"),
])  # fmt: skip
def test_sizes_have_bounds(make: Any, message: str) -> None:
    part = make()
    with pytest.raises(MediaError, match=message):
        part.pixels() if isinstance(part, Image) else part.frames() if isinstance(part, Video) else part.samples(8000)


def test_the_largest_sides_are_read() -> None:
    assert Image(np.zeros((1, 65_535), np.uint8)).pixels().shape == (1, 65_535, 3)
    assert len(Audio(np.zeros(20_000, np.float32), 10_000_000).samples(10_000_000)) == 20_000


def test_one_sample_per_second() -> None:
    x = np.linspace(-0.5, 0.5, 50).astype(np.float32)
    for source in (Audio(x, 1), Audio(wav(x, 1))):
        assert np.abs(source.samples(1) - x).max() < 1e-4


@pytest.mark.parametrize("part, name", [
    (Image(PIXELS), "image array uint8[6, 8, 3]"), (Audio(np.zeros(9, np.float32), 8000), "audio array float32[9]"),
    (Video(b"abc"), "video of 3 bytes"), (Image("a.png"), "a.png"),
])  # fmt: skip
def test_what_errors_call_a_medium(part: Any, name: str) -> None:
    assert (part.name, repr(part)) == (name, f"{type(part).__name__}({name})")


@pytest.mark.parametrize("make", [
    lambda: Image(PIXELS), lambda: Audio(PIXELS[0, :, 0], 8000), lambda: Video(PIXELS[None], fps=1),
])  # fmt: skip
def test_one_medium_is_itself(make: Any) -> None:
    """What is encoded once is told by what it is, and arrays are not compared."""
    one, other = make(), make()
    assert one != other
    assert len({*(one, other, one)}) == 2


NO_SOURCES = [0, 3, None, True, 1.5, [1], bytearray(b"x"), memoryview(b"x"), object()]


@pytest.mark.parametrize("source", NO_SOURCES, ids=lambda x: type(x).__name__)
def test_what_is_no_source(source: Any) -> None:
    """A number would be a file that the process has open: standard input, for one."""
    for read in (Image(source).pixels, Video(source).frames, lambda: Audio(source).samples(8000)):
        with pytest.raises(MediaError, match="is neither a path nor the content of a file nor an array"):
            read()


@pytest.mark.parametrize("rate", [None, 0, -1, 1.5, "8000", 2**40, True])
def test_what_is_no_rate(rate: Any) -> None:
    with pytest.raises(InputError, match="rate is "):
        Audio(np.zeros(99, np.float32), 8000).samples(rate)
