"""Pictures, sounds and videos in prompts: decoded as they are, refused where damaged or absurd, generation with them."""

from __future__ import annotations

import io
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("PIL")
av = pytest.importorskip("av")

from media_files import gif, png, sound, video, wav
from PIL import Image as Pillow
from tiny_media import RATE, VOCAB, media_program
from tiny_model import edit_manifest
from wasat.ir import Program
from wasat.runtime import ArtifactError, Audio, Image, InputError, MediaError, Model, Session, Video, load
from wasat.runtime import media as module
from wasat.runtime.media import open_media

from wasat import driver

RNG = np.random.default_rng(1)
PICTURE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
TONE = (0.3 * np.sin(np.arange(4000) * 0.3)).astype(np.float32)
CLIP = np.stack([np.full((16, 24, 3), 40 * i, np.uint8) for i in range(6)])


@pytest.fixture(scope="module")
def source() -> Program:
    return media_program()


@pytest.fixture(scope="module")
def folder(source: Program, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("media") / "tiny.wasat"
    source.metadata["tokenizer"] = str(tokenizer_file)
    driver.compile(source, out, chunk=8)
    return out


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Model:
    return load(folder)


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


def test_session_takes_rows_of_media_as_tokens(seeing: Model) -> None:
    session = Session(seeing)
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


def test_models_refuse_what_they_cannot_see(folder: Path, tmp_path: Path) -> None:
    deaf = Path(shutil.copytree(folder, tmp_path / "deaf"))
    edit_manifest(deaf, "media.audio", ...)
    with pytest.raises(InputError, match="no encoder for audio; it takes text, image, video"):
        load(deaf).generate([[Audio(TONE, RATE)]], max_tokens=1)
    for field, value, message in (
        ("media.audio.entry", "nothing", "audio encoder nothing is no entry"),
        ("media.image.entry", "encode_audio", "takes audio, not image"),
        ("media.audio.rate", ..., "media.audio.rate is missing"),
        ("entries.prefill.inputs.1.name", "other", "entry prefill takes none"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / field))
        edit_manifest(copy, field, value)
        with pytest.raises(ArtifactError, match=message):
            load(copy)


# -- pictures ----------------------------------------------------------------------------------------------------------------
def _saved(image: Any, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def test_pictures_of_every_mode() -> None:
    image = Pillow.fromarray(PICTURE)
    assert np.array_equal(Image(_saved(image, "PNG")).pixels(), PICTURE)
    assert np.array_equal(Image(_saved(image, "WEBP", lossless=True)).pixels(), PICTURE)
    assert np.abs(Image(_saved(image, "JPEG", quality=100, subsampling=0)).pixels().astype(int) - PICTURE).max() <= 4
    grey = np.array(image.convert("L"))
    assert np.array_equal(Image(_saved(image.convert("L"), "PNG")).pixels(), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(Image(_saved(image.quantize(16), "PNG")).pixels(), np.array(image.quantize(16).convert("RGB")))
    deep = (np.arange(600).reshape(20, 30) * 109).astype(np.uint16)
    assert np.array_equal(Image(_saved(Pillow.fromarray(deep), "PNG")).pixels()[..., 0], np.rint(deep / 257))


def test_transparency_is_over_white() -> None:
    opacity = RNG.integers(0, 256, (20, 30, 1), dtype=np.uint8)
    x = np.concatenate([PICTURE, opacity], 2)
    want = PICTURE * (opacity / 255) + 255 * (1 - opacity / 255)
    for source in (x, png(x)):
        assert np.abs(Image(source).pixels() - want).max() <= 0.51
    clear = _saved(Pillow.fromarray(np.zeros((2, 2), np.uint8), "P"), "PNG", transparency=0)
    assert (Image(clear).pixels() == 255).all()


def test_orientation_of_a_photograph() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    assert np.array_equal(Image(_saved(Pillow.fromarray(PICTURE), "PNG", exif=exif)).pixels(), np.rot90(PICTURE, -1))


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


# -- videos ------------------------------------------------------------------------------------------------------------------
def test_videos_and_gifs() -> None:
    for source in (video(CLIP, fps=4), gif(CLIP, 250)):
        frames, times = Video(source).frames()
        assert frames.shape == CLIP.shape
        assert np.abs(frames.astype(int) - CLIP).max() <= 8
        assert np.allclose(times, np.arange(6) / 4, atol=1e-3)


def test_a_gif_of_one_picture_is_an_image(tmp_path: Path) -> None:
    for count, kind in ((1, Image), (2, Video)):
        path = tmp_path / f"{count}.gif"
        path.write_bytes(gif(CLIP[:count], 100))
        assert type(open_media(path)) is kind


def test_long_videos_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRAME_MEMORY", 5 * CLIP[0].nbytes)
    clip = np.stack([np.full((16, 24, 3), 3 * i, np.uint8) for i in range(23)])
    frames, times = Video(gif(clip, 100)).frames()
    assert np.allclose(times, np.arange(0, 23, 8) / 10, atol=1e-6)
    assert np.array_equal(frames, clip[::8])


# -- damage ------------------------------------------------------------------------------------------------------------------
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


def _not_numbers() -> bytes:
    header = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, RATE, RATE * 4, 4, 32)
    data = np.array([0.1, np.nan] * 50, np.float32).tobytes()
    body = header + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: Image(b""), "image of 0 bytes is empty"),
    "missing": (lambda: Image("/no/such.png"), "/no/such.png does not exist"),
    "a text": (lambda: Image(b"not a picture at all"), "cannot be read"),
    "truncated picture": (lambda: Image(png(PICTURE)[:900]), "cannot be read"),
    "a billion pixels": (lambda: Image(_header(50_000, 20_000)), "too large to be decoded"),
    "90 million pixels": (lambda: Image(_header(30_000, 3_000)), "30000 x 3000 pixels; at most 80,000,000"),
    "more than Pillow reads": (lambda: Image(_header(2**31 - 1, 2**31 - 1)), "too large to be decoded"),
    "no pixels": (lambda: Image(np.zeros((0, 4, 3), np.uint8)), "nothing to see"),
    "floats as pixels": (lambda: Image(np.zeros((4, 4, 3))), "pixels are u8"),
    "32-bit pixels": (lambda: Image(_saved(Pillow.fromarray(np.zeros((2, 2), np.float32)), "TIFF")), "pixels of 32 bits"),
    "a sound as picture": (lambda: Image(wav(TONE, RATE)), "cannot be read"),
    "no rate": (lambda: Audio(TONE), "a rate of 0 Hz"),
    "0 Hz": (lambda: Audio(_no_rate()), "Hz|cannot be read"),
    "not a number": (lambda: Audio(np.array([0, np.nan]), RATE), "infinite or no numbers"),
    "not a number in a file": (lambda: Audio(_not_numbers()), "infinite or no numbers"),
    "nothing to hear": (lambda: Audio(np.zeros(0, np.float32), RATE), "no sound"),
    "only a header": (lambda: Audio(wav(TONE[:0], RATE)), "no sound|cannot be read"),
    "too long": (lambda: Audio(np.zeros(2 * 3601, np.int16), 2), "longer than 3600 s"),
    "bytes as samples": (lambda: Audio(TONE.astype(np.int8), RATE), "floats in"),
    "truncated WAV": (lambda: Audio(wav(TONE, RATE)[:3000]), "cut off: it has 3000 bytes of 8044"),
    "truncated FLAC": (lambda: Audio(sound(TONE, RATE, "flac", "flac")[:1500]), "cut off|cannot be read"),
    "a picture as sound": (lambda: Audio(png(PICTURE)), "cannot be read"),
    "a playlist": (lambda: Audio(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n"), "cannot be read"),
    "a silent video as sound": (lambda: Audio(video(CLIP, fps=4)), "holds no sound"),
    "no frames": (lambda: Video(CLIP[:0], fps=1), "at least one"),
    "frames without times": (lambda: Video(CLIP), "either times="),
    "times that go back": (lambda: Video(CLIP, times=[0, 1, 2, 1, 3, 4]), "ascending"),
    "no frames per second": (lambda: Video(CLIP, fps=-1), "frames per second"),
    "truncated video": (lambda: Video(video(CLIP, fps=4)[:300]), "cannot be read|no pictures"),
    "cut video": (lambda: Video((data := video(CLIP, 4, "matroska", "ffv1"))[: len(data) // 2]), "cut off|cannot be read"),
    "truncated GIF": (lambda: Video(gif(CLIP, 100)[:60]), "cannot be read"),
    "a sound as video": (lambda: Video(wav(TONE, RATE)), "holds no pictures"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own
@pytest.mark.parametrize("make, message", HOSTILE.values(), ids=HOSTILE)
def test_damaged_or_absurd(seeing: Model, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(MediaError, match=message):
        seeing.generate([["a", make()]], max_tokens=1)
    assert seeing.generate(["a"], max_tokens=1)[0].steps == 0  # the model is as usable as before


def test_no_bomb_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PIXELS", 100)
    monkeypatch.setattr(module, "_flat", lambda *_: pytest.fail("decoded"))
    for source in (Image(png(PICTURE)), Video(gif(CLIP, 100)), Video(video(CLIP, fps=4))):
        with pytest.raises(MediaError, match="at most 100 are decoded"):
            source.pixels() if isinstance(source, Image) else source.frames()


@pytest.mark.parametrize("package, part", [("PIL", Image(png(PICTURE))), ("av", Audio(wav(TONE, RATE)))])
def test_a_missing_package_is_named(package: str, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MediaError, match=r"pip install 'wasat\[media\]'"):
        part.pixels() if isinstance(part, Image) else part.samples(RATE)
