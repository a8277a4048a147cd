"""Brings the JavaScript that the page needs and is not ours: one pinned package of npm, checked, with its licence.

    python -m wasat.runtime.web.fetch
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from . import HERE, TOKENIZERS, fetched

PACKAGE = "@huggingface/tokenizers@0.2.0"
INTEGRITY = "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg=="
MEMBERS = dict(zip(TOKENIZERS, ("package/dist/tokenizers.min.mjs", "package/LICENSE")))


def fetch() -> None:
    """Puts the files beside this one, unless they are there. Raises RuntimeError where npm is missing, fails, or brings
    something else."""
    if fetched():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is missing (Debian: apt-get install npm)")
    with tempfile.TemporaryDirectory() as tmp:
        done = subprocess.run([npm, "pack", PACKAGE], cwd=tmp, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm pack {PACKAGE} fails: {done.stderr.strip().splitlines()[-1:]}")
        (archive,) = Path(tmp).glob("*.tgz")
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != INTEGRITY:
            raise RuntimeError(f"npm brought another {PACKAGE}: {found}")
        with tarfile.open(archive) as tar:
            for name, member in MEMBERS.items():
                file = tar.extractfile(member)
                assert file is not None
                (HERE / name).write_bytes(file.read())


if __name__ == "__main__":
    try:
        fetch()
    except RuntimeError as e:
        sys.exit(f"{e}; `wasat export --web` needs it")
