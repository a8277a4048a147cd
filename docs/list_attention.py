"""What is made of attention and of what else looks back, from the tests' own collections: attention.md.

    python docs/list_attention.py            # writes it
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wasat.backends.tvm.lower import selected
from wasat.backends.tvm.targets import cpu
from wasat.frontend import nn
from wasat.ir import IRError
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink
from wasat.ir.ops.linear_attention import LinearAttentionAttrs

import wasat as ws

PAGE = Path(__file__).with_name("attention.md")
TESTS = Path(__file__).parent.parent / "tests"
HEAD = """# Attention

What looks back over tokens, kind by kind: what the passes understand of it, what `prefill` and `decode` keep, and whether an
attention kernel of the CPU runs it. The rows are what the tests run, each in a decoder of one layer
([`attention_zoo.py`](../tests/attention_zoo.py), [`test_kept.py`](../tests/passes/test_kept.py),
[`test_kept_beside.py`](../tests/passes/test_kept_beside.py),
[`test_kept_distances.py`](../tests/passes/test_kept_distances.py),
[`test_kept_windows.py`](../tests/passes/test_kept_windows.py));
[list_attention.py](list_attention.py) writes this page. Numbers stay the same: step by step as all at once.

*Kept*: keys and values of all positions (full) or of a window (ring), `kept` where no attention operation keeps them, the last
inputs of a convolution or a shift (tail), what a recurrence carries. A formula that no kernel runs is run by plain operations.
Where the largest few scores are chosen by a threshold, keys whose scores are equal but for rounding may be chosen or not: step
by step and all at once round differently, and repeated tokens have such keys.
"""


class Decoder(nn.Module):
    """One block of the zoo between an embedding and a head."""

    def __init__(self, block: nn.Module, dim: int, dtype: str) -> None:
        self.embed, self.head, self.block = nn.Embedding(11, dim, dtype=dtype), nn.Linear(dim, 11, dtype=dtype), block

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        return self.head(x + self.block(x))


def _words(of: Callable[..., Any] | type) -> str:
    """The first sentence of a docstring."""
    text = " ".join(inspect.cleandoc(of.__doc__ or "").split("\n\n")[0].split())
    return text.replace("|", "\\|").rstrip(".")


def _understood(program: ws.Program) -> str:
    fused, _ = ws.optimize(program, kv_cache=False)
    found = [n for n in fused["forward"].nodes if isinstance(n.attrs, AttentionAttrs)]
    linear = [n.attrs for n in fused["forward"].nodes if isinstance(n.attrs, LinearAttentionAttrs)]
    if linear:
        rules = dict.fromkeys(a.rule.replace("_", " ") + (", read before" if a.before else "") for a in linear)
        return f"`linear_attention`: {'; '.join(rules)}"
    if not found:
        return "its formula"
    a, more = AttentionAttrs.of(found[0]), found[0].inputs[3:]
    said = ["causal"] if a.causal else []
    said += [f"window {a.window}"] if a.window is not None else []
    said += [f"softcap {a.softcap:g}"] if a.softcap is not None else []
    said += ["sinks"] if a.sink else []
    said += ["a mask"] if mask_and_sink(a, more)[0] is not None else []
    return f"`attention`: {', '.join(said) or 'everything seen'}"


def _served(program: ws.Program) -> tuple[str, str]:
    """What is kept, and whether a kernel attends."""
    try:
        served, _ = ws.optimize(program, kv_cache=True, chunk=6)
    except IRError as e:
        reason = str(e).split("\n")[1].strip() if "\n" in str(e) else str(e)
        return f"no cache: {reason.split(';')[0]}", ""
    kinds: dict[str, int] = {}
    for s in served.interface.states:
        name = "first positions" if s.name.endswith(".first") else "kept" if s.name.startswith("kept") else s.kind
        kinds[name] = kinds.get(name, 0) + 1
    target = cpu("x86-64-v3", 1)
    graphs = dict(zip(served.graphs, selected(served, target.table(), target.kernels(target, served))))
    calls = [type(getattr(n.op, "desc", None)).__name__ for n in graphs["decode"].nodes]
    return ", ".join(kinds), "yes" if any("Attention" in c for c in calls) else ""


def _rows() -> Iterator[tuple[str, str, str, str, str]]:
    sys.path[:0] = [str(TESTS), str(TESTS / "passes")]
    from attention_zoo import CASES, DIM, MORE
    from test_kept import MIXES, Model
    from test_kept_beside import BESIDE
    from test_kept_distances import DISTANCES
    from test_kept_windows import WINDOWS

    for case in [*CASES, *MORE]:
        block = case.block
        if len(case.inputs) > 1:
            continue  # its further input is no token's
        program = nn.trace(Decoder(block(case.dtype), DIM, case.dtype), {"tokens": "i64[b, s]"}, outputs=["logits"])
        yield case.name, _words(block), _understood(program), *_served(program)
    for name, mix in {**MIXES, **BESIDE, **DISTANCES, **WINDOWS}.items():
        program = nn.trace(Model(mix), {"tokens": "i64[b, s]"}, outputs=["logits"])
        yield name, _words(mix), _understood(program), *_served(program)


def page() -> str:
    lines = [HEAD, "| kind | | understood as | kept | kernel |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join((name.replace('_', ' '), *rest))} |" for name, *rest in _rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
