"""Export to ONNX and import again: the same meaning, for one graph, or for every graph that the tests meet.

    PYTHONPATH=tests python -m pytest -p roundtrip tests/passes

As a plugin it goes along with any tests: what they evaluate is exported at an old and a new operator set, imported, and
evaluated on the same inputs; what they verify and never evaluate is given random ones. The end of the run counts what was the
same and what ONNX cannot express, and prints what was wrong, for which the run fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wasat.ir
from numpy.typing import NDArray
from rounding import DRAWS, assert_near, bound, spread, unit
from wasat.ir import (
    Array,
    ArrayParam,
    DType,
    Graph,
    Program,
    QArray,
    TensorType,
    WasatError,
    evaluate,
    symbols_of,
    type_of,
)

OPSETS = (18, 24)
NEAR = 16
"""Roundings of its own that an element may be off without a further look."""
OFTEN = 200
"""Graphs whose operations were all met so often take the two operator sets in turn."""


def agree(got: Array, want: Array, what: str, allowed: Callable[[], NDArray[np.float64]]) -> None:
    """Asserts equal shapes, element types and numbers: integers exactly, floats within what is ``allowed`` of each element."""
    x, y = (np.asarray(a.dense() if isinstance(a, QArray) else a) for a in (got, want))
    assert (x.shape, x.dtype) == (y.shape, y.dtype), what
    if y.dtype.kind in "biu" or y.dtype.itemsize == 1:
        np.testing.assert_array_equal(x, y, err_msg=what)
        return
    wide = np.asarray(y, np.float64)
    near = NEAR * unit(DType.of(y.dtype)) * np.where(np.isfinite(wide), np.abs(wide), 0)
    try:
        assert_near(x, y, near, what)
    except AssertionError:
        assert_near(x, y, allowed(), what)


def roundtrip(
    program: Program, graph: str, inputs: Mapping[str, Any], opset: int, want: Sequence[Array] | None = None, **options: Any
) -> Program:
    """Exports ``graph`` (checked by onnx.checker), imports the file, and asserts the interpreter's ``want`` of both.

    Returns the imported program. Raises ExportError for what cannot be exported.
    """
    from wasat.backends.onnx import to_onnx
    from wasat.frontend.onnx import from_onnx

    g = program[graph]
    with tempfile.TemporaryDirectory() as folder:
        back = from_onnx(to_onnx(program, Path(folder) / "m.onnx", graph=graph, opset=opset, **options))
        again = back["forward"]
        assert [v.name for v in again.inputs] == [v.name for v in g.inputs]
        alone = {str(d) for v in g.inputs for d in v.type.shape}
        for v, w in zip(again.inputs, g.inputs):
            for d, e in zip(v.type.shape, w.type.shape, strict=True):
                # p + s comes back as one symbol where p is no input's size: ONNX names sizes, and does not define p
                assert d == e or (not {*symbols_of((e,))} <= alone and str(d).isidentifier()), (w.name, v.type, w.type)
        if want is None:
            want = evaluate(g, inputs, {name: program.params[name].load() for name in g.params})
        got = evaluate(again, inputs, {name: p.load() for name, p in back.params.items()})
    assert len(got) == len(want)
    params = {name: program.params[name].load() for name in g.params}
    allowed = cache(lambda runs: what_may_differ(g, inputs, params, want, runs))
    for i, (name, x, y) in enumerate(zip(g.output_names, got, want)):
        what = f"output {name} of @{g.name} at operator set {opset}"
        try:
            agree(x, y, what, lambda i=i: allowed(DRAWS)[i])
        except AssertionError:  # what happens in one run of twenty
            agree(x, y, what, lambda i=i: allowed(8 * DRAWS)[i])
    return back


def what_may_differ(
    g: Graph, inputs: Mapping[str, Any], params: Mapping[str, Array], want: Sequence[Array], runs: int
) -> list[NDArray[np.float64]]:
    """Of each element of the results ``want``, in order: what rounding may move it by, and what it changes by as the numbers
    among attributes are those that ONNX has, f32."""
    limits = [bound(y, far) for y, far in zip(want, spread(g, inputs, params, runs))]
    if not any(v.type.dtype is DType.F64 for v in g.values() if isinstance(v.type, TensorType)):
        return limits
    kept = g.clone()
    for node in kept.nodes:  # one at a time: what two of them change may cancel
        numbers = {f.name: x for f in fields(node.attrs) if isinstance(x := getattr(node.attrs, f.name), float)}
        short = {k: y for k, x in numbers.items() if (y := float(np.float32(x))) != x}
        if not short:
            continue
        exact, node.attrs = node.attrs, replace(node.attrs, **short)
        for i, (x, y) in enumerate(zip(evaluate(kept, inputs, params), want)):
            if np.asarray(y).dtype == np.float64:
                limits[i] = limits[i] + 2 * np.nan_to_num(np.abs(np.asarray(x) - np.asarray(y)))
        node.attrs = exact
    return limits


# -- the plugin --------------------------------------------------------------------------------------------------------------
class Sweep:
    """Rounds every new graph; what it met is counted."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.verified: dict[str, Graph] = {}
        self.same = 0
        self.graphs = 0
        self.met: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._busy = False

    def evaluated(self, graph: Graph, inputs: Mapping[str, Any], params: Mapping[str, Array] | None, want: Any) -> None:
        text = str(graph)
        self.verified.pop(text, None)
        if self._busy or text in self.seen:
            return
        self.seen.add(text)
        self.graphs += 1
        ops = {node.op.name for node in graph.nodes}
        rare = any(self.met[op] < OFTEN for op in ops)
        self.met.update(ops)
        self._busy = True
        program = Program({graph.name: graph}, {k: ArrayParam(x, type_of(x)) for k, x in (params or {}).items()})
        try:
            for opset in OPSETS if rare else (OPSETS[self.graphs % 2],):
                self._one(program, graph, dict(inputs), opset, want)
        finally:
            self._busy = False

    def _one(self, program: Program, graph: Graph, inputs: dict[str, Any], opset: int, want: Any) -> None:
        from wasat.backends.onnx import ExportError

        try:
            roundtrip(program, graph.name, inputs, opset, want)
            self.same += 1
        except ExportError as e:
            reasons = [line.strip().split(": 1 (")[0] for line in str(e).splitlines()[1:]] or [str(e)]
            self.refused.update(f"{opset}: {reason}" for reason in reasons)
        except Exception as e:
            self.wrong.append(f"operator set {opset}: {type(e).__name__}: {e}\n{graph}")

    def finish(self) -> None:
        """What was verified and not evaluated, on random inputs that it accepts, but for graphs of operations met often."""
        from wasat.testing import feed, random_program

        for graph in list(self.verified.values()):
            if all(self.met[node.op.name] >= OFTEN for node in graph.nodes):
                continue
            try:
                dims = {name: 4 + i for i, name in enumerate(graph.symbols)}
                program, inputs = random_program(graph), feed(graph, dims)
                params = {name: program.params[name].load() for name in graph.params}
                self._busy = True
                want = evaluate(graph, inputs, params)
            except WasatError:
                continue
            finally:
                self._busy = False
            self.evaluated(graph, inputs, params, want)


