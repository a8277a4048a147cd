"""The machine at hand: whether it can run code that was compiled for some target, and else what it lacks."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable

from .errors import AGAIN, ArtifactError
from .hosts.opencl import no_opencl
from .hosts.webgpu import no_webgpu
from .manifest import Needs


def check_machine(needs: Needs) -> None:
    """Raises ArtifactError if code for ``needs`` cannot run here: it names the machine, and what of it is missing."""
    if lacking := missing(needs):
        model = f" ({needs.mcpu})" if needs.mcpu else ""
        raise ArtifactError(
            f"the artifact is compiled for {needs.device}{model} and needs {lacking}; run it on such a machine, or {AGAIN} "
            "with a target that runs here (wasat targets)"
        )


def missing(needs: Needs) -> str | None:
    """What this machine lacks to run code for ``needs``, in words; None: nothing."""
    if needs.os and needs.os != sys.platform:
        return f"the system {needs.os}: this is {sys.platform}"
    if needs.arch and needs.arch != platform.machine():
        return f"an {needs.arch} processor: this is {platform.machine()}"
    have = cpu_features()
    lacking = [f for f in needs.features if have is not None and f not in have]
    if lacking:
        return f"a processor with {', '.join(lacking)}, which this one lacks"
    if needs.kind not in DEVICES:
        return f"a runtime for {needs.kind}, which this version of Wasat is not"
    return DEVICES[needs.kind](needs)


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


def _no_cuda(needs: Needs) -> str | None:
    """The first GPU is the one that is used."""
    wanted = f"an NVIDIA GPU of the architecture {needs.mcpu.replace(',', ' or ')}"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return f"{wanted}: its driver (libcuda.so.1) is not installed here"
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return f"{wanted}: the driver here finds none"
    for number, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, 0)
    if not any(runs_on(arch, major.value, minor.value) for arch in needs.mcpu.split(",")):
        return f"{wanted}: the one here is sm_{major.value}{minor.value}"
    return None


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for ``arch`` runs on a GPU of this compute capability: on those of the same major number from its
    minor one on, and code of an ``sm_90a`` on no other."""
    number = arch.removeprefix("sm_")
    if number.endswith("a"):
        return number == f"{major}{minor}a"
    exact = number.rstrip("f")
    return exact.isdecimal() and int(exact) // 10 == major and int(exact) % 10 <= minor


DEVICES: dict[str, Callable[[Needs], str | None]] = {
    "llvm": lambda needs: None, "cuda": _no_cuda, "webgpu": lambda needs: no_webgpu(), "opencl": lambda needs: no_opencl(),
}  # fmt: skip
"""By the kind of code: what is missing to run it on a machine whose processor and system are right."""
