"""``wasat train``: a run from a file, killed by the system and resumed, served; files that say what nobody understands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import wasat as ws
from wasat.recipe import RecipeError, byte_tokenizer, read_recipe

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


def write(folder: Path, recipe: str = RECIPE) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (("a.txt", "the quick brown fox " * 40), ("b.txt", "jumps over the lazy dog. " * 30)):
        (folder / name).write_text(text)
    (folder / "run.toml").write_text(recipe)
    return folder / "run.toml"


def train(folder: Path, *more: str) -> str:
    done = subprocess.run([*COMMAND, "run.toml", *more], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path) -> list[tuple[float, ...]]:
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return [(x["step"], x["loss"], x["grad_norm"], x.get("eval.loss")) for x in lines]


def test_options_of_the_step(tmp_path: Path) -> None:
    recipe = RECIPE.replace("clip = 1", 'clip = 1\naccumulate = 2\nema = 0.9\nprecision = "f16"\nremat = true')
    options = read_recipe(write(tmp_path, recipe)).options
    wanted = {"clip": 1.0, "accumulate": 2, "ema": 0.9, "precision": "f16", "remat": True}
    assert {k: options[k] for k in wanted} == wanted
    plain = read_recipe(write(tmp_path)).options
    assert (plain["precision"], plain["remat"]) == ("f32", False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nothing stopped, and what the command said."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    return folder, train(folder, "--artifact", "tiny.wasat")


KILLED = """
import os, signal, sys, threading
from pathlib import Path
import tvm
from wasat.cli import main
from wasat.training.compiled import Compiled

fsync, replace, step, seen = os.fsync, os.replace, Compiled.step, []

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
    if reached(f"half of {path.name.split('-')[0]}"):
        os.ftruncate(number, os.fstat(number).st_size * 2 // 3)
        die()
    fsync(number)

def replaced(old, new):
    replace(old, new)
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
"""What happens when the kill comes, and at which such time; ``half of``: two thirds of the file are written."""


def test_killed_at_every_moment_it_ends_with_the_same_bits(tmp_path: Path, whole: tuple[Path, str]) -> None:
    write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *MOMENTS], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{m} {-signal.SIGKILL}" for m in MOMENTS], done.stderr
    train(tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 41))
    folders = [folder / "run" for folder in (tmp_path, whole[0])]
    made, wanted = ({p.name: p.read_bytes() for p in folder.iterdir() if p.name != "log.jsonl"} for folder in folders)
    assert made == wanted


def test_trained_and_served(whole: tuple[Path, str]) -> None:
    folder, said = whole
    assert "step 40: loss " in said
    assert "held out" in said
    first, last = losses(folder)[0], losses(folder)[-1]
    assert last[1] < 0.6 * first[1]
    [result] = ws.load(folder / "tiny.wasat").generate(["the quick"], max_tokens=8)
    assert len(result.tokens) == 8


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
    "missing and near": (RECIPE.replace("steps = 40", "stepz = 40"), "run.toml: steps is missing; is stepz meant to be it"),
    "near": (RECIPE.replace("beta2", "beta_2"), r"\[optimizer\], line 22: beta_2 is unknown; did you mean beta2"),
    "far": (RECIPE + "zzz = 1", r"\[checkpoints\], line 30: zzz is unknown; there are every, keep"),
    "a table": (RECIPE.replace("[step]", "[stp]"), r"run.toml, line 26: stp is unknown; did you mean step\?"),
    "the second": (RECIPE + '[[data]]\nfile = ["a.txt"]', r"\[\[data\]\] 2: files is missing; is file meant"),
    "type": (RECIPE.replace("rows = 4", "rows = 4.5"), r"\[batch\], line 14: rows = 4.5 must be a whole number"),
    "bool": (RECIPE.replace("rows = 4", "rows = true"), r"rows = True must be a whole number"),
    "not finite": (RECIPE.replace("rate = 0.03", "rate = nan"), r"\[rate\], line 24: rate = nan must be finite"),
    "too few": (RECIPE.replace("steps = 40", "steps = 0"), "run.toml, line 2: steps = 0 must be at least 1"),
    "no seed": ("seed = -1\n" + RECIPE, "run.toml, line 1: seed = -1 must be at least 0"),
    "no rows": (RECIPE.replace("rows = 4", "rows = 0"), r"\[batch\], line 14: rows = 0 must be at least 1"),
    "no evaluation": (RECIPE.replace("batches = 2", "batches = 0"), r"\[evaluation\], line 19: batches = 0 must be at least 1"),
    "heads": (RECIPE.replace("heads = 2", "heads = 3", 1), r"\[model\], line 7: dim = 16 is not divided by heads = 3"),
    "no file": (RECIPE.replace('"b.txt"', '"c.txt"'), r"\[evaluation\], line 17: no file matches 'c.txt'"),
    "a number as file": (RECIPE.replace('"b.txt"', "7"), "files must be paths, not 7"),
    "no optimizer": (
        RECIPE.replace('"adamw"', '"lion"'), r"\[optimizer\], line 21: there is no lion; there are adamw, adafactor, sgd"
    ),
    "one table": (RECIPE.replace("[[data]]", "[data]"), "line 11: data = .* must be a list"),
    "no list of tables": ("data = [1]\n" + RECIPE.replace('[[data]]\nfiles = ["*.txt"]', ""), r"tables: \[\[data\]\]"),
    "no family": (RECIPE.replace("dim = 16", 'family = "bert"'), r"\[model\], line 5: there is no family bert; there are"),
    "no tokenizer": (RECIPE.replace("dim = 16", 'dim = 16\ntokenizer = "none.json"'), "tokenizer .*none.json cannot be read"),
    "no end": (RECIPE.replace("dim = 16", 'dim = 16\nend = "<x>"'), "has no token <x> to end a document"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    recipe, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, recipe))


def test_the_schedule_counts_updates(tmp_path: Path) -> None:
    r = read_recipe(write(tmp_path, RECIPE.replace("clip = 1", "accumulate = 4")))
    assert (r.options["rate"].steps, r.options["accumulate"]) == (10, 4)
    assert np.isclose(r.options["rate"].rate, 0.03)
