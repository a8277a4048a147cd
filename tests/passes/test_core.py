"""The pass manager: order, verification, checks against the interpreter, reports, and errors that name the pass."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from wasat.ir import Builder, Graph, IRError, Loc, Program, VerifyError, evaluate
from wasat.passes import FuseActivations
from wasat.passes.core import GraphPass, Pass, PassError, PassManager, Remark, Remarks, Report, Step

from wasat import passes
from wasat.testing import InterpreterCheck, check_pass, feed, random_program

TEXT = """
graph @f(%x: f32[n, 4]) {
  param %w: f32[4]
  %y: f32[n, 4] = mul(%x, %w)
  %z: f32[n, 4] = neg(%y)
  return %z
}
graph @g(%x: f32[n]) {
  %a: f32[n] = abs(%x)
  return %a
}
"""


@dataclass(frozen=True)
class Scale(GraphPass):
    """Multiplies the first output: wrong, unless by 1."""

    by: float = 1.0
    name = "scale"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        if graph.name != "f":
            remarks.missed("not @f", graph)
            return False
        old = graph.outputs[0]
        new = Builder(graph, loc=Loc("model.py", 7)).mul(old, self.by)
        graph.set_outputs([new], graph.output_names)
        remarks.applied("scaled", new)
        return True


@dataclass(frozen=True)
class Inexact(Scale):
    by: float = 2.0
    name = "inexact"
    exact = False


@dataclass(frozen=True)
class Do(Pass):
    """Whatever is asked for."""

    what: Callable[[Program], bool]
    needs: str = ""
    promises: str = ""
    name = "do"

    def run(self, program: Program, remarks: Remarks) -> bool:
        return self.what(program)

    def requires(self, program: Program) -> None:
        if self.needs:
            raise PassError(self.needs)

    def ensures(self, program: Program) -> None:
        if self.promises:
            raise PassError(self.promises)


def checked() -> InterpreterCheck:
    return InterpreterCheck([{"n": 1}, {"n": 3}])


def test_report_counts_times_and_explains() -> None:
    seen: list[Any] = []
    manager = PassManager(
        [Scale(), Do(lambda p: False)],
        dump=lambda name, when, p: seen.append((name, when, len(p["f"]))),
        on_progress=lambda name: seen.append(name),
    )
    report = manager.run(random_program(TEXT))
    first, second = report.steps
    assert (first.name, first.nodes_before, first.nodes_after, first.modified) == ("scale", 3, 5, True)
    assert not second.modified
    assert first.seconds > 0
    assert seen == ["scale", ("scale", "before", 2), ("scale", "after", 4), "do", ("do", "before", 4), ("do", "after", 4)]
    assert [r.message for r in report.remarks("applied")] == ["scaled"]
    assert [str(r) for r in report.remarks()] == ["applied: scaled (@f)\n    at model.py:7", "missed: not @f (@g)"]
    assert "scale: 3 -> 5 nodes" in report.explain()
    assert "do: 5 -> 5 nodes" in report.explain()
    assert report.explain("missed").splitlines()[1:] == ["  missed: not @f (@g)"]


def test_explain_of_nothing() -> None:
    assert PassManager([]).run(random_program(TEXT)).explain() == "no pass ran"
    report = PassManager([Do(lambda p: False)]).run(random_program(TEXT))
    assert report.explain("missed") == "nothing was missed"


def test_check_finds_a_pass_that_changes_results() -> None:
    PassManager([Scale(1.0)], check=checked()).run(random_program(TEXT))
    with pytest.raises(PassError, match=r"pass scale changes output z of @f at \{'n': 1\}"):
        PassManager([Scale(1.01)], check=checked()).run(random_program(TEXT))


def test_an_inexact_pass_sets_the_baseline_of_the_next() -> None:
    PassManager([Inexact(), Scale(1.0)], check=checked()).run(random_program(TEXT))
    with pytest.raises(PassError, match="pass scale changes"):
        PassManager([Inexact(), Scale(1.01)], check=checked()).run(random_program(TEXT))


def test_check_passes_over_graphs_with_another_signature() -> None:
    def replace(program: Program) -> bool:
        g = Graph("f")
        x = g.add_input("x", program["f"].inputs[0].type)
        g.set_outputs([Builder(g).exp(x)], ["other"])
        program.graphs["f"] = g
        return True

    PassManager([Do(replace)], check=checked()).run(random_program(TEXT))


def _corrupt(program: Program) -> bool:
    node = program["f"].first
    assert node is not None
    node.outputs[0].uses.clear()
    return True


def test_verification_names_the_pass_and_those_before_it() -> None:
    with pytest.raises(VerifyError, match=r"pass do: graph @f: .*\n(.*\n)*  \(passes that ran before it: scale\)"):
        PassManager([Scale(), Do(_corrupt)]).run(random_program(TEXT))
    PassManager([Do(_corrupt)], verify=False).run(random_program(TEXT))


def test_a_broken_program_is_no_pass_s_fault() -> None:
    program = random_program(TEXT)
    _corrupt(program)
    with pytest.raises(VerifyError) as e:
        PassManager([Scale()]).run(program)
    assert "pass" not in str(e.value)


def test_requires_and_ensures() -> None:
    program = random_program(TEXT)
    with pytest.raises(PassError, match=r"pass do: needs more\n  \(passes that ran before it: none\)"):
        PassManager([Do(lambda p: True, needs="needs more")]).run(program)
    with pytest.raises(PassError, match="pass do: not kept"):
        PassManager([Do(lambda p: True, promises="not kept")]).run(program)


def test_an_error_inside_keeps_its_place_in_the_model() -> None:
    def fail(program: Program) -> bool:
        raise IRError("cannot be", Loc("model.py", 12))

    with pytest.raises(IRError, match=r"pass do: cannot be\n(.*\n)*  at model.py:12") as e:
        PassManager([Do(fail)]).run(random_program(TEXT))
    assert str(e.value).count("model.py:12") == 1


def test_a_remark_shows_the_line() -> None:
    assert str(Remark("missed", "why", "f", Loc(__file__, 3))).endswith("test_core.py:3: from __future__ import annotations")


def test_feeds_of_a_binding_are_the_same_each_time() -> None:
    program = random_program(TEXT)
    params = {k: p.load() for k, p in program.params.items()}
    a, b = (evaluate(program["f"], feed(program["f"], {"n": 2}), params)[0] for _ in range(2))
    assert (a == b).all()


def test_rules_reach_the_bodies_of_loops() -> None:
    """Also those within others; a remark names the body."""
    program = random_program("""graph @g(%x: f32[2, 4], %w: f32[4]) {
  %y: f32[2, 4] = scan(%x, %w) {body=graph @outer(%h: f32[2, 4], %w: f32[4]) {
    %e: f32[2, 4] = scan(%h, %w) {body=graph @inner(%a: f32[2, 4], %w: f32[4]) {
      %s: f32[2, 4] = sigmoid(%a)
      %z: f32[2, 4] = mul(%a, %s)
      %n: f32[2, 4] = mul(%z, %w)
      return %n
    }, carries=1, slices=0, length=2}
    return %e
  }, carries=1, slices=0, length=3}
  return %y
}""")
    report = PassManager([FuseActivations()], check=InterpreterCheck([{}])).run(program)
    assert [str(r) for r in report.remarks()] == ["applied: %z = silu (@inner)\n    at <text>:5"]
    assert "%z: f32[2, 4] = silu(%a)" in str(program)
    assert report.steps[0].modified
    assert "sigmoid" not in str(program)
    before = str(program)
    assert not PassManager([FuseActivations()]).run(program).steps[0].modified
    assert str(program) == before


@dataclass(frozen=True)
class Faulty(GraphPass):
    """A pass with a fault of its own."""

    name = "faulty"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        for node in graph.nodes:
            {}[node.op.name]
        return False


def test_a_fault_of_a_pass_names_it_and_the_node() -> None:
    program = random_program("graph @f(%x: f32[2]) {\n  %y: f32[2] = neg(%x)\n  return %y\n}")
    with pytest.raises(PassError, match=r"pass faulty: KeyError: 'neg' at %y: f32\[2\] = neg\(%x\) \(<text>:2\)\n  \(passes"):
        PassManager([Faulty()]).run(program)


@pytest.mark.parametrize("told", [None, 1, "", []])
def test_a_pass_that_does_not_say_whether_it_changed_something(told: Any) -> None:
    """It would be neither verified nor checked."""
    program = random_program(TEXT)

    @dataclass(frozen=True)
    class Silent(GraphPass):
        name = "silent"

        def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
            return told  # type: ignore[no-any-return]

    for p in (Silent(), Do(lambda *_: told)):
        with pytest.raises(PassError, match=rf"pass (silent|do): it returned {re.escape(repr(told))}, not whether it changed"):
            PassManager([p]).run(program)


@pytest.mark.parametrize("given", [None, 3, "cleanup", Pass, object()], ids=["none", "number", "name", "class", "object"])
def test_what_is_no_pass(given: Any) -> None:
    with pytest.raises(PassError, match="is no pass: give objects"):
        PassManager([given]).run(random_program(TEXT))


def test_check_pass_shows_what_differs() -> None:
    text = "graph @f(%x: f32[2]) {\n  %y: f32[2] = neg(%x)\n  return %y\n}"
    with pytest.raises(AssertionError, match=r"(?s)idle makes another text.*-  %y: f32\[2\] = exp.*\+  %y: f32\[2\] = neg"):
        check_pass(Idle(), text, text.replace("neg", "exp"))
    with pytest.raises(AssertionError, match="idle says that it changed nothing"):
        check_pass(Idle(), text, text)


@dataclass(frozen=True)
class Idle(GraphPass):
    name = "idle"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        return False


def test_explain_groups_equal_layers() -> None:
    loc, other = Loc("model.py", 3), Loc("model.py", 4)
    remarks = [Remark("applied", f"%q_{i} = 2 linears", "f", loc) for i in range(3)]
    remarks += [Remark("applied", f"%q_{i} = 2 linears", "f", Loc("model.py", 3, scope=f"layers.{i}.mlp")) for i in (5, 12)]
    remarks += [Remark("applied", "%q_3 = 2 linears", "f", other), Remark("applied", "%q_4 = 3 linears", "f", loc)]
    text = Report([Step("merge", 0.0, 1, 1, True, remarks)]).explain()
    assert [line.strip() for line in text.splitlines() if "linears" in line] == [
        "applied: %q_0 = 2 linears (@f) × 3", "applied: %q_5 = 2 linears (@f) × 2",
        "applied: %q_3 = 2 linears (@f)", "applied: %q_4 = 3 linears (@f)",
    ]


def test_passes_are_values() -> None:
    """Their options are all that they hold, and stay as they are while they run: one may serve many programs."""
    made = [c for c in vars(passes).values() if isinstance(c, type) and issubclass(c, Pass) and dataclasses.is_dataclass(c)]
    assert len(made) > 10
    assert all(c.__dataclass_params__.frozen for c in made)  # type: ignore[attr-defined]


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Other(IRError):
    """Made of nothing, where ours are made of a message and a place."""

    def __init__(self) -> None:
        super().__init__("another's own")


def test_exceptions_of_other_peoples_kinds() -> None:
    """What a pass raises may not be writable, and need not be made as ours are."""

    def fail(e: Exception) -> Callable[[Program], bool]:
        def run(program: Program) -> bool:
            raise e

        return run

    for e, kind, said in (
        (Mute(), PassError, "pass do: Mute: its message cannot be written"), (Other(), Other, "pass do: another's own"),
        (type("MuteOfOurs", (PassError,), {"__str__": Mute.__str__})(), PassError, "pass do: its message cannot be written"),
    ):  # fmt: skip
        with pytest.raises(kind, match=rf"{said}.*\n  \(passes that ran before it: none"):
            PassManager([Do(fail(e))]).run(random_program(TEXT))
