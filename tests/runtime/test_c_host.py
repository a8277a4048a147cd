"""The host in C against the runtime in Python: `make test-machines` (its parts alone: test_c_parts.py)."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from c_build import CHECKED, FLAGS, SOURCES, SYSTEM, program, shared
from tiny_model import CONTEXT, EOS, edit_manifest
from tokenizers import Tokenizer as Library
from wasat.backends.tvm.targets import Target, cpu, target_named
from wasat.runtime import SamplingOptions, load
from wasat.runtime.c import HERE, write_project
from wasat.runtime.model import Model

pytestmark = [
    pytest.mark.machines,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ (a package of Debian)"),
]
SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_k": 40, "seed": 2**40 + 3},
    {"temperature": 1.2, "top_p": 0.9, "seed": 7},
    {"temperature": 0.9, "min_p": 0.05, "seed": 2**64 - 1},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3, "seed": 11},
    {"repetition_penalty": 1e5},
]


def command(folder: Path, compiler: str) -> list[str]:
    """What the exported README says, without the optimizer's last per cent, which take long."""
    return [
        compiler,
        "-std=c++17",
        "-O1",
        f"-I{folder}/src",
        "-isystem",
        f"{folder}/include",
        *map(str, sorted((folder / "src").glob("*.cc"))),
        f"{folder}/src/generate.c",
        f"{folder}/artifact/libtvm_ffi.so",
        "-ldl",
        "-pthread",
        "-Wl,-rpath,$ORIGIN/artifact",
        "-o",
        f"{folder}/wasat-generate",
    ]


@pytest.fixture(scope="session")
def artifact(compiled: Callable[[Target], Path]) -> Path:
    """One will do."""
    return compiled(cpu())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, artifact: Path) -> Path:
    """A folder that holds the host: it runs any artifact. What the README says is done for other processors, below."""
    sources = [*SOURCES, HERE / "generate.c"]
    last = [str(artifact / "libtvm_ffi.so"), *SYSTEM, f"-Wl,-rpath,{artifact}"]
    return program(shared(tmp_path_factory) / "host" / "wasat-generate", sources, FLAGS, last).parent


def refuses(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr


def run(folder: Path, artifact: Path, prompt: str, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(folder / "wasat-generate"), str(artifact), prompt, *options], capture_output=True)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())  # \r stays


def flags(options: dict[str, Any]) -> list[str]:
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]


# -- generating ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_tokens_are_pythons(built: Path, model: Model, options: dict[str, Any]) -> None:
    """Full and ring caches, prompts in one part and in several, the growth of caches."""
    rng = random.Random(3)
    for size, count in ((1, 40), (8, 9), (9, 20), (60, 300), (CONTEXT - 3, 3)):
        ids = [rng.randrange(EOS) for _ in range(size)]
        want = model.generate([ids], count, SamplingOptions(**options))[0]
        found = run(built, model.folder, " ".join(map(str, ids)), "--ids", "--max-tokens", str(count), *flags(options))
        assert [int(t) for t in found.stdout.split()] == want.tokens, found.stderr
        assert f"finished by {want.finish}" in found.stderr


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_caches_of_few_bits(built: Path, compiled: Callable[..., Path], model: Model, cache: str) -> None:
    """Codes and scales, full and in a ring, in prompts of several parts and as caches grow: the tokens that Python reads."""
    artifact, rng = compiled(cpu(), cache), random.Random(5)
    small = load(artifact)
    assert {s.stored for s in small.manifest.interface.states} == {cache}
    for size, count in ((9, 20), (60, 300)):
        ids = [rng.randrange(EOS) for _ in range(size)]
        want, wide = (m.generate([ids], count, SamplingOptions(temperature=1.0, seed=1))[0].tokens for m in (small, model))
        options = ["--max-tokens", str(count), "--temperature", "1", "--seed", "1"]
        found = run(built, artifact, " ".join(map(str, ids)), "--ids", *options)
        assert [int(t) for t in found.stdout.split()] == want, found.stderr
    assert want != wide  # what was rounded was read


