"""Pictures, sounds and videos in prompts: decoded as they are, generation with them."""

from __future__ import annotations

import io
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("PIL")
av = pytest.importorskip("av")

from media_files import CLIP, PICTURE, TONE, film, gif, png, saved, sound, video, wav, webp
from PIL import Image as Pillow
from tiny_media import RATE, VOCAB
from tiny_model import edit_manifest
from wasat.ir import Program
from wasat.runtime import ArtifactError, Audio, Image, InputError, MediaError, Model, Video, load
from wasat.runtime.interface import Encoder, Generation, Head, Interface, check_interface
from wasat.runtime.interface import Media as MediaSpec
from wasat.runtime.media import KINDS, Media, open_media
from wasat.runtime.media.base import PICTURES

from wasat import driver


def _rows(program: Program, entry: str, **inputs: Any) -> np.ndarray:
    return next(iter(driver.run(program, entry, **inputs).values()))


def _greedy(source: Program, ids: list[int], media: np.ndarray, count: int) -> list[int]:
    """The likeliest tokens, from the whole text each time, on the interpreter."""
    for _ in range(count):
        logits = _rows(source, "forward", tokens=np.array([ids]), media=media)
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[-count:]


# -- generation --------------------------------------------------------------------------------------------------------------
def test_parts_in_any_order_equal_the_interpreter(seeing: Model, source: Program) -> None:
    rows = [
        _rows(source, "encode_image", image=PICTURE),
        _rows(source, "encode_audio", audio=TONE),
        _rows(source, "encode_video", frames=CLIP, times=np.arange(6, dtype=np.float32) / 2),
    ]
    image, audio, clip = Image(PICTURE), Audio(TONE, RATE), Video(CLIP, fps=2)
    prompts = [["see ", image, "hear ", audio], "text alone", [clip, image, "?"], [5, 6, 7]]
    spans = np.split(np.arange(sum(map(len, rows))) + VOCAB, np.cumsum([len(r) for r in rows])[:-1])
    text = seeing.tokenizer.encode
    seen, heard = [*text("see "), *spans[0], *text("hear "), *spans[1]], [*spans[2], *spans[0], *text("?")]
    want = [seen, text("text alone"), heard, [5, 6, 7]]
    pieces: list[list[str]] = [[] for _ in prompts]
    got = seeing.generate(prompts, max_tokens=6, stream=lambda r, piece: pieces[r].append(piece))
    for r, ids in enumerate(want):
        assert got[r].prompt_tokens == len(ids)
        assert got[r].tokens == _greedy(source, [int(t) for t in ids], np.concatenate(rows), 6)
        assert "".join(pieces[r]) == got[r].text


