"""The machine at hand: whether it can run code that was compiled for some target, and else what it lacks."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

from .errors import AGAIN, ArtifactError
from .hosts.cuda import no_cuda
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
    if needs.arch and needs.arch != (here := processor()):
        return f"an {needs.arch} processor: this is {here}"
    have = cpu_features()
    lacking = [f for f in needs.features if have is not None and f not in have]
    if lacking:
        return f"a processor with {', '.join(lacking)}, which this one lacks"
    if needs.kind not in DEVICES:
        return f"a runtime for {needs.kind}, which this version of Wasat is not"
    return DEVICES[needs.kind](needs)


def processor() -> str:
    """This machine's architecture, as Linux calls it."""
    name = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(name, name)


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


DEVICES: dict[str, Callable[[Needs], str | None]] = {
    "llvm": lambda needs: None, "cuda": lambda needs: no_cuda(needs.mcpu), "webgpu": lambda needs: no_webgpu(),
    "opencl": lambda needs: no_opencl(),
}  # fmt: skip
"""By the kind of code: what is missing to run it on a machine whose processor and system are right."""
