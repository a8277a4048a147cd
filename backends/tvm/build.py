"""Relax module to library: TVM's pipeline for the target, and a runner for use in the compiling process."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from wasat.ir import Array, Dim, DType, Graph, IRError, Node, Program, WasatError, evaluate_dim
from wasat.ir.dims import Func
from wasat.ir.evaluate import as_array, bind_symbols, hold_checks

from .layouts import Begin, Layout
from .lower import Kernels, Left, WeightPlan, lower_program, selected
from .machine_code import MachineCode, compile_module
from .ops.cond import EQUAL, hold_equal
from .ops.indices import OUTSIDE, Given, given, outside
from .ops.low_precision import carried, uncarried
from .plan.fits import check_integers
from .plan.write import Plan, Signature, make_plan
from .targets import Target


class BuildError(WasatError):
    """The target's tools refuse: no C compiler, an unknown CPU, a failed link."""


@dataclass
class Library:
    """A compiled program before it is written: its code and the weights it wants."""

    code: MachineCode
    plan: WeightPlan
    target: Target
    left: list[Left] = field(default_factory=list)
    """What the target's kernels left to others."""

    def export(self, path: Path) -> None:
        """Links the shared library at ``path``."""
        self.code.link(path.absolute())


@dataclass
class Planned:
    """A program compiled to a launch plan before it is written, and the weights it wants."""

    launches: Plan
    plan: WeightPlan
    target: Target
    left: list[Left] = field(default_factory=list)
    """What the target's kernels left to others."""

    @functools.cached_property
    def code(self) -> bytes:
        """The kernels, as a host gives them to a driver."""
        return self.target.compiled(self.launches.source)

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """What stands for the library in an artifact: a name, and what writes the file."""
        names = {"wgsl": "kernels.wgsl", "opencl": "kernels.cl", "cuda": "kernels.fatbin"}
        assert self.target.device is not None
        held = {"plan.json": self.launches.text().encode("ascii"), names[self.target.device.language]: self.code}
        return {name: functools.partial(Path.write_bytes, data=data) for name, data in held.items()}


def plan(program: Program, target: Target, on_progress: Callable[[str], None] = lambda what: None) -> Planned:
    """The launch plan of ``program`` for a target whose programs are such.

    Raises IRError for an operation or an element type that the target can neither run nor decompose.
    """
    assert target.device is not None
    on_progress("lowering")
    kernels, left = Kernels(), list[Left]()
    module, weights = _lowered(program, target, left, kernels)
    states = program.interface.state_names
    signatures = {}
    for g in program.graphs.values():
        inputs = [v.name for v in g.inputs]
        given: list[tuple[Any, str]] = [("input", n) for n in inputs if n not in states]
        given += [("state", n) for n in states if n in inputs]
        given += [("weight", a.name) for a in weights.of(g.name)]
        names = list(g.output_names)
        signatures[g.name] = Signature(given, [*(n for n in names if n not in states), *(n for n in names if n in states)])
    check_integers(kernels.nodes, target.device)
    on_progress("generating code")
    return Planned(make_plan(module, signatures, target.tvm, target.device, kernels.nodes), weights, target, left)


def _select(program: Program, target: Target, left: list[Left]) -> Callable[..., None]:
    """Puts the target's kernels into a graph, ``inner`` where it is a body; ``left`` receives what they leave to others."""
    select = target.kernels(target, program)

    def put(graph: Graph, inner: bool = False) -> None:
        found = list(select(graph) or ())
        said = {(x.loc, x.why.partition(" ")[0]) for x in found}
        left.extend([*found, *_not_packed(graph, inner, said)])

    return put


def left_by(program: Program, target: Target) -> list[Left]:
    """What no kernel of ``target`` takes, and why, without generating code."""
    left: list[Left] = []
    put = _select(program, target, left)
    selected(program, target.table(), put, target.on_host, functools.partial(put, inner=True))
    return left


def _lowered(program: Program, target: Target, left: list[Left], kernels: Kernels | None = None) -> tuple[Any, WeightPlan]:
    """The lowered module and the weights that it reads; ``left`` receives what the target's kernels left to others."""
    put = _select(program, target, left)
    types, in_body = target.state_types(program), functools.partial(put, inner=True)
    module, plan = lower_program(program, target.table(), types, put, target.on_host, kernels, in_body)
    layouts = target.state_layouts(program)
    for s in program.interface.states:
        if isinstance(s.empty, str):
            begin = Begin(s.name, layouts[s.name])
            plan.layouts[s.empty, begin] = begin.arrays(s.empty, program.params[s.empty].type)
    return module, plan


