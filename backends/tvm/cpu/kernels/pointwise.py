"""Several pointwise operations over tensors of one shape as one pass over memory, some results over operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from .emit import Expr, Kernel, load, splat, symbol

POINTWISE: dict[str, Callable[..., Expr]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "sqrt": tirx.sqrt, "neg": lambda a: splat(0.0, 1) - a, "select": tirx.Select,
}  # fmt: skip
"""Operations over f32 that are known here, by name; ``select`` takes a condition first."""


@dataclass(frozen=True)
class Pointwise:
    """``scalars[i]``: whether operand i is one number, else it is a tensor f32 of ``rank`` axes; all these have one shape.

    ``steps``: operations and their operands, each the number of a value (operands come first, then the steps' results) or a
    literal. ``results``: the numbers of the values that are stored, and the operand over which each is (None: a tensor of
    its own). ``conditions``: scalars that are bool and not f32.
    """

    rank: int
    scalars: tuple[bool, ...]
    conditions: frozenset[int]
    steps: tuple[tuple[str, tuple[int | float, ...]], ...]
    results: tuple[tuple[int, int | None], ...]
    threads: int = 1

    @property
    def name(self) -> str:
        return f"pointwise_{len(self.steps)}_{self.rank}d"


def pointwise(desc: Pointwise) -> tirx.PrimFunc:
    """PrimFunc(the operands, the results that are not over operands); sizes are known when it runs: one code for all."""
    kernel = Kernel(desc.name)
    shape = [symbol(f"n{i}") for i in range(desc.rank)]
    operands = [
        kernel.param(f"x{i}", () if scalar else shape, "bool" if i in desc.conditions else "float32")
        for i, scalar in enumerate(desc.scalars)
    ]
    made = [operands[over] if over is not None else kernel.param(f"y{i}", shape, "float32")
            for i, (_, over) in enumerate(desc.results)]  # fmt: skip
    sources = [x if scalar else kernel.flat(x) for x, scalar in zip(operands, desc.scalars)]
    targets = [kernel.flat(y) for y in made]

    def element(at: Expr) -> None:
        values = [kernel.let(load(x, () if scalar else at)) for x, scalar in zip(sources, desc.scalars)]
        for name, numbers in desc.steps:
            args = [values[n] if isinstance(n, int) else splat(n, 1) for n in numbers]
            values.append(kernel.let(POINTWISE[name](*args)))
        for y, (number, _) in zip(targets, desc.results):
            kernel.store(y, at, values[number])

    total: Expr = 1
    for n in shape:
        total = total * n
    kernel.rows(desc.threads, total, len(desc.steps), element)
    return kernel.build()
