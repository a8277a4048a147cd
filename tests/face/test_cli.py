"""The command line: every command, every way to go wrong, and the examples of its help."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from wasat.ir import parse_program
from wasat.runtime import load

from wasat.cli import app as cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny() -> Path:
    """A folder whose graphs are read in no time."""
    return Path(__file__).resolve().parents[1] / "golden" / "hf" / "llama"


# -- help --------------------------------------------------------------------------------------------------------------------
DOCS = {c.callback.__name__: c.callback.__doc__ or "" for c in cli.app.registered_commands if c.callback}


@pytest.mark.parametrize("command", DOCS)
def test_help_shows_examples(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"wasat {command}" in out.split("Usage", 1)[1].split("\n", 1)[1]


def test_help_of_the_whole(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"wasat {command}" in out for command in DOCS)
    assert run("--version")[:2] == (0, "wasat 0.1.0\n")


def with_its_last_layers(folder: Path, count: int, out: Path) -> None:
    """A checkpoint without its first layers: every command takes its path, in a third of the time."""
    out.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, out)
    config = json.loads((folder / "config.json").read_text())
    first = config["num_hidden_layers"] - count
    config |= {"num_hidden_layers": count, "layer_types": config["layer_types"][first:]}
    (out / "config.json").write_text(json.dumps(config))
    with safe_open(folder / "model.safetensors", "np") as file:
        kept = {key: re.sub(r"(?<=layers\.)\d+", lambda m: str(int(m[0]) - first), key) for key in sorted(file.keys())}
        save_file({to: file.get_tensor(key) for key, to in kept.items() if "layers.-" not in to}, out / "model.safetensors")


@pytest.mark.slow
def test_the_examples_of_help_run(pygemma: Path, tmp_path: Path) -> None:
    """Copied and pasted, in the order in which they stand. The demo has a test of its own, and so have ``run`` (test_cli_run),
    ``chat`` (test_cli_chat), ``embed`` (test_embed), the model of all modalities (test_joint, test_generate_media), which takes
    an hour to train, and the translator (test_onnx_generate)."""
    docs = [doc for name, doc in DOCS.items() if name not in ("demo", "run", "chat", "embed")]
    found = [e for doc in docs for e in re.findall(r"- `([^`]*wasat [^`]+)`", doc)]
    examples = [e for e in found if "gemini" not in e and "t5" not in e]
    if importlib.util.find_spec("onnxruntime") is None:  # which `make parity` installs
        examples = [e for e in examples if "onnxruntime" not in e]
    assert len(examples) >= 10
    (tmp_path / "examples").mkdir()
    for file in (x for x in pygemma.parent.iterdir() if x.is_file()):
        shutil.copy(file, tmp_path / "examples")
    for room in ("ir", "passes", "docs", "training"):  # the text that is trained on
        (tmp_path / room).symlink_to(pygemma.parents[1] / room)
    with_its_last_layers(pygemma, 2, tmp_path / "examples" / "pygemma")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for example in examples:
        done = subprocess.run(
            example, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{example}\n{done.stderr}"
        assert done.stdout.strip()


# -- compile, generate -------------------------------------------------------------------------------------------------------
def test_compile_says_what_it_made(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, err = run("compile", tiny, "-o", tmp_path / "a long name that a line of eighty columns does not hold whole")
    assert code == 0
    assert re.fullmatch(rf"{tmp_path}/.+: \d+\.\d MB in \d+\.\d s\n", out)
    assert err == ""  # no bars where there is no terminal
    (made,) = tmp_path.iterdir()
    assert (made / "manifest.json").exists()


def test_generate_streams_and_sums_up(run: Run, int4: Path) -> None:
    code, out, err = run("generate", int4, "def f(x):", "--max-tokens", 5)
    assert code == 0
    assert out.endswith("\n")
    assert re.fullmatch(r"\d+ prompt tokens in .+, 5 tokens in .+, finished by length\n", err)
    assert run("generate", int4, "def f(x):", "--max-tokens", 5, "--quiet") == (0, out, "")
    assert run("generate", int4, "-", "--max-tokens", 5, "-q", stdin="def f(x):") == (0, out, "")
    stop = out.strip()[0]
    assert stop not in run("generate", int4, "def f(x):", "--max-tokens", 5, "--stop", stop)[1]


def test_generate_stops_at_token_ids(run: Run, int4: Path) -> None:
    (want,) = load(int4).generate("def f(x):", max_tokens=5)
    at = want.tokens.index(want.tokens[-1])
    _, _, err = run("generate", int4, "def f(x):", "--max-tokens", 5, "--stop-token", want.tokens[-1], "--stop-token", 0)
    assert f"{min(at, want.tokens.index(0) if 0 in want.tokens else at)} tokens" in err
    assert err.endswith("finished by stop\n")
    code, _, err = run("generate", int4, "a", "--stop-token", 10**9)
    assert code == 1
    assert "stop_tokens: a token is 1000000000; it must be a whole number, from 0 to" in err


def test_seeds_reproduce(run: Run, int4: Path) -> None:
    def sample(seed: int) -> str:
        return run("generate", int4, "def ", "--temperature", 1, "--max-tokens", 30, "--seed", seed, "-q")[1]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4


# -- show, explain -----------------------------------------------------------------------------------------------------------
def test_show_prints_graphs_that_parse(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = run("show", tiny)
    assert code == 0
    assert list(parse_program(out).graphs) == ["forward"]
    text = tmp_path / "graph.txt"
    text.write_text(out)
    assert run("show", text) == (0, out, "")
    assert "softmax" in run("show", text, "--before", "fuse-attention")[1]
    fused = run("show", text, "--after", "fuse-attention")[1]
    assert "softmax" not in fused
    assert "attention(" in fused
    assert run("show", text, "--locs")[1] != out


def test_show_after_all_and_one_graph(run: Run, tiny: Path) -> None:
    code, out, _ = run("show", tiny, "--after", "all", "--quantize", "int4")
    assert code == 0
    graphs = parse_program(out).graphs
    assert list(graphs) == ["prefill", "decode"]
    assert graphs["decode"].count("quantized_linear") > 0
    one = run("show", tiny, "--after", "all", "--quantize", "int4", "--graph", "decode")[1]
    assert one == str(graphs["decode"])


def test_a_pass_that_runs_again_is_shown_again(run: Run, tiny: Path) -> None:
    out = run("show", tiny, "--after", "cleanup")[1]
    assert out.count("graph @forward(") == 3
    assert out.count("graph @decode(") == 1


LOOSE = """graph @forward(%x: f32[b, 2, s, 8], %gap: f32[b, 2, s, s]) {
  %t: f32[b, 2, 8, s] = transpose(%x) {perm=(0, 1, 3, 2)}
  %scores: f32[b, 2, s, s] = matmul(%x, %t)
  %bent: f32[b, 2, s, s] = mul(%scores, %gap)
  %probs: f32[b, 2, s, s] = softmax(%bent) {axis=3}
  %y: f32[b, 2, s, 8] = matmul(%probs, %x)
  return %y, %probs
}
"""


def test_explain(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = run("explain", tiny)
    assert code == 0
    assert re.search(r"^fuse-attention: \d+ -> \d+ nodes, .* ms\n  applied: ", out, re.M)
    assert "models/" in out  # where it was written
    assert run("explain", tiny, "--missed")[1] == "nothing was missed\n"
    (tmp_path / "loose.txt").write_text(LOOSE)
    code, out, _ = run("explain", tmp_path / "loose.txt", "--missed")
    assert code == 0
    assert "missed: " in out
    assert f"at {tmp_path / 'loose.txt'}:5: %probs" in out
    assert "applied" not in out


# -- refusals ----------------------------------------------------------------------------------------------------------------
def test_refusals_are_one_message(run: Run, tiny: Path, pygemma: Path, int4: Path, tmp_path: Path) -> None:
    nowhere, made = tmp_path / "nowhere", tmp_path / "made"
    damaged, binary = tmp_path / "damaged", tmp_path / "binary"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model_type": ')
    binary.write_bytes(bytes(range(256)))
    refused: list[tuple[list[object], str]] = [
        (["compile", nowhere, "-o", made], "nowhere is neither a Hugging Face folder nor a file of graph text"),
        (["compile", damaged, "-o", made], "damaged/config.json"),
        (["compile", binary, "-o", made], "binary is not text"),
        (["compile", tiny, "-o", tiny], "exists and is no artifact"),
        (["compile", tiny, "-o", made, "--override", "int8"], "write GLOB=SCHEME"),
        (["compile", tiny, "-o", made, "--override", "*embed*=int3"], "there is no quantization scheme 'int3'"),
        (["compile", tiny, "-o", made, "--target", "tpu"], "there is no target 'tpu'"),
        (["generate", nowhere, "x"], "nowhere is no artifact"),
        (["generate", pygemma, "x"], "is no artifact: it holds no manifest.json; give a folder that wasat compile wrote"),
        (["generate", int4, "x", "--max-tokens", 10**6], "the model's context is 2048: shorten the prompt"),
        (["generate", int4, "x", "--temperature", -1], "temperature is -1.0"),
        (["show", tiny, "--after", "fuse-everything"], "there is no pass 'fuse-everything'; in order they are: fold-"),
        (["show", tiny, "--before", "all"], "there is no pass 'all'"),
        (["show", tiny, "--graph", "decode"], "there is no graph 'decode' here; there are forward"),
        (["show", tiny, "--after", "all", "--graph", "forward"], "there is no graph 'forward' here; there are prefill, decode"),
    ]  # fmt: skip
    for argv, message in refused:
        code, out, err = run(*argv)
        assert (code, out) == (1, ""), argv
        assert err.startswith("error: ")
        assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary", "damaged"]


def test_what_cannot_be_written_is_no_traceback(run: Run, tiny: Path) -> None:
    code, _, err = run("compile", tiny, "-o", "/proc/model.wasat")
    assert code == 1
    assert err.startswith("error: ")
    assert "/proc" in err


def test_a_text_that_is_none_is_refused(run: Run, tiny: Path, int4: Path, tmp_path: Path) -> None:
    (file := tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    for argv in (
        ["generate", int4, "x", "--input", f"a={file}"], ["compare", tiny, "cpu", "--text", file],
        ["quantize", tiny, "--data", file, "--bits", "5", "-o", tmp_path / "out"],
    ):  # fmt: skip
        code, _, err = run(*argv)
        assert (code, err) == (1, f"error: {file} is not text: its byte 2 is no UTF-8\n"), argv


def test_a_bug_is_called_one(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("[never]")

    monkeypatch.setattr("wasat.driver.load_program", broken)
    monkeypatch.delenv("WASAT_TRACEBACK", raising=False)
    code, out, err = run("show", tiny)
    assert (code, out) == (70, "")
    assert err.startswith("error: KeyError: '[never]'\nThis is a bug in Wasat. ")
    assert "run the command again with WASAT_TRACEBACK=1 before it" in err
    monkeypatch.setenv("WASAT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run("show", tiny)


def test_usage_mistakes_have_status_2(run: Run, tiny: Path) -> None:
    assert run("show")[0] == 2
    code, _, err = run("explain", tiny, "--quantize", "int5")
    assert code == 2
    assert "'int5' is not one of" in err


def test_a_file_of_no_graph_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("")
    code, _, err = run("run", tmp_path / "none.txt")
    assert (code, err) == (1, f"error: {tmp_path / 'none.txt'} holds no graph\n")


def test_a_parse_error_shows_line_and_caret(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "broken.txt"
    text.write_text(LOOSE.replace("matmul(%x, %t)", "matmul(%x, %nobody)"))
    code, _, err = run("show", text)
    assert code == 1
    assert f"{text}:3: " in err
    line, caret = err.splitlines()[1:3]
    assert line[caret.index("^") :].startswith("%nobody")


LOOKS_AHEAD = """graph @forward(%tokens: i64[b, s], %table: f32[9, 8]) {
  %x: f32[b, s, 8] = embedding(%table, %tokens)
  %mean: f32[b, 1, 8] = reduce_mean(%x) {axes=(1,), keepdims=true}
  %y: f32[b, s, 8] = sub(%x, %mean)
  return %y
}
"""


def test_a_cache_that_cannot_be_is_explained_by_line(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "mean.txt"
    text.write_text(LOOKS_AHEAD)
    code, out, _ = run("explain", text, "--missed")
    assert code == 0
    assert "missed: @forward stays as it is: no KV cache can be derived for output y" in out
    assert "it reduces over the sequence" in out
    assert f"at {text}:3: %mean" in out
    code, out, err = run("compile", text, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    assert f"1 optimization was missed; what and why: wasat explain {text} --missed" in out
    assert f"1 operation has no kernel of cpu; which and why: wasat explain {text} --missed" in out


@pytest.mark.parametrize("target", ["cpu", "opencl"])
def test_what_no_kernel_takes_is_explained(run: Run, tmp_path: Path, target: str) -> None:
    """By explain as by compile, for the target that is asked for."""
    text = tmp_path / "mean.txt"
    text.write_text(LOOKS_AHEAD)
    code, compiled, err = run("compile", text, "-o", tmp_path / "out", "--verbose", "--target", target)
    assert (code, err) == (0, "")
    said = compiled[compiled.index(f"kernels of {target}") :].splitlines()[1]
    assert said.startswith("  missed: ")
    code, out, _ = run("explain", text, "--missed", "--target", target)
    assert code == 0
    assert said in out
    assert run("explain", text, "--target", "gpu")[0] == 1


def test_weights_that_become_f32_are_said(run: Run, pygemma: Path) -> None:
    """Unless a scheme is asked for."""
    said = "80 parameters are stored as bf16 and become f32; quantize=bf16 keeps weights as they are"
    assert said in run("explain", pygemma, "--missed")[1]
    assert "become f32" not in run("explain", pygemma, "--missed", "--quantize", "bf16")[1]


@pytest.mark.parametrize("options, said", [
    (["--web", "site", "--graph", "decode"], "--graph, --optimized"), (["--c", "host", "--optimized"], "are for ONNX files"),
    (["--onnx", "x.onnx", "--target", "webgpu"], "an ONNX file is for any machine"), ([], "say what to write"),
    (["--web", "site", "--onnx", "x.onnx"], "say what to write"), (["--c", "host", "--cache", "f16"], "--cache is for --web"),
    (["--c", "host", "--chunk", "4"], "--chunk is for --web"),
    (["--onnx", "x.onnx", "--context", "64"], "--context is for --web"),
    (["--web", "site", "--cache", "f16"], "caches of f16 are for cpu"),
])  # fmt: skip
def test_export_takes_what_belongs_together(run: Run, tiny: Path, options: list[str], said: str) -> None:
    code, _, err = run("export", tiny, *options)
    assert code == 1
    assert said in err
