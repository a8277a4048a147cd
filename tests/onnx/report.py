"""Writes docs/onnx.md: what of the ONNX backend suite passes, per operator, from the suite and the list of failures.

    python tests/onnx/report.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
from suite import expected_failures, group_of, node_tests

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "onnx.md"
LIST = Path(__file__).with_name("expected_failures.txt")
COMPILED = Path(__file__).with_name("expected_failures_compiled.txt")
TEXT = """\
# ONNX

<!-- written by tests/onnx/report.py -->

```python
import wasat as ws
from onnx import TensorProto, helper

x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
nodes = [helper.make_node("Softmax", ["x"], ["y"], name="weights")]
model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 23)])
program = ws.from_onnx(model)  # or the path of a .onnx file
print(program["forward"])
```
```output
graph @forward(%x: f32[batch, 4]) {{
  %y: f32[batch, 4] = softmax(%x) {{axis=1}}
  return %y
}}
```

`wasat compile model.onnx -o out` takes the same way. Operator sets 7 to {newest} are read, each operator as its set defines it;
a form that is not supported is refused by its name and the node's. Symbolic sizes keep their names, initializers theirs as
parameters, nodes theirs as locations. External data are memory-mapped and must lie in the model's folder. Functions are
inlined; `If`, `Loop` and `Scan` are folded, unrolled or become `scan` and
`cond`: of an `If` that only a run can decide, the branch that is not taken does nothing. A loop whose condition
compares counters with sizes (`while i < n`, with a `break` too, as tf2onnx and scripted torch write them) turns as often as
these say; a sequence that it appends to is rows of a tensor.
Arithmetic on shapes stays symbolic. What cannot be imported is listed at once, with counts and node names.
Of a merged decoder of optimum (`use_cache_branch`) the branch without a past is imported, and a cache derived.
A loop over the sequence that torch wrote out for the length of its example, calling the size symbolic all the same (RWKV,
RecurrentGemma, Mamba and Jamba by TorchScript), is found and said, by `explain` and where a cache is refused: of other
lengths the file computes something else, or nothing.
Of onnxruntime's own operators, those of language models are read (`GroupQueryAttention`, `MultiHeadAttention`, `Attention`,
`RotaryEmbedding`, the `(Skip)(Simplified)LayerNormalization`s, `EmbedLayerNormalization`, the `Gelu`s, `FusedMatMul`,
`MatMulNBits`, `GatherBlockQuantized`, `MoE`, `QMoE`): a past that is an input goes, as do its outputs, and a cache is derived.

`wasat.onnx_backend` is the standard `onnx.backend` interface. It imports a model for the inputs at hand: an input whose numbers
decide a shape (the second one of `Reshape`) is a constant of that import.

## The backend suite

Node tests of onnx {version} on the interpreter: **{passed} of {total} pass** ({percent:.1f}%). The others, by reason
(`tests/onnx/expected_failures.txt` names them; one that passes fails the run):

{reasons}

The same tests compiled for the CPU, many in one library: **{compiled} of {total} pass** ({compiled_percent:.1f}%). Beside those
above fail (`tests/onnx/expected_failures_compiled.txt`):

{compiled_reasons}

| operator | interpreter | compiled | of |
|---|---|---|---|
{rows}
"""


def document() -> str:
    """The text of docs/onnx.md."""
    tests, expected = node_tests(), expected_failures(LIST)
    known = {t.model.graph.node[0].op_type for t in tests if len(t.model.graph.node) == 1}
    only_compiled = expected_failures(COMPILED)
    total, passed, compiled = Counter[str](), Counter[str](), Counter[str]()
    for t in tests:
        group = group_of(t, known)
        total[group] += 1
        passed[group] += t.name not in expected
        compiled[group] += t.name not in expected and t.name not in only_compiled
    return TEXT.format(
        newest=onnx.defs.onnx_opset_version(), version=onnx.__version__, passed=passed.total(), total=total.total(),
        percent=100 * passed.total() / total.total(),
        compiled=compiled.total(), compiled_percent=100 * compiled.total() / total.total(),
        reasons=_counted(expected), compiled_reasons=_counted(only_compiled),
        rows="\n".join(f"| {g} | {passed[g]} | {compiled[g]} | {total[g]} |" for g in sorted(total)),
    )  # fmt: skip


def _counted(expected: dict[str, str]) -> str:
    return "\n".join(f"- {n}: {reason}" for reason, n in Counter(expected.values()).most_common())


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(f"{DOCUMENT.relative_to(ROOT)} written")
