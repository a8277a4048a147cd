"""Running the ONNX backend suite's node tests: shared by the tests and the report."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner, _normalize_tensor
from wasat.ir import Program

from wasat.onnx_backend import WasatBackend, grouped


def node_tests() -> list[Any]:
    """The suite's node tests, in order of their names.

    What casts of floats to integers of 4 and 2 bits are to give is what onnx makes of it by the ml_dtypes that is installed. Of
    numbers beyond the type's range, which ONNX leaves open, that is the low bits before ml_dtypes 0.7, and 0 since: here it is
    the low bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = sorted(load_model_tests(kind="node"), key=lambda t: t.name)
        return [_of_low_bits(t) if re.match(r"test_cast(like)?_FLOAT(16)?_to_U?INT[24]", t.name) else t for t in tests]


def _of_low_bits(test: Any) -> Any:
    pairs = [([_normalize_tensor(x) for x in inputs], _normalize_tensor(wanted)) for inputs, (wanted,) in test.data_sets]
    made = [(inputs, [inputs[0].astype(np.int64).astype(wanted.dtype)]) for inputs, wanted in pairs]
    return dataclasses.replace(test, data_sets=made)


def run_test(test: Any) -> None:
    """Raises whatever goes wrong: an error of the import, or numbers that differ (the suite's own comparison)."""
    rep = WasatBackend.prepare(test.model)
    for inputs, wanted in test.data_sets:
        got = rep.run([_normalize_tensor(x) for x in inputs])
        Runner.assert_similar_outputs([_normalize_tensor(x) for x in wanted], got, test.rtol, test.atol)


def run_compiled(tests: list[Any]) -> dict[str, Exception]:
    """Compiles the tests into one library and runs them; what went wrong, by the name of the test.

    Where the library as a whole cannot be compiled, each test gets one of its own.
    """
    from wasat.backends.tvm.build import Runner as Compiled
    from wasat.backends.tvm.targets import cpu

    whole, cases = Program({}), []
    try:
        for t in tests:
            for inputs, wanted in t.data_sets:
                program, feeds = WasatBackend.prepare(t.model).bind([_normalize_tensor(x) for x in inputs])
                g = program["forward"]
                g.name = f"t{len(cases)}"
                whole.params.update({f"{g.name}.{n}": program.params[n] for n in g.params})
                g.params = {f"{g.name}.{n}": v for n, v in g.params.items()}
                whole.graphs[g.name] = g
                cases.append((t, program, g, feeds, [_normalize_tensor(x) for x in wanted]))
        compiled = Compiled(whole, cpu())
    except Exception as e:
        if len(tests) == 1:
            return {tests[0].name: e}
        return {name: x for t in tests for name, x in run_compiled([t]).items()}
    failed: dict[str, Exception] = {}
    for t, program, g, feeds, wanted in cases:
        try:
            results = compiled(g.name, feeds)
            got = grouped(program, [results[n] for n in g.output_names])
            Runner.assert_similar_outputs(wanted, got, t.rtol, t.atol)
        except Exception as e:
            failed[t.name] = e
    return failed


def expected_failures(path: Path) -> dict[str, str]:
    """Test name -> reason."""
    return {name: reason for name, (reason, _) in _listed(path).items()}


def _listed(path: Path) -> dict[str, tuple[str, str]]:
    """Test name -> reason and error, from lines ``[reason]`` followed by ``name: type: part of the message``."""
    out: dict[str, tuple[str, str]] = {}
    reason = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            reason = line.strip("[]")
        elif line and not line.startswith("#"):
            name, _, error = line.partition(": ")
            out[name] = reason, error
    return out


def is_listed(path: Path, name: str, e: Exception) -> bool:
    """Whether a test fails as it is listed to: with an error of the type, whose message has the part, that stand beside it."""
    kind, _, part = _listed(path)[name][1].partition(": ")
    return bool(part) and type(e).__name__ == kind and part in str(e)


_GROUPS = {
    r"attention": "Attention", r"flex_?attention": "FlexAttention", r"linear_?attention": "LinearAttention",
    r"causal_?conv": "CausalConvWithState", r"rotary": "RotaryEmbedding", r"rms_normalization": "RMSNormalization",
    r"layer_normalization": "LayerNormalization", r"group_normalization": "GroupNormalization", r"swiglu": "SwiGLU",
    r"image_decoder": "ImageDecoder", r"sce": "SoftmaxCrossEntropyLoss", r"nllloss": "NegativeLogLikelihoodLoss",
}  # fmt: skip


def group_of(test: Any, known: set[str]) -> str:
    """The operator that a test is about: of its only node, or, where it was expanded into many, by its name."""
    nodes = test.model.graph.node
    if len(nodes) == 1:
        return str(nodes[0].op_type)
    plain = re.sub(r"[^a-z0-9]", "", test.name.removeprefix("test_"))
    near = [op for op in known if plain.startswith(op.lower())]
    if near:
        return max(near, key=len)
    for pattern, name in _GROUPS.items():
        if re.match(pattern, test.name.removeprefix("test_")):
            return name
    return str(nodes[0].op_type)
