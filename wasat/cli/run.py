"""``wasat run``: one call of a model that does not generate; arrays, pictures and sounds in, arrays out."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from wasat.cli.console import (
    Bar,
    Constants,
    Quantize,
    Refusal,
    Sizes,
    array_file,
    constant_of,
    or_none,
    out,
    say,
    sizes_of,
    text_file,
)

if TYPE_CHECKING:
    import numpy as np

    from wasat.runtime import Model
    from wasat.runtime.manifest import TensorSpec

Pixels = Literal["raw", "unit", "centered", "imagenet"]
_ARRAYS = (".npy", ".npz")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
_KINDS = "an array (.npy, .npz), a picture (.png, .jpg, …), a sound (.wav, .flac, …), a text as tokens (.txt), or a number"
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(
    source: Annotated[
        Path, typer.Argument(help="An artifact folder, an ONNX file, a Hugging Face folder, or graph text.", show_default=False)
    ],
    given: Annotated[
        list[str] | None,
        typer.Option("--input", show_default=False, help=f"`NAME=FILE`: {_KINDS}; once for each input of the model."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the outputs: `.npz`, or `.npy` where there is one.", show_default=False),
    ] = None,
    entry: Annotated[
        str | None, typer.Option(help="Which entry point; default: `forward`, or the only one.", show_default=False)
    ] = None,
    pixels: Annotated[
        Pixels | None,
        typer.Option(
            show_default=False,
            help="What a picture's bytes become in a float input: `raw` 0 to 255, `unit` 0 to 1, `centered` -1 to 1, "
            "`imagenet` less ImageNet's mean, by its deviation.",
        ),
    ] = None,
    rate: Annotated[int | None, typer.Option(help="Samples per second that a sound is brought to.", show_default=False)] = None,
    size: Sizes = None,
    constant: Constants = None,
    quantize: Quantize = "f32",
) -> None:
    """Run a model that does not generate, once: arrays, pictures and sounds in, arrays out.

    What is no artifact yet is compiled first, into a folder that is gone afterwards; `wasat compile` keeps it. Pictures go into
    inputs of [n, 3, h, w] or [n, h, w, 3] (or without n), in their own size: cut or resize them as the model was trained.

    Examples:

    - `wasat run model.wasat --input x=x.npy -o y.npz`
    - `wasat run detector.onnx --input image=page.png --pixels imagenet -o found.npz`
    - `wasat run vad.onnx --input input=word.wav --rate 16000 --input state=state.npy --constant sr=16000`
    - `wasat run model.onnx --input ids=in.npz --input mask=in.npz --size batch=1`
    """
    from wasat import runtime

    items = _split(given)
    if output is not None and output.suffix not in _ARRAYS:
        raise Refusal(f"--output {output}: write .npz, or .npy for a single output")
    arrays = {name: array_file(f"{name}={file}", name, Path(file)) for name, file in items.items() if _kind(file) in _ARRAYS}
    if source.is_dir() and (source / "manifest.json").exists():
        if size or constant or or_none(quantize) is not None:
            raise Refusal(f"{source} is compiled: give --size, --constant and --quantize to wasat compile")
        model = runtime.load(source)
        name = _entry(model, entry)
        results = model.run(name, **_inputs(model, name, items, arrays, pixels, rate))
    else:
        from wasat import driver

        with tempfile.TemporaryDirectory() as folder:
            with Bar() as bar:
                bar("reading the model")
                program = driver.load_program(
                    source, sizes=sizes_of(size), constants=dict(constant_of(item) for item in constant or ())
                )
                graph = entry or ("forward" if "forward" in program.graphs else next(iter(program.graphs)))
                if graph in program.graphs:
                    signature = [f"{v.name} {v.type}" for v in program[graph].inputs]
                    _check_names(graph, [v.name for v in program[graph].inputs], signature, items)
                driver.compile(program, Path(folder, "model"), quantize=or_none(quantize), kv_cache=False, progress=bar)
            model = runtime.load(Path(folder, "model"))
            name = _entry(model, entry)
            results = model.run(name, **_inputs(model, name, items, arrays, pixels, rate))
    results = {k: _plain(x) for k, x in results.items()}
    if output is not None:
        _write(output, results)
    out.print(_table(results))
    if output is not None:
        say(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _split(given: Sequence[str] | None) -> dict[str, str]:
    """Name and file (or number) of each ``--input``."""
    items: dict[str, str] = {}
    for item in given or ():
        name, _, file = item.partition("=")
        if not name or not file or (_kind(file) not in (*_ARRAYS, *_PICTURES, *_SOUNDS, ".txt") and _number(file) is None):
            raise Refusal(f"--input {item!r}: write NAME=FILE, {_KINDS}")
        if name in items:
            raise Refusal(f"--input {name} is given twice")
        if _number(file) is None and not Path(file).is_file():
            raise Refusal(f"--input {item!r}: there is no file {file}")
        items[name] = file
    return items


def _kind(file: str) -> str:
    return Path(file).suffix.lower()


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def _entry(model: Model, name: str | None) -> str:
    """The entry point that is meant. Refuses those that keep caches."""
    entries = model.manifest.entries
    if name is None:
        name = "forward" if "forward" in entries else next((k for k, e in entries.items() if not e.states), next(iter(entries)))
    if model.entry(name).states or ({"prefill", "decode"} <= entries.keys() and name in ("prefill", "decode")):
        raise Refusal(f"{model.folder}: entry {name} keeps caches: this model generates; wasat generate runs it")
    return name


def _check_names(entry: str, names: Sequence[str], signature: Sequence[str], items: Mapping[str, object]) -> None:
    if sorted(names) != sorted(items):
        lacking = [f"--input {n}=…" for n in names if n not in items]
        unknown = [n for n in items if n not in names]
        parts = [f"there is no input {', '.join(unknown)}"] if unknown else []
        parts += [f"give {' '.join(lacking)}"] if lacking else []
        raise Refusal(f"{entry} takes {', '.join(signature) or 'nothing'}: {'; '.join(parts)}")


def _inputs(
    model: Model, entry: str, items: Mapping[str, str], arrays: Mapping[str, np.ndarray], pixels: Pixels | None,
    rate: int | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What each input is given, held against the entry's signature. Errors name input, file, and what is expected."""
    specs = {spec.name: spec for spec in model.entry(entry).inputs}
    _check_names(entry, list(specs), [_signature(s) for s in specs.values()], items)
    found = {}
    for name, spec in specs.items():
        file = items[name]
        if name in arrays:
            x = arrays[name]
        elif _kind(file) in _PICTURES:
            x = _picture(spec, file, pixels)
        elif _kind(file) in _SOUNDS:
            x = _sound(model, spec, file, rate)
        elif _kind(file) == ".txt":
            x = _text(model, spec, file)
        else:
            x = _filled(spec, file)
        _check(spec, x, file)
        found[name] = x
    return found