@pytest.mark.parametrize("stop", [["e"], ["\ufffd"], ["the", "a\ufffd"], ["<eos>"], ["<bos>", "\x07"]], ids=str)
def test_text_ends_as_pythons(built: Path, model: Model, stop: list[str]) -> None:
    for seed in range(4):
        options = {"temperature": 1.3, "seed": seed}
        want = model.generate("Hear, é", 120, SamplingOptions(**options), stop=stop, stop_tokens=[10])[0]
        more = [x for s in stop for x in ("--stop", s)]
        found = run(built, model.folder, "Hear, é", "--max-tokens", "120", "--stop-token", "10", *flags(options), *more)
        assert found.stdout == want.text + "\n"
        assert f"finished by {want.finish}" in found.stderr


REFUSED: list[tuple[list[str], str]] = [
    (["x", "--temperature", "-1"], "temperature is -1"),
    (["x", "--top-p", "0"], "top_p is 0"),
    (["x", "--min-p", "1.5"], "min_p is 1.5"),
    (["x", "--repetition-penalty", "0"], "repetition_penalty is 0"),
    (["x", "--temperature", "nan"], "temperature is nan"),
    (["x", "--stop", ""], "an empty stop string"),
    (["x" * CONTEXT], f"the model's context is {CONTEXT}"),
    (["x", "--max-tokens", str(CONTEXT)], f"the prompt has 1 tokens and {CONTEXT}"),
    (["300", "--ids"], "token 300 is outside the vocabulary of 259"),
    (["x", "--threads", "5000"], "threads is 5000"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_done_is_said(built: Path, artifact: Path, arguments: list[str], message: str) -> None:
    refuses(run(built, artifact, *arguments), message)


def test_an_empty_prompt_begins_a_text(built: Path, model: Model) -> None:
    found = run(built, model.folder, "", "--ids", "--max-tokens", "5")
    assert [int(t) for t in found.stdout.split()] == model.generate([[]], 5)[0].tokens


def test_a_text_becomes_more_tokens_than_bytes(built: Path, copy: Path) -> None:
    """One character of three bytes is eighteen, normalized: all of them are printed."""
    path = copy / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "NFKC"}}))
    edit_manifest(copy, "files.tokenizer%json.bytes", path.stat().st_size)
    found = run(built, copy, "\ufdfa" * 60, "--encode", "--no-verify")
    assert [int(t) for t in found.stdout.split()] == Library.from_file(str(path)).encode("\ufdfa" * 60).ids, found.stderr


# -- folders that are damaged ----------------------------------------------------------------------------------------------
EDITS: list[tuple[str, Any, str]] = [
    ("format", 9, "the artifact has format 9"),
    ("format", "3", "format is text, not a whole number"),
    ("limits", ..., "limits is missing"),
    ("limits.granule", 0, "limits.granule is 0"),
    ("limits.chunk", -1, "limits.chunk is -1; it cannot be negative"),
    ("limits.context", 1.5, "limits.context is 1.5"),
    ("states.0.shape", ["b", 1, "c - 1", 8], "does not hold c positions"),
    ("states.0.shape", ["b", "z", 1, 8], "is not one over b and c"),
    ("states.0.shape", ["b", "c // 0", 1, 8], "is not one over b and c"),
    ("states.0.shape", ["b", "c**2", 1, 8], "is no dimension"),
    ("states.0.shape", ["b", "c", 1, "c"], "grows along more than its positions"),
    ("entries.decode.outputs.0.name", "other", "entry decode does not return"),
    ("limits.chunk", float("inf"), "limits.chunk is Infinity, not a whole number"),
    ("states.2.capacity", 5, "window 4 and chunk 8 need more"),
    ("states.0.positions", 7, "positions along 7"),
    ("states.0.cut", "maybe", "is cut maybe"),
    ("entries.decode.states.0", "gone", "has a state gone that is not described"),
    ("entries.decode.weights.0", "gone", "reads a weight gone"),
    ("entries.prefill.inputs.0.name", "words", "takes no input tokens to hold indices"),
    ("entries.prefill.outputs", [], "has no outputs"),
    ("entries.decode", ..., "has no entries prefill and decode"),
    ("weights.0.shape", [1, 2], "manifest.json says"),
    ("weights.0.shape", ["b"], "not whole numbers"),
    ("files.model%so.bytes", 5, "bytes instead of 5"),
    ("files.model%so.sha256", "0" * 64, "its SHA-256 differs"),
    ("files.model%so", ..., "does not list model.so"),
    ("files", {"../model.so": {"sha256": "", "bytes": 1}}, "is no name for a file"),
    ("target.arch", "m68k", "compiled for m68k processors"),
    ("target.features", ["amx9"], "this processor lacks amx9"),
    ("target.os", "plan9", "compiled for plan9"),
    ("target.kind", "cuda", "compiled for cuda"),
    ("target.libraries", ["none.so"], "target.libraries names 'none.so'"),
]