SWEEP = Sweep()


def _watch(sweep: Sweep) -> None:
    def follow(name: str, after: Callable[..., None]) -> None:
        original = getattr(wasat.ir, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            after(result, *args, **kwargs)
            return result

        for module in [m for k, m in sys.modules.items() if k.startswith("wasat.")]:
            if getattr(module, name, None) is original:
                setattr(module, name, watched)

    def on_evaluate(result: Any, graph: Graph, inputs: Any, params: Any = None, **rest: Any) -> None:
        sweep.evaluated(graph, inputs, params, result)

    def on_verify(result: Any, graph: Graph, *rest: Any, **more: Any) -> None:
        if not sweep._busy and len(graph) < 2000:
            sweep.verified.setdefault(str(graph), graph.clone())

    follow("evaluate", on_evaluate)
    follow("verify", on_verify)


def pytest_configure(config: Any) -> None:
    _watch(SWEEP)


def pytest_sessionfinish(session: Any) -> None:
    SWEEP.finish()
    if SWEEP.wrong:
        session.exitstatus = 1
    if (out := getattr(session.config, "workeroutput", None)) is not None:  # a worker of pytest-xdist: its controller reports
        out["roundtrip"] = (SWEEP.graphs, SWEEP.same, dict(SWEEP.refused), SWEEP.wrong)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if not hasattr(node, "workeroutput"):  # it died, and the test that killed it fails
        return
    graphs, same, refused, wrong = node.workeroutput["roundtrip"]
    SWEEP.graphs += graphs
    SWEEP.same += same
    SWEEP.refused.update(refused)
    SWEEP.wrong += wrong


def pytest_terminal_summary(terminalreporter: Any) -> None:
    say = terminalreporter.write_line
    say(f"ONNX round trips: {SWEEP.graphs} graphs, {SWEEP.same} the same, {len(SWEEP.wrong)} wrong")
    for reason, count in SWEEP.refused.most_common():
        say(f"  refused {count}: {reason}")
    for text in SWEEP.wrong:
        say(f"WRONG {text}")