def _signature(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _check(spec: TensorSpec, x: np.ndarray, file: str) -> None:
    import numpy as np

    what = f"input {_signature(spec)}: {file} is {x.dtype}[{', '.join(map(str, x.shape))}]"
    if not np.can_cast(x.dtype, np.dtype(spec.dtype), "safe"):
        raise Refusal(f"{what}; save it as {spec.dtype}: x.astype({str(spec.dtype)!r})")
    if x.ndim != len(spec.shape) or any(isinstance(d, int) and d != n for d, n in zip(spec.shape, x.shape)):
        raise Refusal(f"{what}; it must have that shape")


def _picture(spec: TensorSpec, file: str, pixels: Pixels | None) -> np.ndarray:
    import numpy as np

    from wasat.runtime import Image

    shape = list(spec.shape)
    first, last = shape[-3:-2] == [3], shape[-1:] == [3]
    if len(shape) not in (3, 4) or first == last or spec.dtype not in ("uint8", "float32", "float16", "float64"):
        raise Refusal(
            f"input {_signature(spec)} is no picture (uint8 or float of [n, 3, h, w] or [n, h, w, 3]), and {file} is one: give "
            "an array of what the model's own processor makes of it"
        )
    x: np.ndarray = Image(Path(file)).pixels()
    if spec.dtype != "uint8":
        if pixels is None:
            raise Refusal(
                f"input {_signature(spec)}: what the bytes of {file} become, the model does not say; say --pixels raw, unit, "
                "centered or imagenet, as it was trained"
            )
        x = _scaled(x, pixels).astype(spec.dtype)
    elif pixels not in (None, "raw"):
        raise Refusal(f"input {_signature(spec)} takes bytes: --pixels {pixels} is for inputs of floats")
    if first:
        x = x.transpose(2, 0, 1)
    return np.ascontiguousarray(x if len(shape) == 3 else x[None])


def _scaled(x: np.ndarray, pixels: Pixels) -> np.ndarray:
    import numpy as np

    y = x.astype(np.float32)
    match pixels:
        case "unit":
            return y / np.float32(255)
        case "centered":
            return y / np.float32(127.5) - np.float32(1)
        case "imagenet":
            return (y / np.float32(255) - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
    return y


def _sound(model: Model, spec: TensorSpec, file: str, rate: int | None) -> np.ndarray:
    from wasat.runtime import Audio

    media = model.manifest.interface.media
    audio = media.encoder("audio") if media else None
    wanted = rate or (audio.rate if audio else None)
    one = len(spec.shape) == 1 or (len(spec.shape) == 2 and (spec.shape[0] == 1 or isinstance(spec.shape[0], str)))
    if not one or not spec.dtype.startswith("float"):
        raise Refusal(
            f"input {_signature(spec)} is no sound (floats of [samples] or [1, samples]), and {file} is one: give an array of "
            "what the model's own processor makes of it"
        )
    if wanted is None:
        raise Refusal(f"input {_signature(spec)}: at which rate it hears {file}, the model does not say: --rate 16000?")
    x = Audio(Path(file)).samples(wanted).astype(spec.dtype)
    return x if len(spec.shape) == 1 else x[None]


def _text(model: Model, spec: TensorSpec, file: str) -> np.ndarray:
    import numpy as np

    if not spec.dtype.startswith("int") or len(spec.shape) not in (1, 2):
        raise Refusal(f"input {_signature(spec)} takes no tokens, and {file} is a text: give an array")
    tokens = np.array(model.tokenizer.encode(text_file(Path(file)))).astype(spec.dtype)
    return tokens if len(spec.shape) == 1 else tokens[None]


def _filled(spec: TensorSpec, text: str) -> np.ndarray:
    import numpy as np

    number = _number(text)
    if any(isinstance(d, str) or d != 1 for d in spec.shape):
        raise Refusal(f"input {_signature(spec)} has more than one element: give an array file, not {text}")
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iub":
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if not isinstance(number, int) or not low <= number <= high:
            raise Refusal(f"input {_signature(spec)} does not hold {text}")
    return np.full(tuple(int(d) for d in spec.shape), number, dtype)


def _plain(x: np.ndarray) -> np.ndarray:
    """In a type that array files have: bf16 as f32."""
    import numpy as np

    return x.astype(np.float32) if x.dtype.kind == "V" or x.dtype.name == "bfloat16" else x


def _write(path: Path, results: Mapping[str, np.ndarray]) -> None:
    """The file is whole or absent: it is written beside its place and renamed."""
    import numpy as np

    if path.suffix == ".npy" and len(results) != 1:
        raise Refusal(f"--output {path}: there are {len(results)} outputs, {', '.join(results)}: write .npz")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "xb") as f:
            if path.suffix == ".npy":
                np.save(f, next(iter(results.values())))
            else:
                with zipfile.ZipFile(f, "w") as z:  # np.savez takes no output that is called "file"
                    for name, x in results.items():
                        with z.open(f"{name}.npy", "w", force_zip64=True) as to:
                            np.lib.format.write_array(to, np.asanyarray(x), allow_pickle=False)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _table(results: Mapping[str, np.ndarray]) -> Table:
    import numpy as np

    shown = Table("output", "type", "shape", "least", "mean", "largest", "NaN", box=None)
    for name, x in results.items():
        row = [name, str(x.dtype), "×".join(map(str, x.shape)) or "scalar"]
        if x.size and x.dtype.kind in "fiu":
            nan = int(np.isnan(x).sum()) if x.dtype.kind == "f" else 0
            rest = x[~np.isnan(x)] if nan else x
            with np.errstate(all="ignore"):
                numbers = [f"{float(f(rest)):.6g}" for f in (np.min, _mean, np.max)] if rest.size else ["", "", ""]
            row += [*numbers, str(nan) if nan else ""]
        elif x.size and x.dtype.kind == "b":
            row += ["", f"{x.mean():.6g}", "", ""]
        shown.add_row(*map(escape, row))
    return shown


def _mean(x: np.ndarray) -> float:
    return float(x.mean(dtype="float64"))


__all__ = ["run"]
