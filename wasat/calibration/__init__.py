"""Weights in fewer bits, chosen and scaled by what a text shows: which features of a layer's input are large, and what its
errors do to the next token's distribution.

    small, report = ws.quantize(ws.from_pretrained("folder"), text, bits=5)
    print(report)
    ws.compile(small, "model.wasat")
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wasat.driver import Progress, quiet
from wasat.ir import Program, QArray, TensorType, WasatError, evaluate_dim
from wasat.passes import Equalize
from wasat.passes.serving.quantize import f16_holds_scales
from wasat.passes.serving.recipes import AS_THEY_ARE, SCHEMES, Formats, Storage, is_scheme, storage
from wasat.quality import bits as bits_of_program
from wasat.quality import quality, text_ids, windows_of

from . import budget
from .bench import Bench, Windows
from .budget import Choice
from .compensate import Compensation, compensates
from .report import Report, Stored
from .weights import DENSE, Weight, prepared, stored, weights_of

__all__ = ["AUTO", "Report", "quantize"]

AUTO = "auto"
LEAST_TOKENS, LEAST_HELD_OUT = 128, 32
"""What a text must have, to calibrate with and to judge by."""
_OUTSIDE = "f16 does not hold the scale of a block"
_MOMENTS = 1 << 30
"""Bytes of products of features that are held at once; where that is not enough, the text is read again."""
_SIZED = 256
"""Tokens over which the sizes of features are measured."""
_MIDDLE = "s5"
"""The scheme whose rounding is measured for :class:`Equalize` where each weight gets its own later."""
_PROBED = 256
"""Positions over which it is measured what each weight's errors do."""


@dataclass(frozen=True)
class _Texts:
    calibration: Windows
    held_out: Windows


def quantize(
    program: Program, text: str, *, bits: float | None = None, recipe: str = AUTO, held_out: str | None = None,
    tokens: int = 4096, window: int = 256, target: str = "cpu", threads: int | None = None, progress: Progress = quiet,
) -> tuple[Program, Report]:  # fmt: skip
    """A copy of ``program`` whose weights are stored in fewer bits, calibrated on ``text``; and what that costs.

    Features are made one size first, where that lessens what rounding costs over the text (:class:`wasat.passes.Equalize`).
    Codes of what linear layers read make up for each other's errors (:mod:`.compensate`), and errors are weighted by what each
    feature is over the text, at most ``tokens`` of it, read in windows of ``window`` that do not see each other.
    ``recipe``: ``"auto"`` gives each weight the scheme (``s4``, ``s5``, ``s6``, ``int8``) that its measured effect on the next
    token's distribution deserves, all parameters together having at most ``bits`` (default 5) a weight, scales and what stays
    f32 included; or any other scheme of ``compile``, for all weights.
    The report compares with the program in f32 on ``held_out``, by default the last quarter of ``text``. ``target``: whose
    kernels must read the weights. A model that sees or hears is calibrated on text: what no text passes is stored as int8.

    The result is compiled without ``quantize``. The same arguments give the same bits. Weights that are quantized already are
    taken as the numbers that they stand for.
    Raises WasatError for a program that takes no text or gives no logits, one without a tokenizer or without weights to store,
    a text that is too short, an unknown recipe, and ``bits`` that are out of reach (naming the least).
    """
    from wasat.backends.tvm.targets import target_named

    if recipe != AUTO and (not is_scheme(recipe) or recipe in ("f16", "bf16", "f32")):
        known = ", ".join(s for s in SCHEMES if s not in ("f16", "bf16", "f32"))
        raise WasatError(f"there is no recipe {recipe!r} to calibrate; there are {AUTO}, {known}")
    if recipe != AUTO and bits is not None:
        raise WasatError(f"bits are for the recipe {AUTO}: {recipe} says itself what a weight takes")
    if bits is not None and not (0 < bits <= 32):
        raise WasatError(f"{bits} bits a weight is not between 0 and 32")
    if window < 2 or tokens < LEAST_TOKENS:
        raise WasatError(f"windows have at least 2 tokens, and calibration {LEAST_TOKENS}; not {window} and {tokens}")
    texts = _split(program, text, held_out, tokens, window)
    formats = target_named(target).formats
    notes: list[str] = []
    base = prepared(program, _equalize(program, texts.calibration, recipe, formats), notes)
    weights, left = weights_of(base)
    if not any(w.in_forward for w in weights):
        raise WasatError("the program has no weights to store in fewer bits: parameters that linear layers and embeddings read")
    work = _Work(base, weights, formats, texts, left, progress)
    limit = work.limit(5.0 if bits is None else bits) if recipe == AUTO else 0  # before the long work
    work.observe(threads)
    taken, shares = work.automatic(limit) if recipe == AUTO else (work.fixed(recipe), {})
    made, report = work.finish(taken, shares, recipe, bits)
    return made, replace(report, equalized=tuple(notes))


