"""Training on the devices that this machine has, beside its processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from wasat.backends.tvm.targets import Target
from wasat.ir import Program
from wasat.training import loop

from .machines import lacking
from .planned import PlanRunner

P = ParamSpec("P")
R = TypeVar("R")


class Devices:
    """Those of launch plans: see :class:`wasat.training.compiled.Devices`."""

    def lacking(self, target: Target) -> str | None:
        """What this machine lacks to run code for ``target``, in words; None: nothing."""
        return lacking(target)

    def runner(self, program: Program, target: Target) -> PlanRunner:
        """The program, compiled and on the device."""
        return PlanRunner(program, target)


def _with_devices(f: Callable[P, R]) -> Callable[P, R]:
    @wraps(f)
    def run(*args: P.args, **options: P.kwargs) -> R:
        options.setdefault("devices", Devices())
        return f(*args, **options)

    return run


train = _with_devices(loop.train)
