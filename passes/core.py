"""Passes, their remarks, and the manager that runs them: verified, timed, dumped, checked against the interpreter.

    @dataclass(frozen=True)
    class DropStopGradient(GraphPass):
        \"\"\"stop_gradient(x) -> x, where nothing will be differentiated.\"\"\"
        name = "drop-stop-gradient"

        def run_graph(self, graph, remarks):
            ...
            return changed
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal, Protocol

from wasat.ir import Attrs, Graph, IRError, Loc, Node, Program, Value, WasatError
from wasat.ir.errors import message_of, said

Kind = Literal["applied", "missed"]


@dataclass(frozen=True)
class Remark:
    """What a pass did (``applied``), or nearly did and why not (``missed``)."""

    kind: Kind
    message: str
    graph: str
    loc: Loc | None = None

    def __str__(self) -> str:
        text = f"{self.kind}: {self.message} (@{self.graph})"
        if self.loc is not None:
            text += f"\n    at {self.loc}" + (f": {self.loc.source}" if self.loc.source else "")
        return text


class Remarks:
    """Collects the remarks of one run of a pass."""

    def __init__(self) -> None:
        self.items: list[Remark] = []

    def applied(self, message: str, at: Node | Value | Graph) -> None:
        """Notes what was done, and where."""
        self._add("applied", message, at)

    def missed(self, reason: str, at: Node | Value | Graph) -> None:
        """Notes an optimization that was lost at this place, and the reason."""
        self._add("missed", reason, at)

    def _add(self, kind: Kind, message: str, at: Node | Value | Graph) -> None:
        if isinstance(at, Graph):
            self.items.append(Remark(kind, message, at.name))
        else:
            self.items.append(Remark(kind, message, at.graph.name, at.loc))

    def of(self, kind: Kind) -> list[Remark]:
        return [r for r in self.items if r.kind == kind]

    def __iter__(self) -> Iterator[Remark]:
        return iter(self.items)


class PassError(WasatError):
    """A pass that cannot do what it was asked for, or that broke the program."""


class Pass:
    """A change of a program. Subclasses are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    """Whether results stay the same up to rounding (quantization does not promise it)."""

    def run(self, program: Program, remarks: Remarks) -> bool:
        """Changes ``program`` in place; returns whether it did."""
        raise NotImplementedError

    def requires(self, program: Program) -> None:
        """Raises PassError if the program is not in the form that the pass needs."""

    def ensures(self, program: Program) -> None:
        """Raises PassError if the program is not in the form that the pass promises."""


class GraphPass(Pass):
    """A pass that looks at one graph at a time."""

    in_bodies: ClassVar[bool] = False
    """Whether the bodies of loops are such graphs, too."""

    def run(self, program: Program, remarks: Remarks) -> bool:
        changed = [self._run(g, remarks) for g in program.graphs.values()]
        return any(changed)

    def _run(self, graph: Graph, remarks: Remarks) -> bool:
        changed = _told(self.run_graph(graph, remarks))
        for node in graph.nodes if self.in_bodies else ():
            attrs = node.attrs.with_bodies(lambda body: self._run(body, remarks))
            changed |= attrs is not node.attrs
            node.attrs = attrs
        return changed

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        """Changes ``graph`` in place; returns whether it did."""
        raise NotImplementedError


def _told(changed: object) -> bool:
    """What a pass returned. Raises PassError where that does not say whether it changed anything: nothing would be checked."""
    if not isinstance(changed, bool):
        raise PassError(f"it returned {changed!r}, not whether it changed something: True or False")
    return changed


