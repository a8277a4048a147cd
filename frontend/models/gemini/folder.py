"""A model as a folder: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from wasat.frontend.chat import chat_texts
from wasat.frontend.fields import ConfigError
from wasat.frontend.weights.safetensors import STORED, match, read_folder, read_json
from wasat.ir import CheckpointError, DType, ParamSource, Program

from .config import ROUNDED, Config
from .model import Gemini


def save(
    folder: str | Path, config: Config, params: Mapping[str, ParamSource], *, tokenizer: str | Path | None = None,
    dtype: str = "f16", rounded: str | None = None,
) -> None:  # fmt: skip
    """Writes the model into ``folder``, made if need be; :func:`load` and ``wasat compile`` read it.

    ``params``: a program's, e.g. of a trained one; those that the model lacks are left out. ``tokenizer``: a tokenizer.json to
    copy. ``dtype``: f16, bf16 or f32. ``rounded``: the scheme whose rounding the weights were trained with,
    which they keep in f32 alone: the folder says so, and the :class:`wasat.ir.Origin` of what is read. ``config.json`` comes
    last: a folder without it is not complete.

    Raises CheckpointError, before anything is written, for a missing parameter, one of another shape, one that is not finite in
    ``dtype``, and another dtype.
    """
    folder, stored = Path(folder), DType.of(dtype)
    if stored not in STORED:
        raise CheckpointError(f"dtype is {dtype}; a checkpoint is stored as {', '.join(map(str, STORED))}")
    arrays: dict[str, np.ndarray] = {}
    for name, p in Gemini(config).parameters().items():
        if name not in params:
            raise CheckpointError(f"parameter {name} is missing; give those of a program of this configuration")
        with np.errstate(over="ignore"):  # refused below
            x = np.asarray(params[name].load(), stored.np, order="C")
        if x.shape != p.type.concrete({}):
            raise CheckpointError(f"parameter {name} is {list(x.shape)}; the configuration asks for {p.type}")
        if not np.isfinite(x).all():
            raise CheckpointError(f"parameter {name} is not finite as {dtype}: save as f32, or look into the run")
        arrays[name] = x
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "config.json"
    described.unlink(missing_ok=True)
    save_file(arrays, folder / "model.safetensors")
    if tokenizer is not None and Path(tokenizer).resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    unfinished = folder / "config.unfinished"
    described_as = config.to_json() | ({} if rounded is None else {ROUNDED: rounded})
    unfinished.write_text(json.dumps(described_as, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(described)


def load(folder: str | Path) -> Program:
    """The serving program of a folder that :func:`save` wrote; parameters are memory-mapped, and converted to f32 when loaded.

    Raises ConfigError for a field of config.json, CheckpointError for files that are damaged or do not fit.
    """
    folder = Path(folder)
    given = read_json(folder / "config.json")
    config, rounded = Config.from_json(given, str(folder / "config.json")), given.get(ROUNDED)
    if rounded is not None and not isinstance(rounded, str):
        raise ConfigError(f"{folder / 'config.json'}: rounded is {rounded!r}; expected the name of a scheme")
    model = Gemini(config)
    program = model.program()
    wanted = {name: p.type for name, p in model.parameters().items()}
    found = match(wanted, read_folder(folder), (), folder)
    program.params = {name: found[name] for name in program.params}
    tokenizer = folder / "tokenizer.json"
    program.origin = replace(
        program.origin, tokenizer=str(tokenizer) if tokenizer.exists() else None, texts=chat_texts(folder),
        rounded=rounded,
    )  # fmt: skip
    return program