def _not_packed(graph: Graph, inner: bool, said: Collection[tuple[Any, str]]) -> Iterator[Left]:
    """Products of weights in bodies that are left to no kernel: those that read a parameter turn by turn, and (of a graph that
    is a body: ``inner``) what no kernel took, if that is not ``said`` of its place and operation."""
    for node in graph.nodes:
        bodies = [body.graph for body in node.attrs.bodies]
        shift = len(node.inputs) - len(bodies[0].inputs) if bodies else 0
        for i, v in list(enumerate(node.inputs))[shift : node.attrs.shared]:
            readers = [n for body in bodies for n in body.inputs[i - shift].users if n.op.precision == "half"]
            if v.param is not None and len(v.shape) > 2 and readers:
                yield _left(graph, node, f"products in its bodies read {v.param} turn by turn, without packing or kernels")
        names = [v.param for v in node.inputs if v.param is not None and len(v.shape) > 1]
        if inner and names and node.op.precision == "half" and (node.loc, node.op.name) not in said:
            yield _left(graph, node, f"it reads {', '.join(names)} without packing or a kernel")


def _left(graph: Graph, node: Node, why: str) -> Left:
    return Left(graph.name, f"%{node.outputs[0].name} = {node.op.name}: {why}", node.loc)


def check_tools(target: Target) -> None:
    """Raises BuildError, before the long work, for what compiling for ``target`` will miss."""
    if missing := target.missing_tools():
        raise BuildError(f"compiling for {target.name} needs {'; and '.join(missing)}; install it and run again")


def build(
    program: Program, target: Target, on_progress: Callable[[str], None] = lambda what: None
) -> Library:
    """Compiles every graph of ``program`` for ``target``.

    Raises IRError for an operation the target can neither run nor decompose. What linking needs, :func:`check_tools` checks.
    """
    on_progress("lowering")
    left: list[Left] = []
    module, plan = _lowered(program, target, left)
    on_progress("generating code")
    return Library(compile_module(module, target, plan_memory=not _loosely_bounded(program)), plan, target, left)


_LOOSE = 4096
"""A size with a bound up to this may be allocated by the bound."""


def _loosely_bounded(program: Program) -> bool:
    """Whether there is a size such as min(10**9, n): TVM's memory planner would allocate the bound."""

    def loose(d: object) -> bool:
        if not isinstance(d, Dim):
            return False
        atoms = [a for monomial, _ in d.terms for a in monomial if isinstance(a, Func)]
        return any(
            (a.name in ("min", "mod") and any(isinstance(x, int) and x > _LOOSE for x in (a.lhs, a.rhs))) or loose(a.lhs)
            or loose(a.rhs) for a in atoms
        )  # fmt: skip

    return any(loose(d) for g in program.graphs.values() for v in g.values() for d in v.shape)


