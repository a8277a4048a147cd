"""``wasat train``: a run from a file, killed by the system and resumed, served; files that say what nobody understands."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner
from wasat.training.data import Packed
from wasat.training.scaling import LossScale

import wasat as ws
from wasat.cli.app import app
from wasat.recipes.text import RecipeError, byte_tokenizer, read_recipe

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from wasat.cli import main; main()", "train"]
RECIPE = """
steps = 40
output = "run"
[model]
dim = 16
layers = 1
heads = 2
kv_heads = 1
hidden = 32
context = 64
[[data]]
files = ["*.txt"]
[batch]
rows = 4
length = 16
[evaluation]
files = ["b.txt"]
every = 20
batches = 2
[optimizer]
name = "adamw"
beta2 = 0.95
[rate]
rate = 0.03
warmup = 4
[step]
clip = 1
[checkpoints]
every = 5
"""
LOSS = "[loss]\nsmoothing = 0.1\nz_loss = 0.01\n"
FULL = (
    RECIPE.replace("context = 64", "context = 64\ndropout = 0.1")
    .replace("clip = 1", 'remat = true\ntrain = ["blocks.*", "head.weight"]')
    + LOSS
)  # fmt: skip


def write(folder: Path, recipe: str = RECIPE) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (("a.txt", "the quick brown fox " * 40), ("b.txt", "jumps over the lazy dog. " * 30)):
        (folder / name).write_text(text)
    (folder / "run.toml").write_text(recipe)
    return folder / "run.toml"


def train(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, "run.toml", *more], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


def losses(folder: Path) -> list[tuple[float, ...]]:
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return [(x["step"], x["loss"], x["grad_norm"], x.get("eval.loss")) for x in lines]


def test_options_of_the_step(tmp_path: Path) -> None:
    more = 'clip = 2\naccumulate = 2\nema = 0.9\nprecision = "f16"\nremat = true\nquantize = "int8"\ntrain = ["h*"]'
    recipe = RECIPE.replace("clip = 1", more)
    options = read_recipe(write(tmp_path, 'threads = 3\ntarget = "cpu:znver3"\n' + recipe)).options
    wanted = {
        "clip": 2.0, "accumulate": 2, "ema": 0.9, "precision": "f16", "remat": True, "quantize": "int8", "train": ("h*",),
        "threads": 3, "target": "cpu:znver3",
    }  # fmt: skip
    assert {k: options[k] for k in wanted} == wanted
    assert read_recipe(write(tmp_path, RECIPE.replace("clip = 1", "clip = 0"))).options["clip"] is None
    plain = read_recipe(write(tmp_path, RECIPE.replace("clip = 1", ""))).options
    defaults = {k: p.default for k, p in inspect.signature(ws.train).parameters.items() if k in wanted}
    assert {k: plain[k] for k in wanted} == defaults


def test_terms_of_the_loss(tmp_path: Path) -> None:
    program = read_recipe(write(tmp_path, RECIPE + LOSS)).program
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 257, (2, 2, 5))
    logits = ws.run(program, tokens=tokens)["logits"].astype(np.float64)
    normalizer = np.log(np.exp(logits).sum(-1))
    wanted = normalizer - 0.9 * np.take_along_axis(logits, labels[..., None], -1)[..., 0] - 0.1 * logits.mean(-1)
    wanted += 0.01 * normalizer**2
    assert np.isclose(ws.run(program, "loss", tokens=tokens, labels=labels)["loss"], wanted.mean(), rtol=1e-6)


def test_dropout_is_in_each_half_of_a_block(tmp_path: Path) -> None:
    program = read_recipe(write(tmp_path, FULL.replace("layers = 1", "layers = 3"))).program
    assert (program["loss"].count("dropout"), "key" in [v.name for v in program["loss"].inputs]) == (6, True)
    program = read_recipe(write(tmp_path)).program
    assert (program["loss"].count("dropout"), [v.name for v in program["loss"].inputs]) == (0, ["tokens", "labels"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a run that nothing stopped, and what the command said."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, FULL)
    return folder, train(folder, "--artifact", "tiny.wasat")


KILLED = """
import os, signal, sys, threading
from pathlib import Path
import tvm
from wasat.cli import main
from wasat.training.compiled import Compiled

fsync, replace, step, seen = os.fsync, os.replace, Compiled.step, []
durable = {}  # bytes of the log that are on the disk: no kill takes them back

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def reached(moment):
    seen.append(moment)
    return [moment, str(seen.count(moment))] == wanted

def stepped(*args):
    if reached("step"):
        threading.Thread(target=die).start()  # the step is at work meanwhile
    return step(*args)

