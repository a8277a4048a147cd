"""Running the ONNX backend suite's node tests: shared by the tests and the report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import onnx
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner, _normalize_tensor

from wasat.onnx_backend import WasatBackend


def node_tests() -> list[Any]:
    """The suite's node tests, in order of their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(load_model_tests(kind="node"), key=lambda t: t.name)


def run_test(test: Any) -> None:
    """Raises whatever goes wrong: an error of the import, or numbers that differ (the suite's own comparison)."""
    rep = WasatBackend.prepare(test.model)
    for inputs, wanted in test.data_sets:
        got = rep.run([_normalize_tensor(x) for x in inputs])
        Runner.assert_similar_outputs([_normalize_tensor(x) for x in wanted], got, test.rtol, test.atol)


def group_of(test: Any) -> str:
    """The operator a test is about: the domain's test naming aside, its first node's, or what it was expanded from."""
    nodes: Sequence[onnx.NodeProto] = test.model.graph.node
    return nodes[0].op_type if nodes else "?"
