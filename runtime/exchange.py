"""Folders that are put in their place at one moment, by one writer at a time, leaving nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _EXCHANGE = -100, 2


def no_name(path: Path, beside: bool = False) -> str | None:
    """Why no file can be called so, nor, with ``beside``, a fresh one be made beside it; None: one can."""
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except UnicodeEncodeError:
        return f"{str(path)!a} has half a character in it"
    if "\0" in str(path):
        return f"{str(path)!r} has a zero in it"
    if longest > (235 if beside else 255) or len(os.fsencode(path)) > 4000:
        return f"{str(path)[:40]}... is longer than names of files can be"
    return None


@contextlib.contextmanager
def replacement(out: Path) -> Iterator[Path]:
    """A fresh folder beside ``out``, to be filled and given to :func:`put`; it is removed whatever happens.

    It is locked as long as its writer lives: what those left that died is recognized by that, and removed.
    """
    with _locked(out.parent):
        _clean(out)
        fresh = out.parent / f".{out.name}.new.{secrets.token_hex(4)}"
        fresh.mkdir()
        lock = _try_lock(fresh)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other writer is putting something into its place in ``folder``."""
    with _locked(folder):
        yield


def put(fresh: Path, out: Path) -> None:
    """``fresh`` is at ``out`` from one moment to the next, and what was there, if anything, at ``fresh``."""
    if not os.path.lexists(out):
        fresh.rename(out)
    elif not _exchanged(fresh, out):  # a file system without it: two steps
        aside = out.parent / f".{out.name}.old.{secrets.token_hex(4)}"
        out.rename(aside)
        try:
            fresh.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        aside.rename(fresh)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchanges two folders' names, if the system can."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), _EXCHANGE)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _clean(out: Path) -> None:
    """Removes what dead writers of ``out`` left; what one took away last, and put nothing in its place, it puts back."""
    left = re.compile(rf"\.{re.escape(out.name)}\.(new|old)\.[0-9a-f]{{8}}")
    for path in out.parent.iterdir():
        match = left.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if match[1] == "old" and not os.path.lexists(out):
            path.rename(out)
        elif (lock := _try_lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """A handle that holds the lock of ``folder``, until it is closed; None if another process or writer has it."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
