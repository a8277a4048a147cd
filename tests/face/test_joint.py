"""``wasat train`` of a mixture of tasks: a run from a file, resumed, saved, compiled, evaluated; files that cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from wasat.ir import Builder, DType, Graph, TensorType
from wasat.ir import evaluate as interpreted

import wasat as ws
from wasat.models import gemini
from wasat.recipes.evaluation import Score, evaluate, markdown, table
from wasat.recipes.multimodal import Joint, _measured, layout
from wasat.recipes.tasks import Code, Example, Split
from wasat.recipes.text import RecipeError, read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
steps = 6
output = "OUTPUT"
[model]
family = "gemini"
[model.text]
vocab = 320
dim = 16
layers = 1
heads = 2
kv_heads = 1
head_dim = 8
hidden = 16
context = 128
[model.vision]
kind = "vit"
size = 16
tokens = 4
patch = 8
dim = 16
layers = 1
heads = 2
hidden = 16
[[data]]
task = "digits"
weight = 2
[[data]]
task = "code"
examples = 2
[batch]
rows = 3
length = 72
[evaluation]
every = 3
batches = 2
[rate]
rate = 0.01
[checkpoints]
every = 3
"""


def recipe(folder: Path, text: str = RECIPE) -> Joint:
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text(text.replace("OUTPUT", str(folder / "run")))
    made = read_recipe(folder / "run.toml")
    assert isinstance(made, Joint)
    return made