@pytest.mark.parametrize("path, value, message", EDITS, ids=lambda x: str(x)[:40])
def test_a_manifest_that_is_wrong(built: Path, copy: Path, path: str, value: Any, message: str) -> None:
    edit_manifest(copy, path, value)
    refuses(run(built, copy, "x", "--max-tokens", "2"), message)


def test_a_folder_that_is_damaged(built: Path, copy: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        refuses(run(built, copy, "x", "--max-tokens", "2"), message)

    weights, manifest = (copy / "weights.safetensors").read_bytes(), (copy / "manifest.json").read_text()
    (copy / "weights.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("is not the file that was compiled")
    (copy / "weights.safetensors").write_bytes(weights[:-1])
    refused(f"has {len(weights) - 1} bytes instead of {len(weights)}")
    (copy / "weights.safetensors").unlink()
    refused("is missing")
    (copy / "manifest.json").write_text(manifest.replace('"tiny"', '"other"'))
    refused("is not as it was written")
    (copy / "manifest.json").write_text(manifest[:100])
    refused("is damaged (line")
    (copy / "manifest.json").unlink()
    refused("is no artifact")
    copy = tmp_path / "nowhere"
    refused("is no artifact")


def test_weights_whose_header_lies(built: Path, copy: Path) -> None:
    path = copy / "weights.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(iter(header))
    for change, message in (
        ({"data_offsets": [64, 64 + header[name]["data_offsets"][1]]}, "does not fit"),
        ({"dtype": "F64"}, "manifest.json says"),
        ({"shape": [3]}, "manifest.json says"),
        ({"data_offsets": [-1, 5]}, "cannot be read"),
        ({"dtype": "X"}, "cannot be read"),
    ):
        text = json.dumps({**header, name: {**header[name], **change}}, separators=(",", ":")).encode()
        path.write_bytes((max(size, len(text))).to_bytes(8, "little") + text.ljust(size) + data[8 + size :])
        edit_manifest(copy, "files.weights%safetensors.bytes", path.stat().st_size)
        refuses(run(built, copy, "x", "--no-verify"), message)
    path.write_bytes((2**63).to_bytes(8, "little") + data[8:])
    edit_manifest(copy, "files.weights%safetensors.bytes", len(data))
    assert "its header would have" in run(built, copy, "x", "--no-verify").stderr


# -- building --------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake (a package of Debian)")
def test_cmake_project(artifact: Path, tmp_path: Path, built: Path, model: Model) -> None:
    """Configured in full; built in part, since the one-command build has compiled the sources."""
    out = tmp_path / "project"
    write_project(artifact, out)
    subprocess.run(["cmake", "-S", out, "-B", out / "build", "-DCMAKE_BUILD_TYPE=Debug"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", out / "build", "--parallel"], check=True, capture_output=True)
    done = subprocess.run([out / "build" / "wasat-generate", out / "artifact", "a", "--ids"], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:32]) == (2, "error: --ids wants whole numbers")
    done = subprocess.run(
        [out / "build" / "wasat-generate", out / "artifact", "5 6", "--ids", "--max-tokens", "4"],
        capture_output=True,
        text=True,
    )
    assert [int(t) for t in done.stdout.split()] == model.generate([[5, 6]], 4)[0].tokens


ARM = [x for x in ("qemu-aarch64", "aarch64-linux-gnu-g++") if shutil.which(x) is None]


@pytest.mark.skipif(bool(ARM), reason=f"needs {', '.join(ARM)} (of Debian's qemu-user, g++-aarch64-linux-gnu)")
def test_on_aarch64(compiled: Callable[[Target], Path], model: Model, tmp_path: Path) -> None:
    """Under an emulator: the tokens are this machine's."""
    out = tmp_path / "project"
    write_project(compiled(target_named("aarch64:cortex-a76", 2)), out)
    subprocess.run(command(out, "aarch64-linux-gnu-g++"), check=True)
    emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "cortex-a76", "-E", f"LD_LIBRARY_PATH={out}/artifact"]
    ids = [5, 80, 200, 17, 3, 9, 41, 255, 100, 7]
    for options in SAMPLED[:3]:
        want = model.generate([ids], 30, SamplingOptions(**options))[0]
        more = ["--ids", "--max-tokens", "30", *flags(options)]
        done = subprocess.run(
            [*emulator, out / "wasat-generate", out / "artifact", " ".join(map(str, ids)), *more],
            capture_output=True,
            text=True,
        )
        assert [int(t) for t in done.stdout.split()] == want.tokens, done.stderr


C_PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include "wasat.h"
static int count;
static int three(void *seen, int32_t token, const char *text, size_t bytes) {
  (void)text, (void)bytes;
  ((int32_t *)seen)[count++] = token;
  return count == 3;
}
static int again(void *model, int32_t token, const char *text, size_t bytes) {
  (void)token, (void)text, (void)bytes;
  return wasat_generate((wasat_model *)model, "abc", 3, 0, 0, 0, 0) == WASAT_INPUT;
}
int main(int argc, char **argv) {
  wasat_model *m = (wasat_model *)1;
  if (argc != 2 || wasat_load("/nowhere", 0, &m) != WASAT_ARTIFACT || m || !strstr(wasat_error(), "/nowhere")) return 1;
  if (wasat_load("", 0, &m) != WASAT_ARTIFACT || !strstr(wasat_error(), "folder is empty")) return 1;
  if (wasat_load(argv[1], 0, 0) != WASAT_INPUT || wasat_load(0, 0, &m) != WASAT_INPUT) return 2;
  if (wasat_load(argv[1], 0, &m)) return 3;
  int32_t ids[3], seen[3];
  size_t count_ids, bytes;
  char text[8] = "";
  if (wasat_encode(m, "abc", 3, 1, 0, 0, &count_ids) || count_ids != 3) return 4;
  if (wasat_encode(m, "abc", 3, 1, ids, 3, &count_ids)) return 5;
  if (wasat_decode(m, ids, 3, text, 7, &bytes) || strcmp(text, "abc")) return 5;
  if (wasat_encode(m, "\xff", 1, 1, ids, 3, &count_ids) != WASAT_INPUT) return 6;
  wasat_result r;
  if (wasat_generate_tokens(m, ids, 3, 0, three, seen, &r) || r.finish != WASAT_CALLER || r.tokens != 3) return 7;
  wasat_options o = wasat_defaults();
  o.max_tokens = 1 << 20;
  if (wasat_generate(m, "abc", 3, &o, 0, 0, 0) != WASAT_CONTEXT) return 8;
  if (wasat_generate(0, "abc", 3, 0, 0, 0, 0) != WASAT_INPUT || wasat_generate(m, 0, 3, 0, 0, 0, 0) != WASAT_INPUT) return 9;
  o.max_tokens = 2;
  if (wasat_generate(m, "abc", 3, &o, again, m, &r) || r.finish != WASAT_CALLER) return 10;
  printf("%d %d %d", seen[0], seen[1], seen[2]);
  wasat_free(m);
  wasat_free(0);
  return 0;
}
"""


def test_the_interface_from_c(tmp_path_factory: pytest.TempPathFactory, model: Model, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(C_PROGRAM)
    last = [str(model.folder / "libtvm_ffi.so"), *SYSTEM, f"-Wl,-rpath,{model.folder}"]
    main = program(shared(tmp_path_factory) / "checked" / "main", [tmp_path / "main.c", *SOURCES], CHECKED, last)
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # of TVM's own
    done = subprocess.run([main, str(model.folder)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert [int(t) for t in done.stdout.split()] == model.generate("abc", 3)[0].tokens
