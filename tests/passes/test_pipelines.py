"""Pipelines as text: read, written, wrong; a pass of one's own beside the default ones, from Python and the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner
from wasat.ir import Graph, WasatError
from wasat.passes import (
    Cleanup,
    Equalize,
    FuseNorm,
    GraphPass,
    Quantize,
    Remarks,
    default_pipeline,
    pipeline,
    pipeline_text,
    pipelines,
)

import wasat as ws
from wasat.cli.app import app
from wasat.testing import random_program

GRAPH = """graph @forward(%x: f32[n, 4]) {
  %a: f32[n, 4] = neg(%x)
  %b: f32[n, 4] = neg(%a)
  return %b
}"""


@dataclass(frozen=True)
class CountNodes(GraphPass):
    """Remarks on how many nodes a graph has."""

    limit: int = 10
    name = "test-count-nodes"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        remarks.applied(f"{len(graph)} of at most {self.limit}", graph)
        return False


@pytest.mark.parametrize("quantize, overrides", [(None, None), ("int4", {"*embed*": "int8", "lm_head": "f16"})])
def test_the_default_pipeline_as_text_is_itself(quantize: str | None, overrides: dict[str, str] | None) -> None:
    passes = default_pipeline(quantize=quantize, activation=None, overrides=overrides, kv_cache="tried", chunk=64)
    text = pipeline_text(passes)
    again = pipeline(text, [])
    assert pipeline_text(again) == text
    assert [type(p) for p in again] == [type(p) for p in passes]
    assert [p for p in again if isinstance(p, Quantize)] == [p for p in passes if isinstance(p, Quantize)]


@pytest.mark.parametrize("scheme, rounded, scaled", [
    ("int8", None, True), ("int4", None, True), ("s6", "int8", True), ("int8", "int8", False), ("int4-plain", None, False),
    ("bf16", None, False), (None, None, False),
])  # fmt: skip
def test_features_are_scaled_before_integers(scheme: str | None, rounded: str | None, scaled: bool) -> None:
    """Just before weights are stored, and as they are going to be; not those that were trained to be stored as they are."""
    names = [p.name for p in default_pipeline(quantize=scheme, rounded=rounded)]
    assert ("equalize" in names) == scaled
    if scaled:
        assert names[names.index("equalize") + 1] == "quantize"
        passes = default_pipeline(quantize=scheme, activation=None, overrides={"a*": "f16"}, text=lambda: (3, 1))
        assert Equalize(text=(3, 1), scheme=str(scheme), activation=None, overrides=(("a*", "f16"),)) in passes


def test_names_options_and_passes_mix() -> None:
    default = [FuseNorm()]
    mixed = pipeline([CountNodes(3), "default, quantize{ scheme = int4 , activation=none }", "test-count-nodes"], default)
    assert mixed == [CountNodes(3), default[0], Quantize("int4", None), CountNodes()]
    assert pipeline(CountNodes(2), default) == [CountNodes(2)]


@pytest.mark.parametrize("text, message", [
    ("fuse-atention", r"no pass is called 'fuse-atention': did you mean fuse-attention\?"),
    ("xyzzy", "no pass is called 'xyzzy': there are .*cleanup, default, derive-kv-cache"),
    ("quantize{shceme=int4}", r"pass quantize has no option 'shceme': did you mean scheme\?"),
    ("fuse-glu{x=1}", "pass fuse-glu has no option 'x': it has none"),
    ("quantize{scheme=3}", "pass quantize: scheme=3 is not str"),
    ("quantize{block=true}", "pass quantize: block=true is not int"),
    ("quantize{overrides=('a','b')}", "pass quantize: overrides="),
    ("quantize{scheme=int4, scheme=int8}", "is not one option=value of quantize"),
    ("quantize{scheme}", "'scheme' is not one option=value of quantize"),
    ("default{chunk=3}", "'default' is a pipeline and takes no options"),
    ("quantize{scheme=int4", "do not match"), ("cleanup}", "do not match"), ("a,,b", "do not match"), ("a, 'b", "do not match"),
    ("", "names no pass"), ("two words", "is not a pass, which reads NAME"),
    ("nowhere_at_all:X", "No module named 'nowhere_at_all'"), ("math:pi", "pi is not a class of passes"),
    ("math:nothing", "has no attribute 'nothing'"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(WasatError, match=message):
        pipeline(text, [])


def test_a_pass_of_ones_own_runs_where_it_stands() -> None:
    program = random_program(GRAPH)
    _, report = ws.optimize(program, passes=[CountNodes(5), "default", "test-count-nodes{limit=7}"])
    names = [s.name for s in report.steps]
    assert (names[0], names[-1]) == ("test-count-nodes", "test-count-nodes")
    assert names[1:-1] == [s.name for s in ws.optimize(program)[1].steps]
    assert [r.message for r in report.remarks("applied") if "at most" in r.message] == ["2 of at most 5", "0 of at most 7"]


def test_other_passes_than_the_default_ones() -> None:
    _, report = ws.optimize(random_program(GRAPH), passes="cleanup")
    assert [s.name for s in report.steps] == ["cleanup"]
    assert len(ws.optimize(random_program(GRAPH), passes=[CountNodes()])[0]["forward"]) == 2
    with pytest.raises(WasatError, match="quantize and overrides are options of the passes 'default'"):
        ws.optimize(random_program(GRAPH), passes=[Cleanup()], quantize="int4")


def test_an_installed_package_announces_a_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wasat_test_plugin.py").write_text(
        "from wasat.passes import GraphPass\n"
        "class Announced(GraphPass):\n    name = 'test-announced'\n    def run_graph(self, graph, remarks): return False\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("test-announced", "wasat_test_plugin:Announced", pipelines.ENTRY_POINTS)
    monkeypatch.setattr(pipelines, "entry_points", lambda group: [point] if group == pipelines.ENTRY_POINTS else [])
    assert "wasat_test_plugin" not in sys.modules
    assert [p.name for p in pipeline("test-announced", [])] == ["test-announced"]
    with pytest.raises(WasatError, match="did you mean test-announced"):
        pipeline("test-anounced", [])


def test_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "g.txt"
    file.write_text(GRAPH)
    result = CliRunner().invoke(app, ["explain", str(file), "--passes", f"{__name__}:CountNodes, cleanup"])
    assert result.exit_code == 0, result.output
    assert "2 of at most 10" in result.output
    result = CliRunner().invoke(app, ["show", str(file), "--passes", "cleanup", "--after", "all"])
    assert "neg" not in result.output