def synced(number):
    path = Path(os.readlink(f"/proc/self/fd/{number}"))
    size, kept = os.fstat(number).st_size, durable.get(path, 0)
    if reached(f"half of {path.name.split('-')[0]}"):
        os.ftruncate(number, kept + (size - kept) * 2 // 3)
        die()
    fsync(number)
    if path.suffix == ".jsonl":
        durable[path] = size

def replaced(old, new):
    replace(old, new)
    if Path(new).suffix == ".jsonl":
        durable[Path(new).resolve()] = os.stat(new).st_size
    if reached(f"after {Path(new).name.split('-')[0]}"):
        die()

os.fsync, os.replace, Compiled.step = synced, replaced, stepped
moments, sys.argv[1:] = sys.argv[1:], ["train", "run.toml"]
for moment in moments:  # each in a process of its own, which goes on where the one before was killed
    child = os.fork()
    if not child:
        wanted = moment.split(":")
        main()
        os._exit(0)
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
MOMENTS = [
    "half of tokenizer.unfinished:1",
    "step:8",
    "half of log.unfinished:1",
    "half of log.jsonl:2",
    "half of curve.unfinished:1",
    "half of step:2",
    "after step:2",
]
"""What happens when the kill comes, and at which such time; ``half of``: two thirds of the file are written, of
the log two thirds of what it had not yet kept."""


@pytest.mark.slow
def test_killed_at_every_moment_it_ends_with_the_same_bits(tmp_path: Path, whole: tuple[Path, object]) -> None:
    write(tmp_path, FULL)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *MOMENTS], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{m} {-signal.SIGKILL}" for m in MOMENTS], done.stderr
    train(tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 41))
    folders = [folder / "run" for folder in (tmp_path, whole[0])]
    made, wanted = ({p.name: p.read_bytes() for p in folder.iterdir() if p.name != "log.jsonl"} for folder in folders)
    assert made == wanted


@pytest.mark.slow
def test_updates_that_were_skipped_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasat.training.step.LossScale", partial(LossScale, initial=2.0**30, backoff=2.0**-5))
    recipe = RECIPE.replace("clip = 1", 'precision = "f16"').replace("steps = 40", f'output = "{tmp_path}/run"\nsteps = 6')
    path = write(tmp_path, recipe.replace('output = "run"\n', ""))
    done = CliRunner().invoke(app, ["train", str(path)], catch_exceptions=False)
    lines = list(map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()))
    skipped = [line["skipped"] for line in lines]
    assert skipped[0] == 1.0
    assert skipped[-1] == 0.0
    assert done.stdout.splitlines()[-1] == f"{sum(skipped):.0f} updates were skipped: their gradients overflowed in f16"


def test_trained_and_served(whole: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = whole
    said = done.stdout.splitlines()
    assert said[0].startswith("step 40: loss ")
    assert "held out" in said[0]
    assert len([line for line in said if line.startswith("applied: kept for the backward pass: ")]) == 1
    told = done.stderr.splitlines()
    assert told[0] == "compiling the step"
    assert [t.split()[1] for t in told[1:]] == [f"{step}/40" for step in (1, *range(4, 41, 4))]
    assert ["held out" in t for t in told] == [t.startswith(("step 20/", "step 40/")) for t in told]
    assert not [c for c in done.stderr + done.stdout if c != "\n" and not c.isprintable()]
    learnt = {k for k in load_file(folder / "run" / "step-00000040.safetensors") if not k.startswith("optimizer.")}
    assert learnt == {k for k in read_recipe(folder / "run.toml").program.params if k.startswith(("blocks.", "head."))}
    first, last = losses(folder)[0], losses(folder)[-1]
    assert last[1] < 0.6 * first[1]
    [result] = ws.load(folder / "tiny.wasat").generate(["the quick"], max_tokens=8)
    assert len(result.tokens) == 8


def test_one_file_fills_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE.replace('"*.txt"', '"a.txt"'))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(f"{i}, " for i in range(9000)))
    r = read_recipe(path)
    for sources in (r.sources, r.evaluation):
        for b in islice(Packed(sources, **r.batch, end=r.end), 3):
            assert len({row.tobytes() for row in b["tokens"]}) == len(b["tokens"]) == 4


def test_every_byte_is_a_token() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve 𝄞\n\tdef f(x):  return '\\0\x00'"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<end>") == 256


def test_the_example_is_understood() -> None:
    recipe = read_recipe(ROOT / "examples" / "train_tiny.toml")
    assert [s.weight for s in recipe.sources] == [2.0, 1.0]
    assert recipe.options["rate"].steps == recipe.options["steps"]


def test_a_hugging_face_folder_goes_on(tmp_path: Path) -> None:
    llama = ROOT / "tests" / "golden" / "hf" / "llama"
    start, end = RECIPE.index("dim ="), RECIPE.index("[[data]]")
    model = f'folder = "{llama}"\ntokenizer = "bytes.json"\nend = "<end>"\n'
    byte_tokenizer().save(str(tmp_path / "bytes.json"))
    recipe = RECIPE[:start] + model + RECIPE[end:]
    r = read_recipe(write(tmp_path, recipe.replace('name = "adamw"\nbeta2 = 0.95', 'name = "sgd"')))
    assert r.program["loss"].output_names == ["loss"]
    assert r.program.params.keys() == ws.from_pretrained(llama).params.keys()
    assert r.end == 256


