"""``wasat run``: arrays, pictures, sounds and numbers in, arrays out; and every way to give the wrong thing."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wasat.ir import parse_program

import wasat as ws

Run = Callable[..., tuple[int, str, str]]
PICTURE = """graph @forward(%image: f32[n, 3, h, w], %gain: f32[]) {
  %file: f32[n, 3, h, w] = mul(%image, %gain)
  %mean: f32[n, 3] = reduce_mean(%file) {axes=(2, 3)}
  return %file, %mean
}
"""
BYTES = """graph @forward(%image: u8[h, w, 3]) {
  %y: u8[3, h, w] = transpose(%image) {perm=(2, 0, 1)}
  return %y
}
"""
SOUND = """graph @forward(%wave: f32[1, n], %state: f32[2, 3], %rate: i64[1]) {
  %y: f32[1, n] = neg(%wave)
  %z: f32[2, 3] = neg(%state)
  %r: i64[1] = neg(%rate)
  return %y, %z, %r
}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the graphs above, and files to give them."""
    folder = tmp_path_factory.mktemp("run")
    for name, text in (("picture", PICTURE), ("bytes", BYTES), ("sound", SOUND)):
        (folder / f"{name}.txt").write_text(text)
        ws.compile(parse_program(text), folder / name)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "p.png")
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "state.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    np.save(folder / "wave.npy", np.zeros((1, 4), np.float32))
    np.save(folder / "double.npy", np.zeros((2, 3)))
    np.save(folder / "wide.npy", np.zeros((2, 4), np.float32))
    np.savez(folder / "all.npz", state=np.ones((2, 3), np.float32))
    (folder / "no.npy").write_bytes(b"\x93NUMPY")
    with wave.open(str(folder / "s.wav"), "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(16000)
        f.writeframes(np.array([0, 16384, -32768, 8192], np.int16).tobytes())
    return folder


def test_a_picture_in_a_float_input(run: Run, made: Path, tmp_path: Path) -> None:
    x = np.load(made / "pixels.npy").astype(np.float64).transpose(2, 0, 1)[None]
    mean, deviation = (np.array(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    wanted = {"raw": x, "unit": x / 255, "centered": x / 127.5 - 1, "imagenet": (x / 255 - mean) / deviation}
    for pixels, want in wanted.items():
        to = tmp_path / f"{pixels}.npz"
        code, out, err = run(
            "run", made / "picture", "--input", f"image={made / 'p.png'}", "--input", "gain=2", "--pixels", pixels, "-o", to
        )
        assert (code, err) == (0, "")
        with np.load(to) as got:
            assert sorted(got) == ["file", "mean"]
            np.testing.assert_allclose(got["file"], 2 * want, rtol=1e-5, atol=1e-5)
        assert "file    float32  1×3×4×5" in out
    assert len(list(tmp_path.iterdir())) == len(wanted)


def test_a_picture_in_an_input_of_bytes(run: Run, made: Path, tmp_path: Path) -> None:
    assert run("run", made / "bytes", "--input", f"image={made / 'p.png'}", "-o", tmp_path / "y.npy")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.load(made / "pixels.npy").transpose(2, 0, 1))


@pytest.mark.parametrize("source", ["sound", "sound.txt"])
def test_a_sound_a_state_and_a_number(run: Run, made: Path, tmp_path: Path, source: str) -> None:
    given = ["--input", f"wave={made / 's.wav'}", "--input", f"state={made / 'all.npz'}", "--input", "rate=16000"]
    code, _, err = run("run", made / source, *given, "--rate", 16000, "-o", tmp_path / "y.npz")
    assert (code, err) == (0, "")
    with np.load(tmp_path / "y.npz") as got:
        np.testing.assert_allclose(got["y"], [[0, -0.5, 1, -0.25]], atol=1e-4)
        np.testing.assert_array_equal(got["z"], -np.ones((2, 3)))
        np.testing.assert_array_equal(got["r"], [-16000])


def test_what_is_wrong_names_input_type_shape_and_file(run: Run, made: Path, tmp_path: Path) -> None:
    png, state = f"image={made / 'p.png'}", f"state={made / 'state.npy'}"
    wave_, rate = f"wave={made / 's.wav'}", "rate=16000"
    ready = f"wave={made / 'wave.npy'}"
    refused: list[tuple[str, list[str], str]] = [
        ("picture", [png, "gain=1"], "the model does not say; say --pixels"),
        ("picture", [png], "forward takes image float32[n, 3, h, w], gain float32[]: give --input gain=…"),
        ("picture", [png, "gain=1", "size=2"], "there is no input size"),
        ("picture", [png, png], "--input image is given twice"),
        ("picture", ["image"], "write NAME=FILE, an array (.npy, .npz), a picture"),
        ("picture", ["image=a.bin"], "write NAME=FILE"),
        ("picture", ["image=a.png"], "there is no file a.png"),
        ("picture", [f"image={made / 's.wav'}", "gain=1"], "input image float32[n, 3, h, w] is no sound"),
        ("picture", [f"image={made / 'picture.txt'}", "gain=1"], "takes no tokens"),
        ("bytes", [f"image={made / 'no.npy'}"], "no.npy is no array file"),
        ("sound", [wave_, state, rate], "--rate 16000?"),
        ("sound", [ready, state, "rate=1.5"], "input rate int64[1] does not hold 1.5"),
        ("sound", [ready, state, f"rate={2**63}"], "does not hold"),
        ("sound", [f"wave={made / 'all.npz'}", state, rate], "the file holds state, and no wave"),
        ("sound", ["wave=1", state, rate], "input wave float32[1, n] has more than one element"),
    ]  # fmt: skip
    for source, given, message in refused:
        code, out, err = run("run", made / source, *(x for item in given for x in ("--input", item)), "-o", tmp_path / "y.npz")
        assert (code, out) == (1, ""), given
        assert message in err
    for file, message in (
        ("double.npy", "input state float32[2, 3]: {} is float64[2, 3]; save it as float32"),
        ("wide.npy", "input state float32[2, 3]: {} is float32[2, 4]; it must have that shape"),
    ):
        given = ["--input", wave_, "--input", f"state={made / file}", "--input", rate, "--rate", "16000"]
        code, _, err = run("run", made / "sound", *given)
        assert message.format(made / file) in err
    assert "write .npz, or .npy" in run("run", made / "bytes", "--input", png, "-o", tmp_path / "y.txt")[2]
    assert "give --size, --constant and --quantize to wasat compile" in run("run", made / "bytes", "--size", "h=4")[2]
    several = ["--input", png, "--input", "gain=1", "--pixels", "raw", "-o", tmp_path / "y.npy"]
    assert "there are 2 outputs, file, mean: write .npz" in run("run", made / "picture", *several)[2]
    assert not list(tmp_path.iterdir())


def test_the_command_line_warns(run: Run, made: Path) -> None:
    code, _, err = run("explain", made / "bytes.txt", "--quantize", "int4")
    assert code == 0
    assert err.startswith("warning: --quantize int4 reached no weight\n  there is none")
