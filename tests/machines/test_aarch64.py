"""A whole artifact for another processor, run under an emulator: the tokens are those that this machine's artifact writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from wasat.runtime import ArtifactError, load

import wasat as ws

HERE = Path(__file__).parent
PYGEMMA = HERE.parents[1] / "examples" / "pygemma"
CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
PROMPT, STEPS = "def read_file(path):\n    ", 6

pytestmark = pytest.mark.machines


def declared(name: str, dtype: str, shape: list[int], *place: object) -> str:
    kind = dtype.rstrip("0123456789")
    return " ".join(map(str, ["tensor", name, CODES[kind], dtype[len(kind) :] or 8, len(shape), *shape, *place]))


def script(folder: Path, tokens: list[int], context: int) -> str:
    """What the host reads to continue ``tokens`` greedily."""
    m = json.loads((folder / "manifest.json").read_text())
    raw = (folder / "weights.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    prompt = folder.parent / "prompt.bin"
    prompt.write_bytes(np.array(tokens, np.int64).tobytes())
    names = {w["name"]: f"w{i}" for i, w in enumerate(m["weights"])}
    lines = [declared(names[w["name"]], w["dtype"], w["shape"], folder / "weights.safetensors",
                      8 + size + header[w["name"]]["data_offsets"][0]) for w in m["weights"]]  # fmt: skip
    lines += [declared(s["name"], s["dtype"], [{"b": 1, "c": context}.get(d, d) for d in s["shape"]]) for s in m["states"]]
    lines += [declared("prompt", "int64", [1, len(tokens)], prompt, 0), declared("next", "int64", [1, 1])]
    lines += [declared("past", "int64", [1]), declared("last", "int64", [1]), f"set last {len(tokens) - 1}"]

    def call(entry: str, **own: str) -> str:
        e = m["entries"][entry]
        given = [own.get(i["name"], i["name"]) for i in e["inputs"]]
        return " ".join(["call", entry, *given, *e["states"], *(names[w] for w in e["weights"])])

    lines += [call("prefill", tokens="prompt"), "greedy next"]
    for i in range(STEPS - 1):
        lines += [f"set past {len(tokens) + i}", call("decode", tokens="next"), "greedy next"]
    return "\n".join(lines) + "\n"


def emulated(folder: Path, tokens: list[int], place: Path, cpu: str) -> list[int]:
    """What the artifact in ``folder`` makes of ``tokens``, under an emulator of ``cpu``, with its own runtime alone."""
    root = Path(tvm_ffi.__file__).parent
    host, sysroot = place / "host", Path("/usr/aarch64-linux-gnu")
    subprocess.run(
        ["aarch64-linux-gnu-g++", "-O1", "-std=c++17", f"-I{root}/include", f"-I{root}/3rdparty/dlpack/include",
         HERE / "host.cpp", f"-L{folder}", "-ltvm_ffi", "-Wl,--no-as-needed", "-ltvm_runtime", "-o", host],
        check=True)  # fmt: skip
    done = subprocess.run(
        ["qemu-aarch64", "-L", sysroot, "-cpu", cpu, "-E", f"LD_LIBRARY_PATH={folder}", "-E", "TVM_NUM_THREADS=2",
         "-E", "TVM_BIND_THREADS=0", host, folder / "model.so"],
        input=script(folder, tokens, 64), text=True, capture_output=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(x) for x in done.stdout.split()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], list[int]]:
    """A prompt, and what this machine's artifact writes after it."""
    out = tmp_path_factory.mktemp("here") / "pygemma.wasat"
    ws.compile(ws.from_pretrained(PYGEMMA), out, quantize="int8")
    model = load(out)
    tokens = model.tokenizer.encode(PROMPT)
    session = model.session()
    made = [int(session.step([tokens]).argmax())]
    while len(made) < STEPS:
        made.append(int(session.step([made[-1:]]).argmax()))
    return tokens, made


@pytest.mark.parametrize(
    "target, cpu", [("aarch64", "cortex-a53"), ("aarch64:cortex-a76", "cortex-a76"), ("cpu:neoverse-n2", "max")]
)
def test_an_artifact_writes_the_same_tokens(target: str, cpu: str, written: Any, tmp_path: Path) -> None:
    out = tmp_path / "pygemma.wasat"
    ws.compile(ws.from_pretrained(PYGEMMA), out, quantize="int8", target=target, threads=2)
    needs = json.loads((out / "manifest.json").read_text())["target"]
    assert (needs["arch"], needs["os"]) == ("aarch64", "linux")
    assert "asimd" in needs["features"]
    assert ("asimddp" in needs["features"]) == (cpu != "cortex-a53")
    assert ("i8mm" in needs["features"]) == (cpu == "max")
    tokens, made = written
    assert emulated(out, tokens, tmp_path, cpu) == made
    if os.uname().machine != "aarch64":
        with pytest.raises(ArtifactError, match=r"needs an aarch64 processor: this is"):
            load(out)
    shutil.rmtree(out)
