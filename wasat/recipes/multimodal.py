"""One model trained on text, pictures, sounds and clips together: ``wasat train`` of a file with ``family = "gemini"``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from wasat import nn
from wasat.devices import train
from wasat.frontend.models.gemini import Config, Gemini, load, save
from wasat.ir import Builder, DType, Program, Value
from wasat.recipes.mixture import END, Layout, Mixture, Share, train_tokenizer
from wasat.recipes.tasks import Clips, Code, Digits, Match, Scenes, Sources, Speech, Stories, Task, Tones
from wasat.recipes.tasks.speech import Voices
from wasat.recipes.text import RecipeError, Table, encoder, files_of, keep_tokenizer, tokenizer_of
from wasat.training.data import Batch
from wasat.training.loop import Progress, Trained
from wasat.training.losses import add_loss, cross_entropy


@dataclass(frozen=True)
class Joint:
    """A run on a mixture of tasks. The trained model is saved in ``model`` in the output folder: ``wasat compile`` takes it."""

    config: Config
    tokenizer: Tokenizer
    output: Path
    shares: tuple[Share, ...]
    options: dict[str, Any]
    """Of :func:`wasat.train`."""
    loss: Mapping[str, Any]
    """Of :func:`wasat.training.losses.cross_entropy`."""
    rows: int
    length: int
    batches: int
    """Of each evaluation; 0: none."""

    @property
    def tasks(self) -> list[Task]:
        return [s.task for s in self.shares]

    def mixture(self, split: Any = "train") -> Mixture:
        """The batches of a split."""
        return Mixture(
            self.shares, layout(self.config), encoder(self.tokenizer),
            end=self.config.eos[0], rows=self.rows, length=self.length, split=split, seen=self.config.cross_every is not None,
        )  # fmt: skip

    def program(self) -> Program:
        """The program to train, with @loss: the loss, and for each task the share of its tokens that are right."""
        mixture = self.mixture()
        first = next(self.mixture())
        given = [k for k, name in (("image", "images"), ("audio", "audio"), ("video", "videos")) if name in first]
        program = Gemini(self.config).training_program(given, seed=self.options["seed"])
        rows = dict(zip([t.name for t in self.tasks], mixture.rows))
        add_loss(program, lambda b, v: _measured(b, v, rows, self.length, self.loss), {"labels": "i64[b, s]"})
        return program

    def parameters(self) -> list[str]:
        """Names of all that the model has."""
        return [name for name, x in Gemini(self.config).walk() if isinstance(x, nn.Parameter)]

    def run(self, progress: Progress | None = None) -> Trained:
        """Trains, or goes on where the output folder's last checkpoint is; saves the model."""

        def held_out() -> Iterable[Batch]:
            return islice(self.mixture("held_out"), self.batches)

        tokenizer = keep_tokenizer(self.tokenizer, self.output)
        evaluation: Callable[[], Iterable[Batch]] | None = held_out if self.batches else None
        done = train(self.program(), self.mixture(), self.output, evaluation=evaluation, progress=progress, **self.options)
        rounded = done.program.origin.rounded  # half of their bits would round them to other codes
        save(
            self.output / "model", self.config, done.program.params, tokenizer=tokenizer,
            dtype="f16" if rounded is None else "f32", rounded=rounded,
        )  # fmt: skip
        return done

    def served(self, done: Trained) -> Program:
        """What to compile of the trained program: the saved model."""
        return load(self.output / "model")


def layout(config: Config) -> Layout:
    """How the model of ``config`` numbers its tokens."""
    return Layout(
        config.text.vocab, config.vision.tokens if config.vision else 0, config.audio.tokens if config.audio else 0,
        config.video.frames * config.video.tokens if config.video else 0,
    )  # fmt: skip


