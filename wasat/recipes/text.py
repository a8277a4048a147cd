"""Training from a file: what ``wasat train`` reads, and what it makes of it."""

from __future__ import annotations

import difflib
import glob
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from wasat import nn
from wasat.backends.tvm.targets import target_named
from wasat.devices import train
from wasat.frontend import from_pretrained
from wasat.frontend.fields import Fields
from wasat.frontend.models.config import MOST_LAYERS, MOST_SIZE
from wasat.ir import Generation, IRError, Program, WasatError
from wasat.passes.training.round_weights import SCHEMES
from wasat.recipes.mixture import END
from wasat.runtime.tokenizer import refusals
from wasat.training.checkpoint import Checkpoints, replacing
from wasat.training.data import Batch, Packed, Source, TextFiles
from wasat.training.loop import Progress, Trained
from wasat.training.losses import add_loss, cross_entropy
from wasat.training.optimizers import SGD, Adafactor, AdamW, Constant, Cosine, Linear, Muon, Optimizer, OutOfRange, Schedule

if TYPE_CHECKING:
    from wasat.recipes.multimodal import Joint


MOST_PARAMETERS = 2**36
"""A decoder that is trained from the beginning has no more: they, and as many again twice, are in memory."""


class RecipeError(WasatError):
    """A training file that does not say what is needed, or says what nobody understands."""


@dataclass(frozen=True)
class DecoderSize:
    """The sizes of :class:`Decoder`, and the share of numbers that training drops of what each half of a block adds."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    context: int = 1024
    dropout: float = 0.0


class _Block(nn.Module):
    def __init__(self, size: DecoderSize) -> None:
        rope = nn.RoPE(size.dim // size.heads)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.dim), nn.RMSNorm(size.dim)
        self.attention = nn.Attention(size.dim, size.heads, size.kv_heads, rope=rope)
        self.mlp = nn.GLU(size.dim, size.hidden)
        self.dropout = nn.Dropout(size.dropout)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor, key: nn.Tensor | None) -> nn.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), positions), key)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), key)


class Decoder(nn.Module):
    """tokens i64[b, s] -> logits f32[b, s, vocab]; the architecture of Llama (arXiv:2307.09288).

    In training with dropout, key u32[2] beside the tokens.
    """

    def __init__(self, size: DecoderSize, vocab: int) -> None:
        self.embed = nn.Embedding(vocab, size.dim)
        self.blocks = [_Block(size) for _ in range(size.layers)]
        self.norm, self.head = nn.RMSNorm(size.dim), nn.Linear(size.dim, vocab)

    def __call__(self, tokens: nn.Tensor, key: nn.Tensor | None = None) -> nn.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, nn.positions(tokens), key)
        return self.head(self.norm(x))


def byte_tokenizer() -> Tokenizer:
    """Token i is the i-th byte of the alphabet; 256 ends a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


@dataclass(frozen=True)
class Recipe:
    """A training run that a file describes; nothing is read or compiled before :meth:`run`."""

    program: Program
    tokenizer: Tokenizer
    output: Path
    sources: tuple[Source, ...]
    evaluation: tuple[Source, ...]
    end: int
    options: dict[str, Any]
    """Of :func:`wasat.train`."""
    batch: dict[str, int]
    batches: int
    """Of each evaluation."""

    def run(self, progress: Progress | None = None) -> Trained:
        """Trains, or goes on where the output folder's last checkpoint is; returns the trained program."""

        def held_out() -> Iterable[Batch]:
            return islice(Packed(self.evaluation, **self.batch, end=self.end), self.batches)

        self.program.origin = replace(self.program.origin, tokenizer=str(keep_tokenizer(self.tokenizer, self.output)))
        packed = Packed(self.sources, **self.batch, end=self.end, seed=self.options["seed"])
        evaluation: Callable[[], Iterable[Batch]] | None = held_out if self.evaluation else None
        return train(self.program, packed, self.output, evaluation=evaluation, progress=progress, **self.options)

    def served(self, done: Trained) -> Program:
        """What to compile of the trained program."""
        return Program({"forward": done.program["forward"]}, done.program.params, done.program.interface, done.program.origin)