def run(program: Program, target: Target, graph: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Compiles ``program`` and runs one graph in this process: for tests, and for looking at numbers."""
    return Runner(program, target)(graph, inputs)


def fitting(g: Graph, inputs: Mapping[str, Any], indices: Sequence[Given]) -> dict[str, np.ndarray]:
    """The arrays of a graph's inputs. Raises IRError for sizes and ``indices`` that compiled code takes for granted, and that
    they do not hold to."""
    arrays = {v.name: np.asarray(as_array(v.name, inputs[v.name], v.type)) for v in g.inputs}
    dims = bind_symbols(g, arrays)
    for c in indices:
        low, high, x = evaluate_dim(c.low, dims), evaluate_dim(c.high, dims), arrays[c.input]
        if x.size and not (low <= int(x.min()) and int(x.max()) < high):
            first = next(i for i in map(int, x.ravel()) if not low <= i < high)
            raise IRError(f"{c.where}: index {first} of {c.input} is outside {low} .. {high - 1}")
    for node in g.nodes:
        hold_checks(node, dims)
    return arrays


class Runner:
    """A program compiled and loaded in this process, weights included."""

    def __init__(self, program: Program, target: Target, *, donate: bool = False) -> None:
        """``donate``: for a program that is called again and again. States that a call returned are given up to the next one,
        which may write its own over them: nothing is copied, nothing allocated anew. Arrays from elsewhere are copied in.
        What compiling took is given back to the system. Such states are of NumPy's own types, and lie as these do."""
        # TVM reads both when it first starts its threads: by itself it takes half of the CPUs, and pins the caller to one
        os.environ.setdefault("TVM_NUM_THREADS", str(target.threads))
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        if not target.arch.here or not target.on_host:
            raise BuildError(f"code for {target.name} ({target.arch}) does not run here: compile it into an artifact")
        if lacking := target.arch.hidden(target.tvm):
            raise BuildError(
                f"code for {target.name} ({target.config.get('mcpu')}) uses {', '.join(lacking)}, which this processor lacks: "
                "compile it into an artifact"
            )
        self.program, self.states, self.donate = program, program.interface.state_names, donate
        self.layouts = target.state_layouts(program)
        check_tools(target)
        library = build(program, target)
        for path in target.libraries:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        tvm_ffi.register_global_func(OUTSIDE, outside, override=True)
        tvm_ffi.register_global_func(EQUAL, hold_equal, override=True)
        self.vm = relax.VirtualMachine(_linked(library) if donate else library.code.in_process(), tvm.cpu())
        self._reads = library.plan.reads
        self._packed = {key: _packed(key, program.load) for key in library.plan.layouts}
        self.weights = self._ordered()
        self._given_indices = {name: given(g) for name, g in program.graphs.items()}
        self._given: dict[int, tuple[np.ndarray, Any]] = {}
        """Arrays of states that the last call returned, by id, and the tensors whose memory they are."""
        if donate:
            del library
            _give_back_memory()

    def set_weights(self, graph: str, load: Callable[[str], Array]) -> None:
        """Other numbers, of the same types, for all parameters that ``graph`` reads: ``load`` gives them by name."""
        self.weights[graph] = [x for key in self._reads.get(graph, ()) for x in _packed(key, load)]

    def set_parameter(self, name: str, x: Array) -> None:
        """Other numbers, of the same type, for one parameter in all graphs that read it."""
        for key in self._packed:
            if key[0] == name:
                self._packed[key] = _packed(key, lambda _: x)
        self.weights = self._ordered()

    def _ordered(self) -> dict[str, list[Any]]:
        """For each graph the tensors that it reads."""
        return {g: [x for key in self._reads.get(g, ()) for x in self._packed[key]] for g in self.program.graphs}

    def __call__(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs of ``graph`` by name, states among them."""
        g: Graph = self.program[graph]
        arrays = fitting(g, inputs, self._given_indices[graph])
        ordered = [v.name for v in g.inputs if v.name not in self.states] + [s for s in self.states if s in arrays]
        function = self.vm["".join(c if c.isalnum() or c == "_" else "_" for c in graph)]
        tensors = [self._tensor(n, arrays[n]) for n in ordered]
        try:
            out = function(*tensors, *self.weights[graph])
        except IndexError as e:
            raise IRError(str(e)) from None
        names = [n for n in g.output_names if n not in self.states] + [n for n in g.output_names if n in self.states]
        if self.donate and any(n in self.states for n in names):
            self._given.clear()
        types = dict(zip(g.output_names, g.outputs))
        return {n: self._array(n, x, types[n].tensor.dtype) for n, x in zip(names, out)}

    def _tensor(self, name: str, x: np.ndarray) -> Any:
        """What a compiled function takes for an input or a state."""
        if id(x) in self._given:
            return self._given[id(x)][1]
        laid_out = self.layouts[name].pack(x) if name in self.layouts else x
        return tvm.runtime.tensor(carried(np.asarray(laid_out, order="C")))

    def _array(self, name: str, tensor: Any, dtype: DType) -> np.ndarray:
        """A result; a state that will be donated is the tensor's own memory."""
        if self.donate and name in self.states:
            x = np.from_dlpack(tensor)
            self._given[id(x)] = x, tensor
            return x
        x = uncarried(tensor.numpy(), dtype)
        return self.layouts[name].unpack(x) if name in self.layouts else x


def _packed(key: tuple[str, Layout], load: Callable[[str], Array]) -> list[Any]:
    """The tensors that a parameter becomes in one layout."""
    return [tvm.runtime.tensor(array) for array in key[1].pack(load(key[0]))]


def _linked(library: Library) -> Any:
    """The library as a file that was loaded: unlike code made in place, it leaves nothing of the compiler in memory."""
    with tempfile.TemporaryDirectory() as folder:
        library.export(Path(folder) / "program.so")
        return tvm.runtime.load_module(f"{folder}/program.so")


def _give_back_memory() -> None:
    """glibc keeps what is freed between what is not, and large blocks are not made of it: it is told to return it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
