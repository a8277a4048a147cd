"""An artifact is one folder: ``manifest.json``, the compiled library, its weights, the runtime's libraries, a tokenizer.

It is written whole or not at all, and read with suspicion: sizes, hashes, versions and the machine are checked before any
of its code is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .manifest import AGAIN, Manifest, Needs, parse_manifest

MANIFEST, LIBRARY, WEIGHTS, TOKENIZER = "manifest.json", "model.so", "weights.safetensors", "tokenizer.json"
RUNTIME_LIBRARY = "libtvm_runtime.so"


# -- writing ---------------------------------------------------------------------------------------------------------------
def write_artifact(out: Path, manifest: Mapping[str, Any], files: Mapping[str, Path | Callable[[Path], None]]) -> None:
    """Writes the artifact folder ``out``, replacing an artifact that is there.

    ``files``: name to a file to copy, or to a function that writes the path it is given. ``manifest`` receives ``files``:
    size and SHA-256 of each. Everything is written beside ``out`` and renamed when it is on disk; on failure nothing stays.
    Raises ArtifactError where ``out`` is something else than an artifact.
    """
    out = Path(os.path.abspath(out))
    check_destination(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.parent / f".{out.name}.{what}.{secrets.token_hex(4)}" for what in ("new", "old"))
    fresh.mkdir()
    try:
        for name, source in files.items():
            if isinstance(source, Path):
                shutil.copyfile(source, fresh / name)
            else:
                source(fresh / name)
        with ThreadPoolExecutor() as pool:
            hashes = dict(zip(files, pool.map(lambda name: sha256(fresh / name), files)))
        described = {n: {"sha256": h, "bytes": (fresh / n).stat().st_size} for n, h in hashes.items()}
        (fresh / MANIFEST).write_text(json.dumps({**manifest, "files": described}, indent=1) + "\n", encoding="utf-8")
        for name in (*files, MANIFEST):
            _sync(fresh / name)
        _sync(fresh)
        with _moved_away(out, old):
            fresh.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_destination(out: Path) -> None:
    """Raises ArtifactError unless ``out`` is free or an artifact: for asking before the long work."""
    if os.path.lexists(out) and not (out / MANIFEST).is_file():
        raise ArtifactError(f"{out} exists and is no artifact (it holds no {MANIFEST}); remove it or choose another place")


@contextlib.contextmanager
def _moved_away(path: Path, aside: Path) -> Iterator[None]:
    """``path``, if it exists, is at ``aside`` from here on, and back if what follows fails."""
    moved = path.exists()
    if moved:
        path.rename(aside)
    try:
        yield
    except BaseException:
        if moved:
            aside.rename(path)
        raise


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
def read_manifest(folder: Path) -> Manifest:
    """The manifest of the artifact at ``folder``, if this machine can run it and its files have the sizes they should have.

    Hashes are left to :func:`check_hash`. Raises ArtifactError.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is no artifact: it holds no {MANIFEST}; give a folder that wasat compile wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ArtifactError(f"{path} is damaged ({e}); copy the artifact again, or {AGAIN}") from None
    manifest = parse_manifest(data)
    check_machine(manifest.target)
    for name in (LIBRARY, WEIGHTS, RUNTIME_LIBRARY):
        if name not in manifest.files:
            raise ArtifactError(f"{path} does not list {name}; {AGAIN}")
    for name, spec in manifest.files.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing; copy the whole folder again, or {AGAIN}")
        size = (folder / name).stat().st_size
        if size != spec.bytes:
            raise ArtifactError(f"{folder / name} has {size} bytes instead of {spec.bytes}; copy it again, or {AGAIN}")
    return manifest


def check_hash(path: Path, found: str, manifest: Manifest) -> None:
    """Raises ArtifactError unless ``found`` is the SHA-256 that the manifest has for ``path``."""
    if found != manifest.files[path.name].sha256:
        raise ArtifactError(f"{path} is not the file that was compiled (its SHA-256 differs); copy it again, or {AGAIN}")


def check_machine(needs: Needs) -> None:
    """Raises ArtifactError if code for ``needs`` cannot run here."""
    if needs.kind != "llvm":
        raise ArtifactError(
            f"the artifact is compiled for {needs.kind}; this runtime runs CPU artifacts: compile with the target cpu"
        )
    if needs.os != sys.platform:
        raise ArtifactError(f"the artifact is compiled for {needs.os}, this is {sys.platform}; {AGAIN} on such a system")
    if needs.arch != platform.machine():
        raise ArtifactError(f"the artifact is compiled for {needs.arch} processors, this is {platform.machine()}; {AGAIN} here")
    have = cpu_features()
    lacking = [f for f in needs.features if have is not None and f not in have]
    if lacking:
        raise ArtifactError(
            f"this processor lacks {', '.join(lacking)}, which the artifact uses; {AGAIN} here, or with a target such as "
            "cpu:x86-64-v3"
        )


def cpu_features() -> frozenset[str] | None:
    """This processor's instruction sets as /proc/cpuinfo lists them; None where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, words = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(words.split())
    except FileNotFoundError:
        pass
    return None