def test_a_medium_is_encoded_once(seeing: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    run = seeing.run
    monkeypatch.setattr(seeing, "run", lambda entry, **x: (calls.append(entry), run(entry, **x))[1])
    image = Image(PICTURE)
    seeing.generate([[image, "a", image], [image]], max_tokens=1)
    assert calls == ["encode_image"]


def test_files_are_told_by_content(seeing: Model, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(png(PICTURE))
    (tmp_path / "b").write_bytes(wav(TONE, RATE))
    (tmp_path / "c").write_bytes(video(CLIP, fps=4))
    assert [type(open_media(tmp_path / n)) for n in "abc"] == [Image, Audio, Video]
    files = seeing.generate([[tmp_path / "a", "?", tmp_path / "b"]], max_tokens=4)
    arrays = seeing.generate([[Image(PICTURE), "?", Audio(tmp_path / "b")]], max_tokens=4)
    assert files[0].tokens == arrays[0].tokens


@pytest.mark.parametrize("format", PICTURES)
def test_pictures_are_told_by_content(format: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(saved(Pillow.fromarray(PICTURE), format))
    assert type(open_media(tmp_path / "a")) is Image
    (tmp_path / "b").write_bytes(b"P9 is a text" if format == "PPM" else b"1" + (tmp_path / "a").read_bytes())
    with pytest.raises(MediaError, match=r"b is none of PNG, "):
        open_media(tmp_path / "b")


def test_a_record_with_its_cover_is_a_sound(tmp_path: Path) -> None:
    flac, cover = sound(TONE, RATE, "flac", "flac"), png(PICTURE)
    body = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 30, 20, 24, 0, len(cover)) + cover
    (tmp_path / "a").write_bytes(flac[:42] + b"\x06" + len(body).to_bytes(3, "big") + body + flac[42:])
    with av.open(str(tmp_path / "a")) as container:
        assert len(container.streams.video) == 1
    found = open_media(tmp_path / "a")
    assert isinstance(found, Audio)
    assert np.abs(found.samples(RATE) - TONE).max() < 1e-4


def test_session_takes_rows_of_media_as_tokens(seeing: Model) -> None:
    session = seeing.session()
    with pytest.raises(InputError, match=f"token {VOCAB} is outside the vocabulary"):
        session.step([[VOCAB]])
    rows = seeing.embed(Image(PICTURE))
    session.encode(media=rows)
    assert np.isfinite(session.step([[VOCAB, VOCAB + len(rows) - 1, 3]])).all()
    with pytest.raises(InputError, match=f"token {VOCAB + len(rows)} is outside"):
        session.step([[VOCAB + len(rows)]])
    with pytest.raises(InputError, match="no rows"):
        session.encode(media=rows[:0])


@pytest.mark.parametrize("prompts, message", [
    ([Image(PICTURE), "a"], "put media and text into a list"),
    ([[Image(PICTURE), 3]], "a part is a text"),
    ([[PICTURE]], "arrays go into"),
    ([[VOCAB]], "outside the vocabulary"),
])  # fmt: skip
def test_prompts_that_are_none(seeing: Model, prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        seeing.generate(prompts, max_tokens=1)


def test_sessions_and_models_go_on_after_an_error(seeing: Model) -> None:
    image = Image(PICTURE)
    before = seeing.generate([[image, "a"]], max_tokens=6)[0]
    assert before.steps > 0
    steps = [[[7, 8, 9]], [[3]]]
    alone = seeing.session()
    want = [alone.step(tokens) for tokens in steps]
    session = seeing.session()
    first = session.step(steps[0])
    with pytest.raises(MediaError, match="cannot be read"):
        seeing.generate([["good ", image, "bad ", Image(png(PICTURE)[:900])], [image]], max_tokens=6)
    assert np.array_equal(first, want[0])
    assert np.array_equal(session.step(steps[1]), want[1])
    assert session.past[0] == 4
    assert seeing.generate([[image, "a"]], max_tokens=6)[0].tokens == before.tokens


def test_models_refuse_what_they_cannot_see(folder: Path, tmp_path: Path) -> None:
    deaf = Path(shutil.copytree(folder, tmp_path / "deaf"))
    edit_manifest(deaf, "interface.media.encoders.1", ...)
    with pytest.raises(InputError, match="no encoder for audio; it takes text, image, video"):
        load(deaf).generate([[Audio(TONE, RATE)]], max_tokens=1)
    for field, value, message in (
        ("interface.media.encoders.1.entry", "nothing", "audio encoder nothing is no entry"),
        ("interface.media.encoders.0.entry", "encode_audio", "takes audio, not image"),
        ("interface.media.encoders.1.rate", ..., "audio encoder encode_audio has no rate"),
        ("entries.prefill.inputs.1.name", "other", "entry prefill takes none"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / field))
        edit_manifest(copy, field, value)
        with pytest.raises(ArtifactError, match=message):
            load(copy)


# -- pictures ----------------------------------------------------------------------------------------------------------------
def test_pictures_of_every_mode() -> None:
    image = Pillow.fromarray(PICTURE)
    assert np.array_equal(Image(saved(image, "PNG")).pixels(), PICTURE)
    assert np.array_equal(Image(saved(image, "WEBP", lossless=True)).pixels(), PICTURE)
    assert np.abs(Image(saved(image, "JPEG", quality=100, subsampling=0)).pixels().astype(int) - PICTURE).max() <= 4
    grey = np.array(image.convert("L"))
    assert np.array_equal(Image(saved(image.convert("L"), "PNG")).pixels(), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(Image(saved(image.quantize(16), "PNG")).pixels(), np.array(image.quantize(16).convert("RGB")))
    deep = (np.arange(600).reshape(20, 30) * 109).astype(np.uint16)
    assert np.array_equal(Image(saved(Pillow.fromarray(deep), "PNG")).pixels()[..., 0], np.rint(deep / 257))


def test_transparency_is_over_white() -> None:
    opacity = np.random.default_rng(1).integers(0, 256, (20, 30, 1), dtype=np.uint8)
    x = np.concatenate([PICTURE, opacity], 2)
    want = PICTURE * (opacity / 255) + 255 * (1 - opacity / 255)
    for source in (x, png(x)):
        assert np.abs(Image(source).pixels() - want).max() <= 0.51
    clear = saved(Pillow.fromarray(np.zeros((2, 2), np.uint8), "P"), "PNG", transparency=0)
    assert (Image(clear).pixels() == 255).all()


def test_orientation_of_a_photograph() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    assert np.array_equal(Image(saved(Pillow.fromarray(PICTURE), "PNG", exif=exif)).pixels(), np.rot90(PICTURE, -1))


# -- sounds ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "format, codec, atol", [("wav", "pcm_s16le", 1e-4), ("flac", "flac", 1e-4), ("mp3", "libmp3lame", 0.05)]
)
def test_sounds(format: str, codec: str, atol: float) -> None:
    got = Audio(sound(TONE, RATE, format, codec)).samples(RATE)
    assert abs(len(got) - len(TONE)) <= 1152
    n = min(len(got), len(TONE))
    assert np.abs(got[:n] - TONE[:n])[200:-200].max() < atol


def test_rate_and_channels() -> None:
    time = np.arange(2000) / 8000
    left, right = np.sin(2 * np.pi * 300 * time), 0.2 * np.sin(2 * np.pi * 500 * time)
    both = np.stack([left, right], 1).astype(np.float32)
    finer = np.arange(4000) / 16000
    want = (np.sin(2 * np.pi * 300 * finer) + 0.2 * np.sin(2 * np.pi * 500 * finer)) / 2
    for source in (Audio(both, 8000), Audio((both * 32767).astype(np.int16), 8000), Audio(wav(both, 8000))):
        got = source.samples(16000)
        assert got.shape == (4000,)
        assert np.abs(got - want)[100:-100].max() < 2e-4


def test_whole_numbers_are_fractions_of_32768() -> None:
    np.testing.assert_array_equal(
        Audio(np.int16([-32768, 16384, 1]), 8000).samples(8000), np.float32([-1, 0.5, 2**-15])
    )


def _silence(seconds: int, rate: int) -> bytes:
    """A FLAC, which needs a dozen bytes for any number of equal samples."""
    out = io.BytesIO()
    with av.open(out, "w", format="flac") as container:
        stream: Any = container.add_stream("flac", rate=rate)
        stream.layout, stream.format = "mono", "s16"
        for at in range(0, seconds * rate, 32768):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 32768), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def test_a_small_sound_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "silence.flac"
    path.write_bytes(_silence(6, 655_350))  # 16 MB as floats
    long, slow = Audio(np.zeros((2_000_000, 2), np.int16), 655_350), Audio(np.zeros(600, np.int16), 1)
    assert path.stat().st_size < 10_000
    for source, seconds in ((Audio(path), 6), (long, 3.05), (slow, 600)):
        tracemalloc.start()
        samples = source.samples(RATE)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(samples) == pytest.approx(seconds * RATE, rel=0.01)
        assert samples.dtype == np.float32
        assert peak < 2 * samples.nbytes + 2e6
    monkeypatch.setattr("wasat.runtime.media.audio.MOST_SAMPLES", 6 * 655_350)
    assert len(Audio(path).samples(RATE)) < 7 * RATE
    with pytest.raises(MediaError, match=r"silence\.flac has more than 3,932,100 samples at 655350 Hz"):
        Audio(path).samples(655_350)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_pieces_are_resampled_as_one(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(1).uniform(-1, 1, (50_000, 2)).astype(np.float32)
    whole = Audio(noise, 16000).samples(rate)
    monkeypatch.setattr("wasat.runtime.media.audio._PIECE", 777)
    assert np.array_equal(Audio(noise, 16000).samples(rate), whole)


# -- videos ------------------------------------------------------------------------------------------------------------------
def test_videos_gifs_and_animated_webps() -> None:
    for source in (video(CLIP, fps=4), gif(CLIP, 250), webp(CLIP, 250)):
        frames, times = Video(source).frames()
        assert frames.shape == CLIP.shape
        assert np.abs(frames.astype(int) - CLIP).max() <= 8
        assert np.allclose(times, np.arange(6) / 4, atol=1e-3)
    for array in (Video(CLIP, fps=4), Video(CLIP, times=[7, 7.25, 7.5, 7.75, 8, 8.25])):
        frames, times = array.frames()
        assert np.array_equal(frames, CLIP)
        assert np.array_equal(times, np.arange(6) / 4)


@pytest.mark.parametrize("make", [gif, webp])
def test_one_picture_is_an_image_and_several_are_a_video(make: Callable[..., bytes], tmp_path: Path) -> None:
    for count, kind in ((1, Image), (2, Video)):
        path = tmp_path / str(count)
        path.write_bytes(make(CLIP[:count], 100))
        assert type(open_media(path)) is kind
        assert (Video.of_head(path, path.read_bytes()[:16]) is None) == (count == 1)
        assert np.array_equal(Image(path).pixels(), CLIP[0])  # of several, the first
        assert np.array_equal(Video(path).frames()[0], CLIP[:count])


def test_an_animated_webp_is_upright() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    source = webp(CLIP * 0 + PICTURE[:16, :24] // 9 + CLIP, 100, exif=exif)
    frames = Video(source).frames()[0]
    assert frames.shape == (6, 24, 16, 3)
    assert np.array_equal(frames[0], Image(source).pixels())


@pytest.mark.parametrize("quarters, a, b, c, d", [(1, 0, 1, -1, 0), (2, -1, 0, 0, -1), (3, 0, -1, 1, 0)])
def test_a_video_held_sideways_is_upright(quarters: int, a: int, b: int, c: int, d: int) -> None:
    clip = np.zeros((3, 16, 32, 3), np.uint8)
    clip[:, :8, :16], clip[:, :8, 16:], clip[:, 8:, :16] = 240, 160, 80
    data = bytearray(video(clip, fps=4))
    at = data.index(b"tkhd") + 44  # the matrix that a telephone writes: turn clockwise to show
    data[at : at + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
    frames, _ = Video(bytes(data)).frames()
    want = np.rot90(clip, -quarters, axes=(1, 2))
    assert frames.shape == want.shape
    assert np.abs(frames.astype(int) - want).mean() < 8


@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "avi", "flv", "mpegts"])
@pytest.mark.parametrize("pictures, seconds", [(4, 3), (12, 1), (2, 3)])
def test_picture_and_sound_may_differ_in_length(format: str, pictures: int, seconds: int) -> None:
    data = film(pictures, seconds, format)
    assert len(Video(data).frames()[0]) == pictures
    assert len(Audio(data).samples(16000)) / 16000 == pytest.approx(seconds, abs=0.2)


def test_long_videos_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasat.runtime.media.video.FRAME_MEMORY", 5 * CLIP[0].nbytes)
    clip = np.stack([np.full((16, 24, 3), 3 * i, np.uint8) for i in range(23)])
    frames, times = Video(gif(clip, 100)).frames()
    assert np.allclose(times, np.arange(0, 23, 8) / 10, atol=1e-6)
    assert np.array_equal(frames, clip[::8])


# -- kinds -------------------------------------------------------------------------------------------------------------------
def test_a_kind_is_a_class(tmp_path: Path) -> None:
    """The registry has it, files are told by it, and manifests are held to it: no other place knows the kinds."""
    try:

        class Points(Media):
            inputs = ("points",)
            needs = ("size",)

            def arrays(self, encoder: Encoder) -> tuple[np.ndarray, ...]:
                return (np.zeros((encoder.size or 0, 3), np.float32),)

            @classmethod
            def of_head(cls, path: Path, head: bytes) -> Media | None:
                return cls(path) if head.startswith(b"ply") else None

        (tmp_path / "a.ply").write_bytes(b"ply 1.0")
        found = open_media(tmp_path / "a.ply")
        assert (type(found), found.kind) == (Points, "points")
        encoder = Encoder("points", "see", size=8, rate=None, samples=None, frames=None)
        assert found.arrays(encoder)[0].shape == (8, 3)
        interface = Interface(
            "m", None, None, 16, None, "tokens", Generation(), MediaSpec(8, 4, (encoder,), False),
            (Head("h", "see", "points"),), (),
        )  # fmt: skip
        check_interface(interface, {"see": ["points"]})
        for entries, message in (({"see": ["image"]}, "points encoder see takes image, not points"), ({}, "see is no entry")):
            with pytest.raises(ArtifactError, match=message):
                check_interface(interface, entries)
        unsized = replace(interface, media=MediaSpec(8, 4, (replace(encoder, size=None),), False))
        with pytest.raises(ArtifactError, match="points encoder see has no size"):
            check_interface(unsized, {"see": ["points"]})
    finally:
        KINDS.pop("points", None)
    with pytest.raises(ArtifactError, match="points encoder see takes points"):
        check_interface(interface, {"see": ["points"]})
    with pytest.raises(MediaError, match=r"a\.ply is none of PNG"):
        open_media(tmp_path / "a.ply")
