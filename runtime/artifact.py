"""An artifact is one folder: ``manifest.json``, the compiled library, its weights, the runtime's libraries, a tokenizer.

It is written whole or not at all, and read with suspicion: sizes, hashes, versions and the machine are checked before any
of its code is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .elf import exports
from .errors import AGAIN, ArtifactError
from .exchange import alone_in, no_name, put, replacement
from .hosts.plan import PLAN, SOURCES
from .machine import check_machine
from .manifest import Manifest, check_format, is_file_name, parse_manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")
MANIFEST, LIBRARY, WEIGHTS, TOKENIZER = "manifest.json", "model.so", "weights.safetensors", "tokenizer.json"
_RUNTIME = {"darwin": "libtvm_runtime.dylib", "win32": "tvm_runtime.dll"}
PROGRAM = "__tvm_ffi__library_bin"
"""What every compiled program exports, and no other library."""


def runtime_library(system: str) -> str:
    """The file of TVM's runtime, under the system that ``sys.platform`` calls so."""
    return _RUNTIME.get(system, "libtvm_runtime.so")


# -- writing ---------------------------------------------------------------------------------------------------------------
def write_artifact(out: Path, manifest: Mapping[str, Any], files: Mapping[str, Path | Callable[[Path], None]]) -> None:
    """Writes the artifact folder ``out``, replacing an artifact that is there.

    ``files``: name to a file to copy, or to a function that writes the path it is given. ``manifest`` receives ``files``,
    size and SHA-256 of each, and ``digest``, its own. Everything is written beside ``out`` and exchanged for it when it is on
    disk: a reader finds one or the other at any moment; on failure nothing stays. Of several writers the last one's stays.
    Raises ArtifactError where ``out`` is something else than an artifact.
    """
    check_destination(out)
    out = Path(os.path.realpath(out))
    for name in files:
        if not is_file_name(name):
            raise ArtifactError(f"{name!r} is no name for a file of an artifact")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacement(out) as fresh:
        for name, source in files.items():
            if isinstance(source, Path):
                shutil.copyfile(source, fresh / name)
            else:
                source(fresh / name)
        with ThreadPoolExecutor() as pool:
            hashes = dict(zip(files, pool.map(lambda name: sha256(fresh / name), files)))
        described = {n: {"sha256": h, "bytes": (fresh / n).stat().st_size} for n, h in hashes.items()}
        whole = {**manifest, "files": described}
        (fresh / MANIFEST).write_text(
            json.dumps({**whole, "digest": digest(whole)}, indent=1) + "\n", encoding="utf-8"
        )
        for name in (*files, MANIFEST):
            _sync(fresh / name)
        _sync(fresh)
        with alone_in(out.parent):
            check_destination(out)
            put(fresh, out)
        _sync(out.parent)


def check_destination(out: Path) -> None:
    """Raises ArtifactError unless ``out`` is free or an artifact, and nothing else, in a folder that can be written to: for
    asking before the long work."""
    if (why := no_name(out, beside=True)) is not None:
        raise ArtifactError(f"no folder can be written there: {why}; choose another place")
    out = Path(os.path.realpath(out))
    if out.parent == out:
        raise ArtifactError(f"{out} is the root of all folders; choose another place")
    check_above(out)
    if not os.path.lexists(out):
        return
    try:
        data = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        files = data["files"]
        ours = isinstance(files, dict) and len(files) > 0 and _is_ours(data)
        ours = ours and all(_SHA256.fullmatch(x["sha256"]) and x["bytes"] >= 0 for x in files.values())
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise ArtifactError(
            f"{out} exists and is no artifact (it holds no {MANIFEST} of one); remove it or choose another place"
        )
    foreign = sorted(set(os.listdir(out)) - {*files, MANIFEST})
    if foreign:
        raise ArtifactError(
            f"{out} holds {foreign[0]}, which is no file of the artifact there; move it away or choose another place"
        )


def _is_ours(manifest: Mapping[str, Any]) -> bool:
    """Whether it has the digest of its own text, or, as first versions and damaged ones have not, says who wrote it."""
    if manifest.get("digest") == digest(manifest):
        return True
    return type(manifest.get("format")) is int and isinstance(manifest.get("wasat"), str)


def check_above(out: Path) -> None:
    """Raises ArtifactError where ``out`` cannot be put into what it would stand in: that is a file, or not to be written to."""
    above = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise ArtifactError(f"{out} cannot be written: {above} is no folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(f"{out} cannot be written: there is no permission to write into {above}; choose another place")


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, its own digest aside, however its text is laid out."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# -- reading ---------------------------------------------------------------------------------------------------------------
def read_manifest(folder: Path, here: bool = True) -> Manifest:
    """The manifest of the artifact at ``folder``, if this machine can run it and its files have the sizes they should have.

    Hashes are left to :func:`check_hash`. ``here=False``: it is for another machine, perhaps. Raises ArtifactError.
    """
    path = folder / MANIFEST
    if (why := no_name(folder)) is not None:
        raise ArtifactError(f"there is no artifact: {why}")
    if not path.is_file():
        raise ArtifactError(f"{folder} is no artifact: it holds no {MANIFEST}; give a folder that wasat compile wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = digest(data) if isinstance(data, dict) else None
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} is damaged ({e}); copy the artifact again, or {AGAIN}") from None
    check_format(data)
    if data.get("digest") != found:
        raise ArtifactError(f"{path} is not as it was written (its digest differs); copy the artifact again, or {AGAIN}")
    manifest = parse_manifest(data)
    if here:
        check_machine(manifest.target)
    planned = manifest.target.kind in SOURCES
    for name in (PLAN, SOURCES[manifest.target.kind], WEIGHTS) if planned else (
        LIBRARY, WEIGHTS, runtime_library(manifest.target.os)
    ):  # fmt: skip
        if name not in manifest.files:
            raise ArtifactError(f"{path} does not list {name}; {AGAIN}")
    for name, spec in manifest.files.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing; copy the whole folder again, or {AGAIN}")
        size = (folder / name).stat().st_size
        if size != spec.bytes:
            raise ArtifactError(f"{folder / name} has {size} bytes instead of {spec.bytes}; copy it again, or {AGAIN}")
    if manifest.target.os == "linux" and not exports(folder / LIBRARY, PROGRAM):
        raise ArtifactError(f"{folder / LIBRARY} cannot be loaded: it is no compiled program (it lacks {PROGRAM}); {AGAIN}")
    return manifest


def check_hash(path: Path, found: str, manifest: Manifest) -> None:
    """Raises ArtifactError unless ``found`` is the SHA-256 that the manifest has for ``path``."""
    if found != manifest.files[path.name].sha256:
        raise ArtifactError(f"{path} is not the file that was compiled (its SHA-256 differs); copy it again, or {AGAIN}")