def _measured(
    b: Builder, values: Mapping[str, Value], rows: Mapping[str, int], length: int, loss: Mapping[str, Any]
) -> dict[str, Value]:
    """The loss, and ``right.<task>``: how many of its tokens are the likeliest ones, f32[] in [0, 1]."""
    logits, labels = values["logits"], values["labels"]
    made = {"loss": cross_entropy(b, logits, labels, **loss)}
    right, answers = b.equal(b.cast(b.arg_max(logits, axis=-1), dtype=DType.I64), labels), b.greater_equal(labels, 0)
    first = 0
    for task, count in rows.items():
        counts = [
            b.reduce_sum(b.slice(b.cast(x, dtype=DType.F32), starts=(first, 0), stops=(first + count, length)), axes=(0, 1))
            for x in (right, answers)
        ]
        made[f"right.{task}"] = b.div(*counts)
        first += count
    return made


def read_joint(
    table: Table, data: Sequence[Table], base: Path, output: Path, options: dict[str, Any], loss: Mapping[str, Any],
    sizes: Mapping[str, int], batches: int,
) -> Joint:  # fmt: skip
    """The run of a file with ``family = "gemini"``. The [model] table has the fields of the model's Config.

    The tokenizer is the file that [model] names, or that of a run to go on with, or trained on the tasks.

    Raises RecipeError for a task that is unknown or whose modality the model lacks, and for the model's sizes.
    """
    given = table.take("tokenizer", str, None)
    draft = table.made(Config)
    if draft.heads:
        raise RecipeError(f"{table.at('heads')}: tasks have no classes; heads learn in Python (docs/models.md)")
    shares = []
    for t in data:
        task = _task(t, draft, base, options["seed"])
        shares.append(Share(task, t.take("weight", float, 1.0, above=0), t.take("examples", int, 1, least=1)))
        t.finish()
    path = base / given if given else output / "tokenizer.json"
    if given or path.exists():
        tokenizer = tokenizer_of(path, table.at())
    else:
        tokenizer = train_tokenizer([s.task for s in shares], draft.text.vocab)
    end = tokenizer.token_to_id(END)
    if end is None:
        raise RecipeError(f"{table.at()}: the tokenizer {path} has no token {END} to end an answer")
    config = replace(draft, text=replace(draft.text, vocab=tokenizer.get_vocab_size()), eos=(end,))
    return Joint(config, tokenizer, output, tuple(shares), options, loss, sizes["batch"], sizes["length"], batches)


def _task(t: Table, config: Config, base: Path, seed: int) -> Task:
    name = t.take("task", str)
    needs = _NEEDS.get(name)
    if needs is None:
        raise RecipeError(f"{t.at()}: there is no task {name}; there are {', '.join(_NEEDS)}")
    if lacking := [n for n in needs if n not in config.modalities]:
        raise RecipeError(f"{t.at()}: task {name} needs a model with {' and '.join(lacking)}")
    if name == "code":
        return Code(seed)
    if name == "sources":
        return Sources(files_of(t, base), seed=seed)
    if name == "stories":
        return Stories(seed=seed)
    size = config.vision.size if config.vision else 0
    if name in ("digits", "scenes"):
        return {"digits": Digits, "scenes": Scenes}[name](size, seed)
    if config.video and name == "clips":
        return Clips(size, config.video.frames, seed)
    assert config.audio is not None
    rate, samples = config.audio.rate, config.audio.samples
    if name == "tones":
        return Tones(rate, samples, seed)
    voices = Voices(base / t.take("voices", str), rate)
    return Speech(voices, samples, seed) if name == "speech" else Match(Digits(size, seed), voices, samples, seed)


_NEEDS: dict[str, tuple[str, ...]] = {
    "digits": ("image",), "scenes": ("image",), "stories": (), "speech": ("audio",), "match": ("image", "audio"),
    "tones": ("audio",), "clips": ("video",), "code": (), "sources": (),
}  # fmt: skip
"""The tasks, and the modalities beside text that each needs."""