REFUSED = {
    "no TOML": ("steps =", "is no TOML"),
    "missing": (RECIPE.replace("steps = 40", ""), "run.toml: steps is missing$"),
    "missing and near": (RECIPE.replace("steps = 40", "stepz = 40"), "run.toml, line 2: steps is missing; is stepz meant"),
    "near": (RECIPE.replace("beta2", "beta_2"), r"\[optimizer\], line 22: beta_2 is unknown; did you mean beta2"),
    "far": (RECIPE + "zzz = 1", r"\[checkpoints\], line 30: zzz is unknown; there are every, keep"),
    "a table": (RECIPE.replace("[step]", "[stp]"), r"run.toml, line 26: stp is unknown; did you mean step\?"),
    "the second": (RECIPE + '[[data]]\nfile = ["a.txt"]', r"\[\[data\]\] 2, line \d+: files is missing; is file meant"),
    "type": (RECIPE.replace("rows = 4", "rows = 4.5"), r"\[batch\], line 14: rows = 4.5 must be a whole number"),
    "bool": (RECIPE.replace("rows = 4", "rows = true"), r"rows = True must be a whole number"),
    "not finite": (RECIPE.replace("rate = 0.03", "rate = nan"), r"\[rate\], line 24: rate = nan must be finite"),
    "too few": (RECIPE.replace("steps = 40", "steps = 0"), "run.toml, line 2: steps = 0 must be at least 1"),
    "no seed": ("seed = -1\n" + RECIPE, "run.toml, line 1: seed = -1 must be at least 0"),
    "no rows": (RECIPE.replace("rows = 4", "rows = 0"), r"\[batch\], line 14: rows = 0 must be at least 1"),
    "no evaluation": (RECIPE.replace("batches = 2", "batches = 0"), r"\[evaluation\], line 19: batches = 0 must be at least 1"),
    "heads": (RECIPE.replace("heads = 2", "heads = 3", 1), r"\[model\], line 7: dim = 16 is not divided by heads = 3"),
    "no file": (RECIPE.replace('"b.txt"', '"c.txt"'), r"\[evaluation\], line 17: no file matches 'c.txt'"),
    "a number as file": (RECIPE.replace('"b.txt"', "7"), r"files.0 = 7 must be text"),
    "no optimizer": (
        RECIPE.replace('"adamw"', '"lion"'), r"\[optimizer\], line 21: there is no lion; there are adamw, muon, adafactor"
    ),
    "one table": (RECIPE.replace("[[data]]", "[data]"), "line 11: data = .* must be a list"),
    "no list of tables": ("data = [1]\n" + RECIPE.replace('[[data]]\nfiles = ["*.txt"]', ""), "data.0 = 1 must be a table"),
    "no family": (RECIPE.replace("dim = 16", 'family = "bert"'), r"\[model\], line 5: there is no family bert; there are"),
    "no tokenizer": (RECIPE.replace("dim = 16", 'dim = 16\ntokenizer = "none.json"'), "tokenizer .*none.json cannot be read"),
    "no target": ('target = "gpu"\n' + RECIPE, "run.toml, line 1: there is no target 'gpu'; there are cpu"),
    "no threads": ("threads = 0\n" + RECIPE, "run.toml, line 1: threads = 0 must be at least 1"),
    "no layers": (RECIPE.replace("layers = 1", "layers = 0"), r"\[model\], line 6: layers = 0 must be at least 1"),
    "kv_heads": (RECIPE.replace("kv_heads = 1", "kv_heads = 3"), r"\[model\], line 8: heads = 2 is not a multiple of kv_h"),
    "dropout": (RECIPE.replace("context = 64", "dropout = 1"), r"\[model\], line 10: dropout = 1.0 must be below 1"),
    "context": (RECIPE.replace("length = 16", "length = 65"), r"\[batch\], line 15: length = 65 must be at most 64"),
    "weight": (RECIPE.replace('"*.txt"]', '"*.txt"]\nweight = -1'), r"\[\[data\]\] 1, line 13: weight = -1.0 must be above 0"),
    "beta1": (RECIPE.replace("beta2 = 0.95", "beta1 = 1.5"), r"\[optimizer\], line 22: AdamW: beta1 = 1.5 must be at least 0"),
    "rate": (RECIPE.replace("rate = 0.03", "rate = -0.5"), r"\[rate\], line 24: Cosine: rate = -0.5 must be at least 0"),
    "warmup": (RECIPE.replace("warmup = 4", "warmup = 400"), r"\[rate\], line 25: Cosine: warmup = 400 must be below steps"),
    "precision": (RECIPE.replace("clip = 1", 'precision = "fp16"'), r"\[step\], line 27: precision = 'fp16' must be 'f32'"),
    "quantize": (RECIPE.replace("clip = 1", 'quantize = "int4"'), r"\[step\], line 27: quantize = 'int4' must be one of int8"),
    "clip": (RECIPE.replace("clip = 1", "clip = -1"), r"\[step\], line 27: clip = -1.0 must be at least 0"),
    "ema": (RECIPE.replace("clip = 1", "ema = 2"), r"\[step\], line 27: ema = 2.0 must be below 1"),
    "accumulate": (RECIPE.replace("clip = 1", "accumulate = 41"), r"\[step\], line 27: accumulate = 41 must be at most steps"),
    "train": (
        RECIPE.replace("clip = 1", 'train = ["head.*", "blocks.0.mlq.*"]'),
        r"\[step\], line 27: train: no parameter matches 'blocks.0.mlq.\*'; there are blocks.0.mlp",
    ),
    "no globs": (RECIPE.replace("clip = 1", "train = []"), r"\[step\], line 27: train = \[\] must have a glob"),
    "globs": (RECIPE.replace("clip = 1", "train = [1]"), r"\[step\], line 27: train.0 = 1 must be text"),
    "adamw": (
        RECIPE.replace('"adamw"', '"muon"\nadamw = [1]'),
        r"\[optimizer\], line 22: adamw.0 = 1 must be text",
    ),
    "smoothing": (RECIPE + "[loss]\nsmoothing = 1", r"\[loss\], line 31: smoothing = 1.0 must be below 1"),
    "z_loss": (RECIPE + "[loss]\nz_loss = -1", r"\[loss\], line 31: z_loss = -1.0 must be at least 0"),
    "layers without end": (RECIPE.replace("layers = 1", "layers = 1000000"), r"line 6: layers = 1000000 must be at most 4,096"),
    "a width": (RECIPE.replace("dim = 16", f"dim = {2**40}"), r"line \d+: dim = 1099511627776 must be at most 16,777,216"),
    "a model": (
        RECIPE.replace("dim = 16", f"dim = {2**20}").replace("layers = 1", "layers = 4096"),
        r"sizes are [\d,]+ parameters; at most",
    ),
    "rows": (RECIPE.replace("rows = ", "rows = 9999999999"), r"rows = 9999999999\d must be at most 2,147,483,647"),
    "digits": (RECIPE.replace("rate = 0.03", "rate = 1" + "0" * 400), r"line 24: rate = inf must be finite"),
    "hexadecimal": (RECIPE.replace("clip = 1", "clip = 0x" + "f" * 5000), r"line 27: clip = inf must be finite"),
    "more digits": (RECIPE.replace("clip = 1", "clip = 1" + "0" * 5000), r"is no TOML: .*digits"),
    "no f32": (RECIPE.replace("rate = 0.03", "rate = 1e39"), r"line 24: rate = 1e\+39 must be at most 3.4"),
    "nested": ("x = " + "[" * 5000, "is no TOML"),
    "no end": (RECIPE.replace("dim = 16", 'dim = 16\nend = "<x>"'), "has no token <x> to end a document"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    recipe, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, recipe))


