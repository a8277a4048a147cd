"""CUDA without a GPU: NVIDIA's compiler as its packages install it, and machine code for the architectures asked for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wasat.ir import IRError, WasatError


class NvccError(WasatError):
    """The CUDA compiler refuses."""


def architectures(detail: str) -> list[str]:
    """The architectures in ``sm_80,sm_90a``, oldest first. Raises IRError for what is none."""
    found = [a.strip() for a in detail.split(",")]
    for a in found:
        number = a.removeprefix("sm_").rstrip("af")
        if not a.startswith("sm_") or not number.isdecimal() or int(number) < 75 or len(a) - len(number) > 4:
            raise IRError(f"there is no GPU architecture {a!r} for CUDA 13: write sm_80, sm_90a or, for several, sm_80,sm_90a")
    return sorted(dict.fromkeys(found), key=lambda a: (int(a[3:].rstrip("af")), a))


def toolkit() -> Path | None:
    """The folder of CUDA's compiler: of NVIDIA's package, of ``CUDA_HOME``, or that of an nvcc on the PATH; None if it is not
    installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) / "cu13" for p in (spec.submodule_search_locations if spec else None) or ()]
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parents[1])
    return next((r for r in roots if (r / "bin" / "nvcc").exists()), None)


def missing_tools() -> list[str]:
    if toolkit() is not None:
        return []
    return ["CUDA's compiler nvcc: pip install 'wasat[cuda]', or set CUDA_HOME to the folder of a CUDA 13"]


def fat_binary(code: str, archs: Sequence[str]) -> bytes:
    """CUDA C++ as machine code for each of ``archs``, and nothing that a driver would have to compile."""
    root = toolkit()
    if root is None:
        raise NvccError(f"compiling for {', '.join(archs)} needs {missing_tools()[0]}")
    with tempfile.TemporaryDirectory() as tmp:
        source, out = Path(tmp) / "kernels.cu", Path(tmp) / "kernels.fatbin"
        source.write_text(code, encoding="utf-8")
        each = [x for a in archs for x in ("-gencode", f"arch=compute_{a[3:]},code={a}")]
        halves = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS",
                  "BFLOAT162_CONVERSIONS")  # fmt: skip
        options = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *(f"-U__CUDA_NO_{name}__" for name in halves)]
        done = subprocess.run(
            [root / "bin" / "nvcc", "--fatbin", *options, *each, "-o", out, source], capture_output=True, text=True
        )
        if done.returncode:
            raise NvccError(f"{root / 'bin' / 'nvcc'} refuses the code for {', '.join(archs)}: {done.stderr.strip()[-2000:]}")
        return out.read_bytes()
