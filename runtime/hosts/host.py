"""Runs the entries of a plan on a device: sizes from the arrays that are given, launches recorded once for the same arrays."""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import AGAIN, ArtifactError, InputError
from .elements import loaded, padded
from .machine import Choice, Command, Dispatch, Machine, Move, Piece
from .memory import DeviceBuffer, Memory
from .plan import Plan, value

_RECORDINGS = 2
"""How many are kept of an entry, with the memory that they name: a session's decode is one."""


@dataclass(frozen=True)
class _Recording:
    commands: Any
    outputs: list[tuple[Piece, str, tuple[int, ...]]]
    args: tuple[DeviceBuffer, ...]
    """Whose memory the commands name: kept as long."""


class Host:
    """The entries of a plan, on a machine."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self.plan, self.machine = plan, machine
        self.memory = Memory(machine, plan.storage)
        self._kernels: dict[str, Any] = {}
        self._constants: dict[int, Piece] = {}
        self._scratch: list[Piece] = []
        """Shared by all entries, of which one runs at a time."""
        self._recorded: dict[str, dict[Any, _Recording]] = {}
        self._lock = threading.Lock()

    def upload(self, weights: Mapping[str, tuple[str, np.ndarray]]) -> dict[str, DeviceBuffer]:
        """Weights, on the device. Raises ArtifactError where it has no room for one."""
        try:
            return {name: self.memory.buffer_of(x, dtype, f"weight {name}") for name, (dtype, x) in weights.items()}
        except (MemoryError, InputError) as e:
            raise ArtifactError(f"the weights cannot be put on {self.machine.name}: {e}") from None

    def function(self, entry: str) -> Callable[..., list[np.ndarray]]:
        """Calls ``entry`` with buffers: inputs, states, weights; returns its outputs. States are left in their place."""
        recorded = self._recorded.setdefault(entry, {})

        def call(*args: DeviceBuffer) -> list[np.ndarray]:
            key = tuple((id(a.piece.memory), a.piece.at, a.shape) for a in args)
            with self._lock:
                if key not in recorded:
                    while len(recorded) >= _RECORDINGS:
                        recorded.pop(next(iter(recorded)))
                    try:
                        recorded[key] = self._record(entry, args)
                    except MemoryError as e:
                        raise InputError(f"{entry}: there is no memory for what it computes: {e}") from None
                    except InputError:
                        raise
                    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as e:
                        what = f"the plan of {entry} is damaged ({type(e).__name__}: {e})"
                        raise ArtifactError(f"{what}; copy the artifact again, or {AGAIN}") from None
                else:
                    recorded[key] = recorded.pop(key)  # the last one used is the last to go
                r = recorded[key]
                found = self.machine.run(r.commands, [piece for piece, _, _ in r.outputs])
            return [loaded(x, dtype, shape, self.plan.storage) for x, (_, dtype, shape) in zip(found, r.outputs)]

        return call

    def _record(self, entry: str, args: Sequence[DeviceBuffer]) -> _Recording:
        e = self.plan.entries[entry]
        symbols = {s["name"]: args[s["array"]].shape[s["axis"]] for s in e["symbols"]}
        pieces: list[Piece] = []
        taken = 0
        for i, a in enumerate(e["arrays"]):
            nbytes = max(value(a["bytes"], symbols), 4)
            if a["kind"] == "scratch":
                pieces.append(self._shared(taken, nbytes))
                taken += 1
            elif a["kind"] == "constant":
                pieces.append(self._constant(a["number"]))
            else:
                want = tuple(value(d, symbols) for d in a["shape"])
                if (have := args[i].shape) != want:
                    raise InputError(f"{entry}: {a['name']} has shape {list(have)}; beside the others it must be {list(want)}")
                pieces.append(args[i].piece.part(0, padded(nbytes)))
        commands = _Commands(self, entry, pieces).of(e["steps"], symbols)
        outputs = []
        for o in e["outputs"]:
            piece = pieces[o["array"]].part(0, padded(value(o["bytes"], symbols)))
            shape = tuple(value(d, symbols) for d in o["shape"])
            if self.memory.itemsize(o["dtype"]) * math.prod(shape) > piece.nbytes:
                raise LookupError(f"{o['name']} of {piece.nbytes} bytes cannot be {o['dtype']}{list(shape)}")
            outputs.append((piece, o["dtype"], shape))
        return _Recording(self.machine.record(commands), outputs, tuple(args))

    def _shared(self, number: int, nbytes: int) -> Piece:
        if number == len(self._scratch):
            self._scratch.append(self.machine.allocate(nbytes))
        elif self._scratch[number].nbytes < nbytes:
            self._scratch[number] = self.machine.allocate(nbytes)
        return self._scratch[number].part(0, nbytes)

    def _constant(self, number: int) -> Piece:
        if number not in self._constants:
            c = self.plan.constants[number]
            raw = np.frombuffer(base64.b64decode(c["data"]), "uint16" if c["dtype"] == "bfloat16" else c["dtype"])
            self._constants[number] = self.memory.buffer_of(raw, c["dtype"], "a constant").piece
        return self._constants[number]

    def kernel(self, name: str) -> Any:
        """The kernel, compiled at its first use."""
        if name not in self._kernels:
            self._kernels[name] = self.machine.kernel(self.plan.kernels[name])
        return self._kernels[name]


class _Commands:
    """Steps under values of symbols, loops written out."""

    def __init__(self, host: Host, entry: str, pieces: Sequence[Piece]) -> None:
        self.host, self.entry, self.pieces = host, entry, pieces

    def of(self, steps: Sequence[Mapping[str, Any]], symbols: Mapping[str, int]) -> list[Command]:
        found: list[Command] = []
        for s in steps:
            match s["op"]:
                case "launch":
                    self._launch(s, symbols, found)
                case "copy":
                    if nbytes := value(s["bytes"], symbols):
                        found.append(Move(self.pieces[s["from"]], self.pieces[s["to"]], nbytes))
                case "check":
                    left, right = value(s["left"], symbols), value(s["right"], symbols)
                    if left != right:
                        raise InputError(f"{s['where']}: needs {s['needs']}, and these are {left} and {right}")
                case "loop":
                    for turn in range(value(s["count"], symbols)):
                        found += self.of(s["steps"], {**symbols, s["symbol"]: turn})
                case "if":
                    found.append(self._choice(s, symbols))
                case other:
                    raise ArtifactError(f"the plan has a step {other!r} that this runtime does not know; {AGAIN}")
        return found

    def _launch(self, s: Mapping[str, Any], symbols: Mapping[str, int], found: list[Command]) -> None:
        x, y, z = (value(d, symbols) for d in s["grid"])
        if min(x, y, z) <= 0:
            return
        spec = self.host.plan.kernels[s["kernel"]]
        scalars = tuple(value(d, symbols) for d in s["scalars"])
        for n, dtype in zip((*scalars, x), (*spec.scalars, "int32")):
            if abs(n) > (most := np.iinfo(dtype).max):
                raise InputError(f"{self.entry}: a size is {n}; this device counts to {most}: give it less at a time")
        pieces = tuple(self.pieces[i] for i in s["arrays"])
        if (len(pieces), len(scalars)) != (len(spec.writes), len(spec.scalars)):  # a driver would read on behind them
            raise LookupError(f"{s['kernel']} is given {len(pieces)} arrays and {len(scalars)} numbers, and takes others")
        found.append(Dispatch(self.host.kernel(s["kernel"]), spec, (x, y, z), pieces, scalars))

    def _choice(self, s: Mapping[str, Any], symbols: Mapping[str, int]) -> Choice:
        return Choice(self.pieces[s["condition"]].part(0, 4), *(self.of(s[k], symbols) for k in ("then", "otherwise")))

