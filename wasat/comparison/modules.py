"""transformers on a model's folder: each module that has a weight, beside what reads that weight in our graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wasat.driver import Progress, quiet
from wasat.ir import Array, Graph, Program, Value, WasatError
from wasat.quality import tokens_name

from .bounds import bounds_of, once
from .engines import imported
from .found import Difference, Stage, difference
from .fragments import fragment, slice_to
from .nodes import CLOSEST, Run


def compare_modules(run: Run, program: Program, path: Path, tell: Progress = quiet) -> tuple[Stage, dict[str, Array]]:
    """transformers' model, run once, with what goes into and comes out of each such module held against ours and then replaced
    by it: what lies between two modules is fed what ours was fed. And its logits without any of that.

    Raises WasatError where transformers is not installed or does not read the folder.
    """
    torch = imported("torch", "comparing with transformers")
    transformers = imported("transformers", "comparing with transformers")
    tell(f"opening {path.name} in transformers", 0, 1)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as e:
        raise WasatError(f"transformers does not read {path}: {str(e).strip().splitlines()[0]}") from None
    name = tokens_name(program)
    tokens = torch.from_numpy(np.asarray(next(x for v, x in run.values.items() if v.name == name)))
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
        held = _Held(run, torch)
        hooks = [h for name, m in model.named_modules() for h in held.hooks(name, m)]
        tell("comparing modules", 0, 1)
        model(tokens)
    for h in hooks:
        h.remove()
    stage = Stage(f"@{run.graph.name}, module by module: interpreter, transformers", len(held.found))
    stage.differences = [d for d in held.found if d.differs]
    stage.closest = sorted((d for d in held.found if not d.differs), key=lambda d: -d.ratio)[:CLOSEST]
    return stage, {"logits": logits}


class _Held:
    """What hooks saw."""

    def __init__(self, run: Run, torch: Any) -> None:
        self.run, self.torch = run, torch
        self.found: list[Difference] = []
        self.cut: set[Value] = set()
        """Values of ours that transformers was given."""

    def hooks(self, name: str, module: Any) -> list[Any]:
        """On a module whose weight is a parameter of ours."""
        if getattr(module, "weight", None) is None or f"{name}.weight" not in self.run.graph.params:
            return []
        out = _made_with(self.run.graph, f"{name}.weight")
        if out is None:
            return []
        node = out.node
        assert node is not None
        read = node.inputs[0] if node.op.kind == "product" else None

        def before(m: Any, operands: tuple[Any, ...]) -> Any:
            return None if read is None else (self._ours(read, operands[0], f"into {name}"), *operands[1:])

        def after(m: Any, operands: tuple[Any, ...], result: Any) -> Any:
            return self._ours(out, result, f"out of {name}")

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _ours(self, v: Value, theirs: Any, what: str) -> Any:
        x, y = self.run.values[v], theirs.numpy()
        if not isinstance(x, np.ndarray):
            return theirs
        y, turned = aligned(x, y)
        if x.shape != y.shape:
            return theirs
        if v.node is not None and v not in self.cut:
            d = difference(v, v.name, x, y, once(x, v), note="")
            if d.differs:
                part, read = fragment("part", slice_to([v], self.cut), [v], self.run.sizes)
                d = difference(v, v.name, x, y, bounds_of(part, self.run.given(read), self.run.params, self.run.sizes)[0])
            self.found.append(_named(d, what))
            self.cut.add(v)
        return self.torch.from_numpy(np.array(x.swapaxes(1, 2) if turned else x))


def aligned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, bool]:
    """``y`` as ours has it, [b, s, heads, d], if it comes as [b, heads, s, d], and whether it did. Where there are as many
    tokens as heads both shapes are the same: it is what is nearer."""
    if y.ndim != 4 or (other := y.swapaxes(1, 2)).shape != x.shape:
        return y, False
    turned = x.shape != y.shape or np.abs(other - x).sum() < np.abs(y - x).sum()
    return (other, True) if turned else (y, False)


def _named(d: Difference, what: str) -> Difference:
    return replace(d, op=f"{d.op} ({what})")


def _made_with(graph: Graph, param: str) -> Value | None:
    """What is made of data with a parameter: a product, rows of a table, a norm's last factor."""
    v = graph.params[param]
    while True:
        users = v.users
        if len(users) != 1 or len(users[0].outputs) != 1:
            return None
        node, before, v = users[0], v, users[0].output
        if any(w is not before and w.param is None and w.const is None for w in node.inputs):
            return v
