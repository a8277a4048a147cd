"""Training on the devices that this machine has, beside its processor."""

from __future__ import annotations

from functools import wraps
from typing import Any

from wasat.backends.tvm.targets import Target
from wasat.ir import Program
from wasat.training import loop

from .machines import lacking
from .planned import PlanRunner


class Devices:
    """Those of launch plans: see :class:`wasat.training.compiled.Devices`."""

    def lacking(self, target: Target) -> str | None:
        """What this machine lacks to run code for ``target``, in words; None: nothing."""
        return lacking(target)

    def runner(self, program: Program, target: Target) -> PlanRunner:
        """The program, compiled and on the device."""
        return PlanRunner(program, target)


@wraps(loop.train)
def train(*args: Any, **options: Any) -> loop.Trained:
    return loop.train(*args, **{"devices": Devices(), **options})