@pytest.mark.slow
def test_a_run_learns_resumes_and_is_served(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(step: int, steps: int, said: object) -> None:
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        recipe(tmp_path).run(kill)
    joint = recipe(tmp_path)
    done = joint.run(lambda *said: None)
    assert [line["step"] for line in done.log] == [1, 2, 3, 4, 5, 6]
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    for name in ("right.digits", "right.code", "eval.right.digits", "eval.right.code"):
        assert 0 <= done.log[-1][name] <= 1

    model = tmp_path / "run" / "model"
    assert gemini.Config.from_json(json.loads((model / "config.json").read_text())) == joint.config
    served = joint.served(done)
    logits = served.params["embedding.weight"].load()
    assert np.allclose(logits, done.program.params["embedding.weight"].load(), rtol=2**-10, atol=1e-6)

    ws.compile(ws.from_pretrained(model), tmp_path / "small.wasat")
    scores = evaluate(ws.load(tmp_path / "small.wasat"), joint.tasks, count=5, batch=3)
    assert [(s.name, s.count, s.blind is None) for s, *_ in scores] == [("digits", 5, False), ("code", 5, True)]
    assert [name for name, _ in scores[0][0].baselines] == ["majority", "logistic regression"]


@pytest.mark.slow
def test_cross_attention_learns_with_weights_of_few_bits(tmp_path: Path) -> None:
    text = RECIPE.replace('family = "gemini"', 'family = "gemini"\ncross_every = 1').replace("dim = 16", "dim = 32")
    joint = recipe(tmp_path, text.replace("[rate]", '[step]\nquantize = "int4-plain"\n[rate]'))
    done = joint.run(lambda *said: None)
    assert any(re.match(r"applied: \d+ weights rounded to int4-plain \(@loss\)", str(r)) for r in done.remarks)
    served = joint.served(done)  # the saved model: its numbers, and what they are for
    assert served.origin.rounded == "int4-plain"
    assert all(np.array_equal(np.asarray(p.load()), done.program.load(n)) for n, p in served.params.items())
    report = ws.optimize(served, quantize="int4-plain")[1]
    assert "quantize" in [s.name for s in report.steps]
    assert "equalize" not in [s.name for s in report.steps]
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    name = next(n for n in done.states if n.endswith("attention_gate") and not n.startswith("optimizer."))
    assert done.states[name] != 0  # it began closed


def test_what_is_measured() -> None:
    """``right.<task>``: of the rows of a task, the share of labels that the logits' largest is; -1 is no label."""
    g = Graph("loss")
    values = {
        "logits": g.add_input("logits", TensorType(DType.F32, (3, 2, 4))),
        "labels": g.add_input("labels", TensorType(DType.I64, (3, 2))),
    }
    made = _measured(Builder(g), values, {"one": 2, "two": 1}, 2, {})
    g.set_outputs(list(made.values()), list(made))
    likeliest = np.array([[0, 1], [2, 3], [1, 2]])
    inputs = {"logits": np.eye(4, dtype=np.float32)[likeliest], "labels": np.array([[0, -1], [2, 1], [1, -1]])}
    found = dict(zip(g.output_names, interpreted(g, inputs)))
    assert found["right.one"] == pytest.approx(2 / 3)
    assert found["right.two"] == 1
    assert found["loss"] == pytest.approx(np.log(np.e + 3) - 3 / 4)


def test_the_loss_and_what_learns_are_as_the_file_says(tmp_path: Path) -> None:
    joint = recipe(tmp_path, RECIPE + "[loss]\nsmoothing = 0.1\nz_loss = 0.01\n[step]\ntrain = ['vision.*']\n")
    assert joint.options["train"] == ("vision.*",)
    program, batch = joint.program(), next(joint.mixture())
    assert set(joint.parameters()) == program.params.keys()
    logits = ws.run(program, **{k: x for k, x in batch.items() if k != "labels"})["logits"].astype(np.float64)
    normalizer, labels = np.log(np.exp(logits).sum(-1)), batch["labels"]
    each = normalizer - 0.9 * np.take_along_axis(logits, labels.clip(0)[..., None], -1)[..., 0] - 0.1 * logits.mean(-1)
    each += 0.01 * normalizer**2
    assert ws.run(program, "loss", **batch)["loss"] == pytest.approx(each[labels >= 0].mean(), rel=1e-6)


def test_the_example_fits_its_model() -> None:
    joint = read_recipe(ROOT / "examples" / "gemini.toml")
    assert isinstance(joint, Joint)
    assert layout(joint.config) == joint.mixture().layout
    first = next(joint.mixture())
    assert first["images"].shape[1] == joint.config.vision.size  # type: ignore[union-attr]
    assert sum(joint.mixture().rows) == len(first["tokens"]) == 34  # batch.rows of the file


class Answers:
    """In place of a model: says of a prompt what ``known`` has for its text, with a space too many."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known
        self.batches: list[int] = []

    def generate(self, prompts: list[list[str]], max_tokens: int) -> list[object]:
        self.batches.append(len(prompts))
        return [type("Generation", (), {"text": self.known.get(p[-1], "") + " "}) for p in prompts]


class Two(Code):
    name = "two"
    held_out = 4

    def example(self, split: Split, index: int) -> Example:
        return Example((f"{index} =>",), f" {index % 2}", "odd" if index % 2 else "even")


def test_scores_and_tables() -> None:
    model = Answers({"0 =>": " 0", "1 =>": " 1", "2 =>": "0", "3 =>": " 3"})
    told: list[tuple[str, int, int]] = []
    scores = evaluate(model, [Two()], batch=3, progress=lambda *x: told.append(x))  # type: ignore[arg-type]
    assert model.batches == [3, 1]
    assert told[-1] == ("two", 4, 4)
    assert scores == [[Score("two", 4, 0.75, None, (("majority", 1.0),)), Score("even", 2, 1.0), Score("odd", 2, 0.5)]]
    assert table(scores)[1:] == [
        ["two", "4", "75.0%", "", "majority 100.0%"], ["· even", "2", "100.0%", "", ""], ["· odd", "2", "50.0%", "", ""],
    ]  # fmt: skip
    assert len(table(scores, kinds=False)) == 2
    assert markdown([["a", "b"], ["c", "d"]]) == "| a | b |\n|---|---|\n| c | d |\n"


REFUSED = {
    "task": ('task = "code"', 'task = "cod"', RecipeError, "there is no task cod; there are digits, scenes"),
    "modality": ('task = "code"', 'task = "match"', RecipeError, "task match needs a model with audio"),
    "key": ("weight = 2", "wheight = 2", RecipeError, r"\[\[data\]\] 1, line \d+: wheight is unknown; did you mean weight"),
    "family": ('family = "gemini"', 'family = "gemeni"', RecipeError, "no family gemeni; there are decoder, gemini"),
    "field": ("patch = 8", "patches = 8", RecipeError, r"\[model.vision\], line \d+: patch is missing; is patches meant"),
    "sizes": ("head_dim = 8", "head_dim = 7", RecipeError, r"run.toml \[model.text\]: Text: head_dim is 7"),
    "entry": (
        '[[data]]\ntask = "digits"',
        '[[model.heads]]\nname = "a"\nclasses = "x"\nof = "text"\n[[data]]\ntask = "digits"', RecipeError,
        r"\[\[model.heads\]\] 1, line 26: classes = 'x' must be a whole number",
    ),
    "heads": (
        '"gemini"', '"gemini"\nheads = [{name = "digit", classes = 10, of = "image"}]', RecipeError,
        r"\[model\], line \d+: tasks have no classes",
    ),
    "rows": ("rows = 3", "rows = 1", RecipeError, r"\[batch\], line \d+: rows = 1 must be at least 2, one of each task"),
    "length": ("length = 72", "length = 129", RecipeError, r"\[batch\], line \d+: length = 129 must be at most 128"),
    "weight": ("weight = 2", "weight = 0", RecipeError, r"\[\[data\]\] 1, line \d+: weight = 0.0 must be above 0"),
    "examples": ("examples = 2", "examples = 0", RecipeError, r"\[\[data\]\] 2, line \d+: examples = 0 must be at least 1"),
    "train": ("[rate]", '[step]\ntrain = ["visoin*"]\n[rate]', RecipeError, r"\[step\], line \d+: train: no parameter matches"),
    "smoothing": ("[rate]", "[loss]\nsmoothing = 2\n[rate]", RecipeError, r"\[loss\], line \d+: smoothing = 2.0 must be"),
    "evaluation": ("batches = 2", "batch = 2", RecipeError, r"\[evaluation\], line \d+: batch is unknown; did you mean b"),
    "tokenizer": ('family = "gemini"', 'family = "gemini"\ntokenizer = "none"', RecipeError, "none cannot be read"),
    "voices": ('task = "code"', 'task = "speech"\nvoices = "none"', RecipeError, "task speech needs a model with audio"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    old, new, kind, message = REFUSED[case]
    assert old in RECIPE
    with pytest.raises(kind, match=message):
        recipe(tmp_path, RECIPE.replace(old, new, 1))


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "pygemma" / "tokenizer.json", tmp_path / "other.json")
    with pytest.raises(RecipeError, match=r"other.json has no token <end> to end an answer"):
        recipe(tmp_path, RECIPE.replace('family = "gemini"', 'family = "gemini"\ntokenizer = "other.json"'))