def _equalize(program: Program, windows: Windows, recipe: str, formats: Formats) -> Equalize | None:
    """Features of one size, for rounding that the weights were not made for; rows are going to be int8, as by default."""
    if recipe in (AS_THEY_ARE, program.origin.rounded):
        return None
    text = tuple(int(i) for ids in windows for i in ids)[:_SIZED]
    return Equalize(text=text, scheme=_MIDDLE if recipe == AUTO else recipe, formats=formats)


def _split(program: Program, text: str, held_out: str | None, tokens: int, window: int) -> _Texts:
    ids = text_ids(program, text)
    if held_out is None:
        first = len(ids) - max(len(ids) // 4, LEAST_HELD_OUT)
        ids, rest = ids[: max(first, 0)], ids[max(first, 0) :]
    else:
        rest = text_ids(program, held_out)
        if len(rest) < LEAST_HELD_OUT:
            raise WasatError(f"the held-out text is {len(rest)} tokens; at least {LEAST_HELD_OUT} are needed")
    if len(ids) < LEAST_TOKENS:
        kept = "" if held_out is not None else f", {len(rest)} of them being held out"
        raise WasatError(f"the text is {len(ids) + len(rest) * (held_out is None)} tokens{kept}: {LEAST_TOKENS} are needed")
    return _Texts(windows_of(ids[:tokens], window), windows_of(rest[: max(tokens // 4, LEAST_HELD_OUT)], window))


def _groups(weights: Sequence[Weight]) -> dict[tuple[str, str], list[str]]:
    """Weights whose errors are measured together: by layer and by kind; or each for itself, where that is less work."""
    found: dict[tuple[str, str], list[str]] = {}
    for w in weights:
        if w.layer == w.name:
            found.setdefault(("weight", w.name), []).append(w.name)
        else:
            found.setdefault(("layer", w.layer), []).append(w.name)
            found.setdefault(("kind", w.kind), []).append(w.name)
    return found if len(found) < len(weights) else {("weight", w.name): [w.name] for w in weights}


def _parts(weights: Sequence[Weight], measured: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """What each weight does, so that those of a kind do together what was measured, shared out as their layers'."""
    found = {}
    for w in weights:
        alone = measured.get(("weight", w.name))
        if alone is None:
            same = sum(measured["layer", o.layer] for o in weights if o.kind == w.kind)
            alone = measured["kind", w.kind] * measured["layer", w.layer] / same if same else 0.0
        found[w.name] = alone
    return found


class _Work:
    """One calibration, step by step."""

    def __init__(
        self, base: Program, weights: Sequence[Weight], formats: Formats, texts: _Texts, left: dict[str, str],
        progress: Progress,
    ) -> None:  # fmt: skip
        self.base, self.weights, self.formats, self.texts, self.progress = base, weights, formats, texts, progress
        self.left = dict(left)
        self.importance: dict[str, NDArray[np.float32]] = {}
        sources = [p.type for p in base.params.values() if isinstance(p.type, TensorType)]
        self.count = sum(math.prod(evaluate_dim(d, {}) for d in t.shape) for t in sources)
        """Numbers in all parameters."""
        self.options: dict[str, list[Storage]] = {}
        """The schemes that suit each weight."""

    def limit(self, bits: float) -> int:
        """How many bits all weights may take, of so many for each number of the program. Raises WasatError for too few."""
        for i, w in enumerate(self.weights):
            self.progress("looking at weights", i, len(self.weights))
            suited = budget.storages(w, self.formats)
            found = [s for s in suited if self._held(w, s)]
            if found:
                self.options[w.name] = found if w.in_forward else found[-1:]  # the best: nobody knows what its errors do
            else:
                self.left[w.name] = _OUTSIDE if suited else f"no scheme with kernels suits rows of {w.shape[-1]}"
        rest = bits_of_program(self.base) - sum(32 * w.size for w in self.weights if w.name in self.options)
        least = rest + sum(self._bits(w, self.options[w.name][0]) for w in self.weights if w.name in self.options)
        if least > math.floor(bits * self.count):
            up = math.ceil(1000 * least / self.count) / 1000
            raise WasatError(
                f"{bits:g} bits a weight is out of reach for this model: the least, scales and norms included, is {up:g}"
            )
        return math.floor(bits * self.count) - rest

    def observe(self, threads: int | None) -> None:
        """Compiles the model, and reads the text with it."""
        self.progress("compiling")
        self.bench = Bench(self.base, self.weights, threads)
        self.importance = self.bench.importance(self.texts.calibration, self._tell("reading the text"))

    def automatic(self, limit: int) -> tuple[dict[str, Storage], dict[str, float]]:
        """A scheme for each weight, together of at most ``limit`` bits, and what each is expected to cost."""
        taken = budget.chosen(self.costs(), limit, self._together())
        return {name: c.storage for name, c in taken.items()}, {name: c.cost for name, c in taken.items()}

    def _together(self) -> list[list[str]]:
        """Weights that read the same, as a layer's q, k and v: in one scheme they are merged into one product."""
        found: dict[object, list[str]] = {}
        for w in self.weights:
            if w.name in self.options and (reads := self.bench.reads(w.name)):
                found.setdefault((reads, w.operations, tuple(self.options[w.name])), []).append(w.name)
        return list(found.values())

    def costs(self) -> dict[str, list[Choice]]:
        """For each weight the schemes that suit it, with what each does to the next token's distribution."""
        found = {}
        for i, w in enumerate(w for w in self.weights if w.name in self.options):
            self.progress("trying schemes", i, len(self.options))
            errors = budget.errors(self._load(w.name), self.options[w.name], self.importance.get(w.name))
            found[w.name] = [Choice(s, self._bits(w, s), e) for s, e in zip(self.options[w.name], errors)]
        return self._measured(found)

    def fixed(self, recipe: str) -> dict[str, Storage]:
        """What a recipe or a scheme says about each weight."""
        found = {}
        for w in self.weights:
            s = storage(recipe, w.role, w.shape[-1], 32, self.formats, w.operations)
            if isinstance(s, str):
                self.left[w.name] = s
            elif not self._held(w, s):
                self.left[w.name] = _OUTSIDE
            else:
                found[w.name] = s
        return found

    def _measured(self, choices: Mapping[str, Sequence[Choice]]) -> dict[str, list[Choice]]:
        """The choices with what each does to the next token's distribution.

        It is measured for the smallest scheme of the weights of each layer, and of each kind (all layers' ``q_proj``),
        together: a weight's part is the product of its layer's and its kind's. Where these are no fewer than weights, for each
        weight. In other schemes it is in proportion to the squared error: divergence is quadratic in small errors.
        """
        every = self.texts.calibration
        count = min(len(every), max(1, _PROBED // len(every[0])))
        windows = [every[i * len(every) // count] for i in range(count)]
        base = list(self.bench.log_probabilities(windows))
        read = [w for w in self.weights if w.name in choices and w.in_forward]
        least = {name: options[0].storage for name, options in choices.items()}
        small = {w.name: budget.coded(self._load(w.name), least[w.name], self.importance.get(w.name)) for w in read}
        groups = _groups(read)
        measured: dict[tuple[str, str], float] = {}
        tell = self._tell("measuring")
        for i, (group, names) in enumerate(groups.items()):
            tell(i, len(groups))
            for name in names:
                self.bench.set(name, small[name].dense())
            measured[group] = max(self.bench.kl(base, windows), 0.0)
            for name in names:
                self.bench.set(name, self._load(name))
        part = _parts(read, measured)
        found = {}
        for name, options in choices.items():
            scale = part.get(name, 0.0) / options[0].cost if options[0].cost else 0.0
            found[name] = [Choice(c.storage, c.bits, c.cost * scale) for c in options]
        return found

    def finish(
        self, taken: Mapping[str, Storage], shares: Mapping[str, float], recipe: str, bits: float | None
    ) -> tuple[Program, Report]:
        """The program with these schemes, and the report on it."""
        base = list(self.bench.log_probabilities(self.texts.held_out))
        arrays, off = self._coded(taken)
        rows, total = [], sum(shares.values())
        for w in (w for w in self.weights if w.name in taken):
            q = arrays[w.name]
            share = shares[w.name] / total if total and w.in_forward else None
            each = self._bits(w, taken[w.name]) / w.size
            name, layer = w.name.removesuffix(DENSE), w.layer.removesuffix(DENSE)
            rows.append(Stored(name, layer, str(q.type), w.size, each, w.in_forward, off[w.name], share))
            if w.in_forward:
                self.bench.set(w.name, q.dense())
        tell = self._tell("reading the held-out text")
        found = quality(
            base, self.bench.log_probabilities(self.texts.held_out), self.texts.held_out,
            lambda done: tell(done, len(self.texts.held_out)),
        )  # fmt: skip
        small = stored(self.base, arrays)
        reasons = {name.removesuffix(DENSE): why for name, why in self.left.items()}
        read = sum(map(len, self.texts.calibration))
        return small, Report(recipe, bits, bits_of_program(small) / self.count, self.count, read, found, tuple(rows), reasons)

    def _coded(self, taken: Mapping[str, Storage]) -> tuple[dict[str, QArray], dict[str, float]]:
        """The weights in these schemes, what linear layers read compensated, the rest with searched scales; and how much the
        results of each are off."""
        arrays: dict[str, QArray] = {}
        off: dict[str, float] = {}
        for batch in self._batches([w for w in self.weights if w.name in taken]):
            types = {w.name: budget.type_of(taken[w.name], w.shape) for w in batch}
            fit = {name for name, t in types.items() if self.bench.reads(name) and compensates(t)}
            moments = self.bench.moments(fit, self.texts.calibration, self._tell("reading the text"))
            made: dict[tuple[str, ...], Compensation] = {}
            for w in batch:
                self.progress("quantizing", len(arrays), len(taken))
                x, key = self._load(w.name), self.bench.reads(w.name)
                if w.name in fit and key not in made:
                    made = {key: Compensation(moments[w.name])}  # those that read the same follow each other
                if w.name in fit:
                    arrays[w.name] = made[key](x, types[w.name])
                    off[w.name] = made[key].off(x, arrays[w.name].dense())
                else:
                    importance = self.importance.get(w.name)
                    arrays[w.name] = budget.coded(x, taken[w.name], importance)
                    size = budget.error(np.zeros_like(x), x, importance)
                    off[w.name] = math.sqrt(budget.error(x, arrays[w.name].dense(), importance) / size) if size else 0.0
        return arrays, off

    def _batches(self, weights: Sequence[Weight]) -> Iterator[list[Weight]]:
        """Weights whose moments are held together: those that read the same, and as many as fit into :data:`_MOMENTS`."""
        batch: list[Weight] = []
        held: dict[tuple[str, ...], int] = {}
        for w in weights:
            key = self.bench.reads(w.name)
            if key and key not in held and sum(held.values()) + 8 * w.shape[-1] ** 2 > _MOMENTS:
                yield batch
                batch, held = [], {}
            if key:
                held[key] = 8 * w.shape[-1] ** 2
            batch.append(w)
        yield batch

    def _bits(self, w: Weight, s: Storage) -> int:
        return budget.bits_of(budget.type_of(s, w.shape))

    def _held(self, w: Weight, s: Storage) -> bool:
        """Whether f16 holds the scales of a weight in a scheme."""
        return f16_holds_scales(self._load(w.name), budget.type_of(s, w.shape))

    def _load(self, name: str) -> NDArray[Any]:
        x = self.base.load(name)
        assert isinstance(x, np.ndarray)
        return x

    def _tell(self, stage: str) -> Any:
        return lambda done, total: self.progress(stage, done, total)