def test_a_tokenizer_that_cuts_texts_reads_them_whole(tmp_path: Path) -> None:
    """Nor are they padded."""
    library = byte_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "t.json"))
    recipe = RECIPE.replace("dim = 16", 'dim = 16\ntokenizer = "t.json"')
    r = read_recipe(write(tmp_path, recipe))
    assert r.sources[0].documents.encode("abcd") == [r.tokenizer.token_to_id(c) for c in "abcd"]


def test_what_the_tokenizer_panics_at_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    recipe, path = RECIPE.replace("dim = 16", 'dim = 16\ntokenizer = "t.json"'), tmp_path / "t.json"
    about = json.loads(byte_tokenizer().to_str())
    path.write_text(json.dumps(about | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    with pytest.raises(RecipeError, match=r"tokenizer .*t.json cannot be read: Precompiled"):
        read_recipe(write(tmp_path, recipe))
    path.write_text(json.dumps(about | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}))
    files = read_recipe(write(tmp_path, recipe)).sources[0].documents
    with pytest.raises(RecipeError, match="cannot encode a text of the data: WordLevel"):
        files.encode("no a")


def test_the_schedule_counts_updates(tmp_path: Path) -> None:
    r = read_recipe(write(tmp_path, RECIPE.replace("clip = 1", "accumulate = 4")))
    assert (r.options["rate"].steps, r.options["accumulate"]) == (10, 4)
    assert np.isclose(r.options["rate"].rate, 0.03)
