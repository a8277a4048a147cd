"""The targets that there are, and what this machine can compile for and run."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wasat.ir import WasatError

if TYPE_CHECKING:
    from wasat.backends.tvm.targets import Target


@dataclass(frozen=True)
class Machine:
    """A target beside the machine at hand."""

    name: str
    about: str
    tools: tuple[str, ...] = ()
    """What compiling for it lacks here, each with the way to get it."""
    lacking: str | None = None
    """What running its code lacks here."""


def machines() -> list[Machine]:
    """Every target, those of installed packages too, as they are without a detail; one that cannot be made says why."""
    from wasat.backends.tvm.targets import TARGETS, announced

    found = [machine(name) for name in TARGETS]
    for name in sorted(announced()):
        try:
            found.append(machine(name))
        except WasatError as e:
            found.append(Machine(name, "", (f"repair: {e}",), "what compiles for it"))
    return found


def machine(name: str) -> Machine:
    """The target ``name`` or ``name:detail``. Raises WasatError where there is none."""
    from wasat.backends.tvm.targets import maker, target_named

    about = (inspect.getdoc(maker(name.partition(":")[0])) or "").replace("\n", " ").partition(". ")[0]
    target = target_named(name)
    return Machine(name, about.replace("`", "").rstrip("."), tuple(target.missing_tools()), lacking(target))


def lacking(target: Target) -> str | None:
    """What this machine lacks to run code for ``target``, in words; None: nothing."""
    from wasat.runtime.fields import Fields
    from wasat.runtime.machine import missing
    from wasat.runtime.manifest import read_needs

    return missing(read_needs(Fields(target.requirements(), "target")))