def tokenizer_of(path: Path, where: str) -> Tokenizer:
    """The tokenizer of a file that a recipe names at ``where``."""
    with refusals(RecipeError, f"{where}: the tokenizer {path} cannot be read: {{}}"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # texts are read whole
        tokenizer.no_padding()
        return tokenizer


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text to tokens, without those that a tokenizer puts around it."""

    def encode(text: str) -> list[int]:
        with refusals(RecipeError, "the tokenizer cannot encode a text of the data: {}"):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Writes ``tokenizer.json`` into the folder of a run, unless it is there.

    Raises RecipeError if the folder holds a run with another tokenizer.
    """
    path, text = folder / "tokenizer.json", tokenizer.to_str(pretty=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        if Checkpoints(folder).steps():
            raise RecipeError(f"{folder} holds a run with another tokenizer, {path}; choose another folder, or remove it")
        with replacing(path) as f:
            f.write(text.encode())
    return path


def read_recipe(path: str | Path) -> Recipe | Joint:
    """The run that a TOML file describes; ``examples/train_tiny.toml`` and ``examples/gemini.toml`` show all of it.

    Raises RecipeError, naming file, line and key, for a key that is missing, unknown or out of range, and for files that are
    not there.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        top = Table(tomllib.loads(text), str(path), lines=_lines(text))
    except (ValueError, RecursionError) as e:  # of TOML, of Unicode, of a number of thousands of digits
        raise RecipeError(f"{path} is no TOML: {e}") from None
    seed = top.take("seed", int, 0, least=0, below=2**32)
    options: dict[str, Any] = {"seed": seed, "steps": top.take("steps", int, least=1)}
    output = Path(top.take("output", str))
    options["target"], options["threads"] = top.take("target", str, "cpu"), top.take("threads", int, None, least=1)
    try:
        target_named(options["target"], options["threads"])
    except IRError as e:
        raise RecipeError(f"{top.at('target')}: {e}") from None
    batch = top.table("batch")
    sizes = {"batch": batch.take("rows", int, least=1), "length": batch.take("length", int, least=1)}
    batch.finish()
    evaluates = "evaluation" in top.given
    held_out = top.table("evaluation", {})
    options["evaluate_every"] = held_out.take("every", int, 100, least=1)
    batches = held_out.take("batches", int, 8, least=1) * evaluates
    step, about, data = top.table("step", {}), top.table("model"), top.tables("data")
    options |= _training(top, step, options["steps"])
    terms = top.table("loss", {})
    loss = {
        "smoothing": terms.take("smoothing", float, 0.0, least=0, below=1),
        "z_loss": terms.take("z_loss", float, 0.0, least=0),
    }
    terms.finish()
    family = about.take("family", str, "decoder")
    if family == "gemini":
        from wasat.recipes.multimodal import read_joint

        held_out.finish()
        top.finish()
        if sizes["batch"] < len(data):
            raise RecipeError(f"{batch.at('rows')}: rows = {sizes['batch']} must be at least {len(data)}, one of each task")
        joint = read_joint(about, data, path.parent, output, options, loss, sizes, batches)
        _check_sizes(batch, sizes["length"], joint.config.text.context)
        _check_chosen(step, options["train"], joint.parameters())
        return joint
    if family != "decoder":
        raise RecipeError(f"{about.at('family')}: there is no family {family}; there are decoder, gemini")
    program, tokenizer, end = _model(about, path.parent, seed, loss)
    _check_sizes(batch, sizes["length"], program.interface.context)
    _check_chosen(step, options["train"], program.params)

    def source(t: Table) -> Source:
        files = TextFiles(files_of(t, path.parent), encoder(tokenizer))
        weight = t.take("weight", float, 1.0, above=0)
        t.finish()
        return Source(files, weight)

    sources = tuple(map(source, data))
    evaluation = (source(held_out),) if evaluates else ()
    top.finish()
    return Recipe(program, tokenizer, output, sources, evaluation, end, options, sizes, batches)


def _check_sizes(batch: Table, length: int, context: int | None) -> None:
    if context is not None and length > context:
        raise RecipeError(f"{batch.at('length')}: length = {length} must be at most {context}, the context of the model")


def _check_chosen(step: Table, globs: Iterable[str], names: Collection[str]) -> None:
    for wanted in globs:
        if not any(fnmatchcase(name, wanted) for name in names):
            near = difflib.get_close_matches(wanted, names, 3, cutoff=0.4) or list(names)[:3]
            raise RecipeError(f"{step.at('train')}: train: no parameter matches {wanted!r}; there are {', '.join(near)}, …")


def _training(top: Table, step: Table, steps: int) -> dict[str, Any]:
    """The options of :func:`wasat.train` that every recipe has; ``step``: the table of that name."""
    options: dict[str, Any] = {"optimizer": _chosen(top.table("optimizer", {}), _OPTIMIZERS, "adamw")}
    rate, saving = top.table("rate", {}), top.table("checkpoints", {})
    options["accumulate"] = step.take("accumulate", int, 1, least=1)
    if options["accumulate"] > steps:
        raise RecipeError(f"{step.at('accumulate')}: accumulate = {options['accumulate']} must be at most steps = {steps}")
    options["ema"] = step.take("ema", float, None, least=0, below=1)
    options["clip"] = step.take("clip", float, 1.0, least=0) or None
    options["precision"], options["remat"] = step.take("precision", str, "f32"), step.take("remat", bool, False)
    if options["precision"] not in ("f32", "bf16", "f16"):
        raise RecipeError(f"{step.at('precision')}: precision = {options['precision']!r} must be 'f32', 'bf16' or 'f16'")
    options["quantize"] = step.take("quantize", str, None)
    if options["quantize"] not in (None, *SCHEMES):
        raise RecipeError(f"{step.at('quantize')}: quantize = {options['quantize']!r} must be one of {', '.join(SCHEMES)}")
    options["train"] = step.take("train", tuple[str, ...], ("*",))
    if not options["train"]:
        raise RecipeError(f"{step.at('train')}: train = [] must have a glob, as ['blocks.*']")
    if rate.given.get("name", "cosine") != "constant":
        rate.given.setdefault("steps", steps // options["accumulate"])  # schedules count updates
    options["rate"] = _chosen(rate, _SCHEDULES, "cosine")
    options["save_every"], options["keep"] = saving.take("every", int, 100, least=1), saving.take("keep", int, 3, least=1)
    for table in (step, saving):
        table.finish()
    return options


_OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon, "adafactor": Adafactor, "sgd": SGD}
_SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "linear": Linear, "constant": Constant}


class Table(Fields):
    """A table of the file."""

    error = RecipeError
    kinds: ClassVar[Mapping[Any, str]] = {**Fields.kinds, dict: "a table"}
    most: ClassVar[Mapping[type, float]] = {**Fields.most, int: 2**31 - 1}

    def at(self, name: str = "") -> str:
        """Where the key, or the table, stands."""
        table, _, entry = self.path.rpartition(".")
        header = f" [[{table}]] {int(entry) + 1}" if entry.isdecimal() else f" [{self.path}]" if self.path else ""
        line = self.lines.get((self.path, name.partition(".")[0]))
        return self.where + header + (f", line {line}" if line else "")

    def named(self, name: str) -> str:
        """The key alone, because :meth:`at` names the table."""
        return name

    def table(self, key: str, *default: Any) -> Table:
        return self.inside(key, self.take(key, dict, *default))

    def tables(self, key: str) -> list[Table]:
        found = [self.inside(f"{key}.{i}", x) for i, x in enumerate(self.take(key, list))]
        if not found:
            raise self.wrong(key, found, f"tables: [[{key}]]")
        return found


def _lines(text: str) -> dict[tuple[str, str], int]:
    """The lines of a file's keys, by the table, ``data.1`` for the second [[data]], and name; headers, too."""
    found: dict[tuple[str, str], int] = {}
    seen: Counter[str] = Counter()
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if m := re.match(r"\s*(\[\[?)([\w.-]+)\]", line):
            outer, _, name = m[2].rpartition(".")
            found.setdefault((outer, name), number)
            table = f"{m[2]}.{seen[m[2]]}" if m[1] == "[[" else m[2]
            seen[m[2]] += 1
        elif m := re.match(r"\s*([\w-]+)\s*=", line):
            found.setdefault((table, m[1]), number)
    return found


def _chosen(table: Table, there: dict[str, Any], default: str) -> Any:
    name = table.take("name", str, default)
    if name not in there:
        raise RecipeError(f"{table.at('name')}: there is no {name}; there are {', '.join(there)}")
    try:
        return table.made(there[name])
    except OutOfRange as e:
        raise RecipeError(f"{table.at(e.field)}: {e}") from None


def files_of(table: Table, base: Path) -> tuple[Path, ...]:
    """The files that the table's ``files`` match, patterns from ``base`` on."""
    found: list[Path] = []
    for pattern in table.take("files", tuple[str, ...]):
        matches = sorted(Path(p) for p in glob.glob(str(base / pattern), recursive=True))
        if not any(p.is_file() for p in matches):
            raise RecipeError(f"{table.at('files')}: no file matches {pattern!r} (looked from {base})")
        found += [p for p in matches if p.is_file()]
    return tuple(dict.fromkeys(found))


def _model(table: Table, base: Path, seed: int, loss: Mapping[str, Any]) -> tuple[Program, Tokenizer, int]:
    """The program with its @loss, its tokenizer, and the token that ends a document."""
    folder, given = table.take("folder", str, None), table.take("tokenizer", str, None)
    path = base / given if given else base / folder / "tokenizer.json" if folder else None
    tokenizer = tokenizer_of(path, table.at()) if path else byte_tokenizer()
    wanted = table.take("end", str, None)
    names = [wanted] if wanted is not None else [END, "<eos>", "</s>", "<|endoftext|>"]
    end = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if end is None:
        raise RecipeError(f"{table.at()}: the tokenizer has no token {' or '.join(names)} to end a document; give end = TOKEN")
    if folder:
        table.finish()
        program = from_pretrained(base / folder)
    else:
        size, vocab = _decoder_size(table), tokenizer.get_vocab_size()
        inputs = {"tokens": "i64[b, s]", **({"key": "u32[2]"} if size.dropout else {})}
        program = nn.trace(Decoder(size, vocab), inputs, outputs=["logits"], seed=seed, training=True)
        program.declare(name="decoder", context=size.context, vocab=vocab, generation=Generation(eos=(end,)))
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"], **loss), {"labels": "i64[b, s]"})
    return program, tokenizer, end


def _decoder_size(table: Table) -> DecoderSize:
    numbers = {
        k: table.take(k, int, least=1, most=MOST_LAYERS if k == "layers" else MOST_SIZE)
        for k in ("dim", "layers", "heads", "kv_heads", "hidden")
    }
    context, dropout = table.take("context", int, 1024, least=1), table.take("dropout", float, 0.0, least=0, below=1)
    table.finish()
    size = DecoderSize(**numbers, context=context, dropout=dropout)
    if size.dim % (2 * size.heads):
        raise RecipeError(f"{table.at('heads')}: dim = {size.dim} is not divided by heads = {size.heads} into even parts")
    if size.heads % size.kv_heads:
        raise RecipeError(f"{table.at('kv_heads')}: heads = {size.heads} is not a multiple of kv_heads = {size.kv_heads}")
    count = size.layers * size.dim * (2 * size.dim + 3 * size.hidden)
    if count > MOST_PARAMETERS:
        raise RecipeError(f"{table.at()}: these sizes are {count:,} parameters; at most {MOST_PARAMETERS:,} are trained")
    return size
