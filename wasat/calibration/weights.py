"""The weights of a program that can be stored in few bits, each a parameter of its own, and the program that reads them so."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from wasat.ir import Builder, Graph, Node, Program, QArray, TensorType, Value
from wasat.ir.graph import ArrayParam
from wasat.passes import Equalize, FuseGlu, HoistParams, MergeLinears, PassManager, TokenInputs, default_pipeline
from wasat.passes.cleanup.hoist_params import param_only
from wasat.passes.serving.recipes import role_of
from wasat.passes.serving.token_inputs import is_exported
from wasat.quality import DENSE, dense

FORWARD = "forward"
_SCALED = "|mul"
"""What :class:`HoistParams` adds to the name of a parameter that is multiplied with a constant."""
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Weight:
    """A parameter that linear layers and embeddings read, and nothing else."""

    name: str
    type: TensorType
    role: str
    """What it is for: :func:`wasat.passes.serving.recipes.role_of`."""
    operations: tuple[str, ...]
    """What reads it."""
    in_forward: bool
    """Whether a text passes it."""

    @property
    def layer(self) -> str:
        """Its name up to the first number, which the weights of a layer share; without a number its whole name."""
        found = _NUMBER.search(self.name)
        return self.name[: found.end()] if found else self.name

    @property
    def kind(self) -> str:
        """Its name without numbers, which it shares with those of other layers."""
        return _NUMBER.sub("*", self.name)

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.concrete({})


def prepared(program: Program, equalize: Equalize | None = None, notes: list[str] | None = None) -> Program:
    """A copy after the passes that come before weights are stored in fewer bits, with its weights in f32, each apart, and under
    the names that they had; features of one size, where ``equalize`` finds that it pays, what it remarks going to ``notes``."""
    p = dense(program)
    passes = [x for x in default_pipeline(kv_cache=None) if not isinstance(x, (MergeLinears, FuseGlu))]
    if FORWARD in p.graphs and any(is_exported(v) for v in p[FORWARD].inputs):
        passes.insert(0, TokenInputs(required=True))
    PassManager(passes).run(p)
    before = set(p.params)
    step = None if equalize is None else PassManager([equalize]).run(p).steps[0]
    if step is not None and notes is not None:
        notes += dict.fromkeys(r.message for r in step.remarks)
    if step is not None and step.modified:
        PassManager([HoistParams()]).run(p)
        for name in [n for n in p.params if n not in before]:
            old = name.removesuffix(_SCALED)
            if old in before and old not in p.params:
                _rename(p, name, old)
    return p


def _rename(program: Program, name: str, new: str) -> None:
    program.params[new] = program.params.pop(name)
    for g in program.graphs.values():
        if name in g.params:
            g.params[name].param = new
            g.params = {new if n == name else n: v for n, v in g.params.items()}


def weights_of(program: Program) -> tuple[list[Weight], dict[str, str]]:
    """The weights of what :func:`prepared` made, in the order in which they are read; and, by name, why a large one stays."""
    found: dict[str, Weight] = {}
    left: dict[str, str] = {}
    for g in sorted(program.graphs.values(), key=lambda g: g.name != FORWARD):
        only = param_only(g)
        for node in g.nodes:
            for w in node.inputs:
                if w.param is not None and w.param not in found and w in only and (reading := _reading(w)):
                    others = [u.op.name for u in w.users if u not in reading]
                    if others or not isinstance(w.type, TensorType):
                        left[w.param] = f"{', '.join(others)} reads it, too" if others else f"it is {w.type}"
                        continue
                    operations = tuple(dict.fromkeys(u.op.name for u in reading))
                    found[w.param] = Weight(w.param, w.type, role_of(w, only), operations, g.name == FORWARD)
    return list(found.values()), left


def _reading(w: Value) -> list[Node]:
    """The nodes that would read ``w`` in fewer bits."""
    return [u for u in w.users if u.op.quantized is not None and u.op.weight is not None and u.inputs[u.op.weight] is w]


def inputs_of(graph: Graph, name: str) -> list[Value]:
    """What linear layers multiply the weight ``name`` with, x [.., k]; none for one that is only looked up."""
    users = graph.params[name].users if name in graph.params else []
    return list(dict.fromkeys(u.inputs[0] for u in users if u.op.kind == "product"))


def stored(program: Program, arrays: Mapping[str, QArray]) -> Program:
    """A copy that reads ``arrays`` for the parameters of these names; what was dequantized for it has its old name again."""
    out = program.copy()
    for g in out.graphs.values():
        first = g.first
        for name in [n for n in g.params if n in arrays]:
            wide = g.params.pop(name)
            g.rename(wide, f"{wide.name}|wide")
            new = g.add_param(name.removesuffix(DENSE), arrays[name].type)
            b = Builder(g, before=first)
            g.replace_uses(wide, b.dequantize(new, dtype=wide.tensor.dtype))
    for name, x in arrays.items():
        del out.params[name]
        out.params[name.removesuffix(DENSE)] = ArrayParam(x, x.type)
    out.verify()
    return out