@dataclass
class Step:
    """One pass as it ran."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    modified: bool
    remarks: list[Remark]


@dataclass
class Report:
    """Everything the manager saw."""

    steps: list[Step] = field(default_factory=list)

    def remarks(self, kind: Kind | None = None) -> list[Remark]:
        return [r for s in self.steps for r in s.remarks if kind in (None, r.kind)]

    def explain(self, only: Kind | None = None) -> str:
        """Every pass with its remarks, as text."""
        lines = []
        for s in self.steps:
            shown = [r for r in s.remarks if only in (None, r.kind)]
            if only is None or shown:
                lines.append(f"{s.name}: {s.nodes_before} -> {s.nodes_after} nodes, {s.seconds * 1e3:.1f} ms")
                lines += ["  " + text.replace("\n", "\n  ") for text in _grouped(shown)]
        return "\n".join(lines) if lines else "nothing was missed" if only == "missed" else "no pass ran"


def _grouped(remarks: Sequence[Remark]) -> list[str]:
    """The remarks as text; those of equal layers, told apart by the numbers in names alone, as the first of them."""
    groups: dict[object, list[Remark]] = {}
    for r in remarks:
        message = re.sub(r"%[\w.+]+", lambda name: re.sub(r"\d+", "", name[0]).rstrip("_."), r.message)
        place = None if r.loc is None else str(replace(r.loc, scope=re.sub(r"\d+", "", r.loc.scope), caller=None))
        groups.setdefault((r.kind, message, r.graph, place), []).append(r)
    texts = []
    for group in groups.values():
        first, *rest = str(group[0]).split("\n")
        texts.append("\n".join([first + (f" × {len(group)}" if len(group) > 1 else ""), *rest]))
    return texts


class Check(Protocol):
    """Compares what a program computes before and after a pass: see :class:`wasat.testing.InterpreterCheck`."""

    def baseline(self, program: Program) -> None:
        """Remembers what the program computes now."""
        ...

    def compare(self, program: Program, name: str) -> None:
        """Raises PassError if the program computes something else than the last baseline."""
        ...


def attrs_key(attrs: Attrs) -> Hashable:
    """What tells attributes apart, -0.0 and 0.0 included, which are equal as numbers."""
    values = ((f.name, getattr(attrs, f.name)) for f in fields(attrs))
    return attrs, tuple(name for name, x in values if isinstance(x, float) and x == 0 and math.copysign(1, x) < 0)


def _node_at(e: BaseException) -> Node | None:
    """The node that the innermost function was busy with that calls one ``node``."""
    found, tb = None, e.__traceback__
    while tb is not None:
        node = tb.tb_frame.f_locals.get("node")
        found, tb = node if isinstance(node, Node) else found, tb.tb_next
    return found


Dump = Callable[[str, Literal["before", "after"], Program], None]


@dataclass
class PassManager:
    """Runs passes in order.

    ``verify``: the program is verified before the first and after every pass. ``check``: the interpreter's results are compared
    around every pass that promises to keep them. ``dump(pass name, "before" | "after", program)`` sees every stage.
    Errors name the pass and those that ran before it.
    """

    passes: Sequence[Pass]
    verify: bool = True
    check: Check | None = None
    dump: Dump | None = None
    on_progress: Callable[[str], None] = lambda name: None

    def run(self, program: Program) -> Report:
        report = Report()
        if self.verify:
            program.verify()
        if self.check is not None:
            self.check.baseline(program)
        for p in self.passes:
            if not isinstance(p, Pass):
                raise PassError(f"{p!r} is no pass: give objects of classes of wasat.passes.Pass")
            self.on_progress(p.name)
            report.steps.append(self._step(p, program, report))
        return report

    def _step(self, p: Pass, program: Program, report: Report) -> Step:
        remarks = Remarks()
        if self.dump is not None:
            self.dump(p.name, "before", program)
        before = sum(len(g) for g in program.graphs.values())
        started = time.perf_counter()
        try:
            p.requires(program)
            modified = _told(p.run(program, remarks))
            seconds = time.perf_counter() - started
            if modified and self.verify:
                program.verify()
            p.ensures(program)
        except WasatError as e:
            done = ", ".join(s.name for s in report.steps) or "none"
            message = e.message if isinstance(e, IRError) else message_of(e)
            message = f"pass {p.name}: {message}\n  (passes that ran before it: {done})"
            raise (e.reworded(message) if isinstance(e, IRError) else PassError(message)) from e
        except Exception as e:  # a fault of the pass itself
            done = ", ".join(s.name for s in report.steps) or "none"
            node = _node_at(e)
            where = f" at {node!r}" + (f" ({node.loc})" if node.loc is not None else "") if node is not None else ""
            message = f"pass {p.name}: {said(e)}{where}\n  (passes that ran before it: {done})"
            raise PassError(message) from e
        if self.check is not None and modified:
            if p.exact:
                self.check.compare(program, p.name)
            self.check.baseline(program)
        if self.dump is not None:
            self.dump(p.name, "after", program)
        after = sum(len(g) for g in program.graphs.values())
        return Step(p.name, seconds, before, after, modified, remarks.items)
