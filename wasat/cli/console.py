"""What the commands share: options, how sizes and inputs are spelled, what is said while they run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import numpy as np

    from wasat.passes import Report

out, err = Console(), Console(stderr=True)



def scheme_name(name: str | None) -> str | None:
    """A ``--quantize``, before any long work."""
    if name not in (None, "int4", "int8", "f32"):
        from wasat.passes.serving.recipes import SCHEMES, is_scheme

        if not is_scheme(name):
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(SCHEMES)}")
    return name


Quantize = Annotated[
    str,
    typer.Option(
        metavar="SCHEME", callback=scheme_name,
        help="Weights in fewer bits: `int4` chooses 4 or 5 for each by what it is for; `int8`, `f16`, `bf16`, `f32`; or a "
        "scheme for all, such as `s5` or `int4-plain` (docs/quantization.md).",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option("--override", help="`GLOB=SCHEME` for the parameters that match, e.g. `'*embed*=int8'`; repeatable."),
]
Activation = Annotated[
    Literal["int8", "f32", "bf16", "f16"],
    typer.Option(
        help="Where weights are integers: integer dot products (`int8`), or activations in f32 (slower, more exact). `bf16`, "
        "`f16`: all activations and caches of `forward` in half precision (tensor cores on CUDA)."
    ),
]
Passes = Annotated[
    str,
    typer.Option(help="What runs: `default`, your own beside it (`my_passes:MyPass, default`), others, with `{option=value}`."),
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples the model's distribution.")]
TopK = Annotated[int, typer.Option(help="Sample among the k likeliest; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample among the fewest tokens that hold this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this fraction of the likeliest one's probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: discourage tokens already there.")]
Seed = Annotated[int, typer.Option(help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text, or special token; repeatable.")]
Source = Annotated[Path, typer.Argument(help="A Hugging Face folder, a GGUF or ONNX file, or graph text.", show_default=False)]


Sizes = Annotated[
    list[str] | None, typer.Option("--size", help="`NAME=N`: fix a symbolic size of an ONNX file, e.g. `batch=1`; repeatable.")
]
Constants = Annotated[
    list[str] | None,
    typer.Option(
        "--constant", help="`NAME=NUMBER` or `NAME=FILE.npy`: fix an input of an ONNX file, e.g. `sr=16000`; repeatable."
    ),
]


class Refusal(Exception):
    """An option that cannot be."""


class Bar:
    """What is going on, in one line of stderr that is gone afterwards; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            console=err, transient=True, disable=not err.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        group, label = stage.split()[0], f"{stage:<24}"  # passes are parts of one stage
        if group != self._stage or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._stage = self._bar.add_task(label, total=total or None), group
        self._bar.update(self._task, description=label, completed=done)


def overrides_of(items: list[str] | None) -> dict[str, str]:
    found = {}
    for item in items or []:
        glob, sign, scheme = item.rpartition("=")
        if not sign or not glob:
            raise Refusal(f"--override {item!r}: write GLOB=SCHEME, e.g. '*embed*=int8'")
        found[glob] = scheme
    return found


def sizes_of(items: list[str] | None) -> dict[str, int]:
    sizes = {}
    for item in items or []:
        name, _, number = item.rpartition("=")
        if not name or not (number.isascii() and number.isdecimal() and len(number) < 19):
            raise Refusal(f"--size {item!r}: write NAME=N, e.g. h=1080")
        sizes[name] = int(number)
    return sizes


def constant_of(item: str) -> tuple[str, np.ndarray]:
    """Name and array of a ``--constant``."""
    import numpy as np

    name, _, value = item.rpartition("=")
    if name and value.endswith(".npy"):
        try:
            return name, np.asarray(np.load(value, allow_pickle=False))
        except (ValueError, EOFError) as e:
            raise Refusal(f"--constant {item!r}: {value} is no array file: {e}") from None
    for kind in (int, float):
        try:
            return name, np.asarray(kind(value))
        except (ValueError, OverflowError):
            pass
    raise Refusal(f"--constant {item!r}: write NAME=NUMBER or NAME=FILE.npy, e.g. sr=16000")


def array_file(item: str, name: str, path: Path) -> np.ndarray:
    """The array of an ``--input`` in an ``.npy`` file, or the one of its name in an ``.npz``."""
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if name not in loaded:
                raise Refusal(f"--input {item!r}: the file holds {', '.join(loaded)}, and no {name}")
            return np.asarray(loaded[name])
    except (ValueError, EOFError, zipfile.BadZipFile) as e:
        raise Refusal(f"--input {item!r}: {path} is no array file: {e}") from None


def text_file(path: Path) -> str:
    """The text of a file. Raises Refusal where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise Refusal(f"{path} is not text: its byte {e.start} is no UTF-8") from None


def or_none(scheme: str) -> str | None:
    """What the driver has for f32: nothing in fewer bits."""
    return None if scheme == "f32" else scheme


def say(line: str) -> None:
    """A line of the answer: whole, however narrow the terminal is."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def count_missed(report: Report, source: Path, target: str, quantize: str) -> None:
    """How many optimizations passes and the target's kernels missed, and what tells which."""
    from wasat.driver import KERNELS

    left = sum(len(s.remarks) for s in report.steps if s.name.startswith(KERNELS))
    missed = len(report.remarks("missed")) - left
    told = f"wasat explain {source}" + (f" --quantize {quantize}" if quantize != "f32" else "")
    told += (f" --target {target}" if target != "cpu" else "") + " --missed"
    if missed:
        say(f"{missed} optimization{'s were' * (missed > 1) or ' was'} missed; what and why: {told}")
    if left:
        say(f"{left} operation{'s have' * (left > 1) or ' has'} no kernel of {target}; which and why: {told}")


def warn_of_weights(report: Report, quantize: str) -> None:
    """A warning where ``--quantize`` left weights as they are: which, and why; loudest where it reached none."""
    step = next((s for s in report.steps if s.name == "quantize"), None)
    if step is None:
        return
    left: dict[str, list[str]] = {}
    for r in step.remarks:
        name, found, reason = r.message.partition(" stays ")
        if r.kind == "missed" and found:
            left.setdefault(reason.partition(": ")[2], []).append(name.removeprefix("%"))
    if not step.modified and quantize != "f32":
        _line(f"warning: --quantize {quantize} reached no weight")
        if not left:
            _line("  there is none: weights are parameters of floats that linear layers and embeddings read")
    elif left:
        _line(f"warning: --quantize {quantize} did not reach every weight")
    for reason, names in left.items():
        names = list(dict.fromkeys(names))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        _line(f"  {', '.join(names[:3])}{more}: {reason}")


def _line(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)
