"""Artifacts: written whole or not at all, refused with a sentence, run without the compiler."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from tiny_model import RING, edit_manifest
from wasat.runtime import ArtifactError, InputError, Model, RuntimeErrorBase, load
from wasat.runtime.dimensions import extents
from wasat.runtime.interface import TensorSpec
from wasat.runtime.manifest import parse_manifest
from wasat.runtime.weights import Weights

FILES = ("libtvm_ffi.so", "libtvm_runtime.so", "model.so", "tokenizer.json", "weights.safetensors")


# -- reading ---------------------------------------------------------------------------------------------------------------
def _refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(folder, **options)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    _refused(copy, rf"{name} is missing; copy the whole folder again")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file(copy: Path, name: str, verify: bool) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size - 1)
    _refused(copy, rf"{name} has {size - 1} bytes instead of {size}", verify=verify)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    _refused(copy, rf"{name} is not the file that was compiled \(its SHA-256 differs\)")


def test_hashes_can_be_skipped(copy: Path, model: Model) -> None:
    data = bytearray((copy / "libtvm_ffi.so").read_bytes())
    data[-1] ^= 1
    (copy / "libtvm_ffi.so").write_bytes(data)
    assert load(copy, verify=False).generate("a", max_tokens=3)[0].tokens == model.generate("a", max_tokens=3)[0].tokens


def test_no_artifact_at_all(tmp_path: Path) -> None:
    _refused(tmp_path, r"is no artifact: it holds no manifest\.json")
    _refused(tmp_path / "nowhere", "is no artifact")


def test_a_damaged_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    _refused(copy, r"manifest\.json is damaged")
    (copy / "manifest.json").write_bytes(b"\xff\xfe\x00")
    _refused(copy, r"manifest\.json is damaged")
    (copy / "manifest.json").write_text("[]")
    _refused(copy, "the whole is a list, not an object")


@pytest.mark.parametrize("field, value, message", [
    ("format", 4, r"format 4 \(made by wasat .*\) and this runtime reads format 3: update wasat"),
    ("format", 2, "has format 2; this runtime reads format 3: compile the model again"),
    ("format", "1", "format is text, not a whole number"),
    ("format", ..., "format is missing"),
    ("target.os", "plan9", r"compiled for cpu .* needs the system plan9: this is "),
    ("target.arch", "pdp11", r"needs an pdp11 processor: this is "),
    ("target.kind", "cuda", r"needs an NVIDIA GPU of the architecture .*: (its|the) .* here"),
    ("target.kind", "abacus", "needs a runtime for abacus, which this version of Wasat is not"),
    ("target.device", 3, r"target\.device is a whole number, not text"),
    ("target.libraries", ["libgone.so"], r"target\.libraries names 'libgone\.so', which is no file of the artifact"),
    ("target.features", ["fma9", "avx1024"], "a processor with fma9, avx1024, which this one lacks; run it on such"),
    ("tvm_ffi", "0.0.1", r"needs apache-tvm-ffi 0\.0\.1, here is .* pip install apache-tvm-ffi==0\.0\.1"),
    ("tvm", "0.1.0", r"already runs TVM .* needs 0\.1\.0: load it in a process of its own"),
    ("interface.name", 3, r"interface\.name is a whole number, not text"),
    ("interface", [], "interface is a list, not an object"),
    ("limits.context", "long", r"limits\.context is text, not a whole number"),
    ("limits.context", -4, r"limits\.context is -4; it cannot be negative"),
    ("limits.context", True, r"limits\.context is True, not a whole number"),
    ("limits.chunk", 64, rf"ring cache ring\.k has capacity {RING}; window 4 and chunk 64 need more"),
    ("interface.generation.eos", 1, r"generation\.eos is a whole number, not a list"),
    ("interface.generation.eos", ["</s>"], r"generation\.eos\.0 is text, not a whole number"),
    ("entries.decode.inputs.0.dtype", 8, r"entries\.decode\.inputs\.0\.dtype is a whole number, not text"),
    ("entries.decode.inputs.0.shape", ["b", 1.5], r"shape\.1 is 1\.5, not a whole number or text"),
    ("entries.decode.inputs.0.shape", ["b +", 1], "'b \\+' is no dimension"),
    ("entries.decode.inputs.0.dtype", "max(1,b)", r"inputs\.0\.dtype is 'max\(1,b\)', which is no element type"),
    ("weights.0.dtype", "x", "which is no element type"),
    ("entries.prefill.inputs.0.shape", ["b"], "entry prefill takes no tokens 'tokens' of two axes"),
    ("interface.tokens", "words", "entry prefill takes no tokens 'words'"),
    ("states.2.shape", [0, RING, 1, 8], r"state ring\.k of shape .* holds nothing"),
    ("entries.decode.states", ["nothing"], "entry decode has a state nothing that is not described"),
    ("states.0.cut", "short", r"state full\.k .* is cut short"),
    ("states.0.rows", 7, r"state full\.k .* has rows along 7"),
    ("states.0.positions", 0, r"rows along 0, positions along 0"),
    ("states.0.donated", 1, r"donated is a whole number, not true or false"),
    ("states.0.capacity", 16, r"state full\.k, which does not grow, has c"),
    ("limits.granule", 0, r"limits\.granule is 0; it must be at least 1"),
    ("states.0.shape", ["b", 4, 1, 8], r"cache full\.k .* does not hold c positions"),
    ("states.0.shape", ["b", "c + k", 1, 8], r"state full\.k is not one over b and c"),
    ("states.0.shape", ["b", "__import__('os')", 1, 8], "is no dimension"),
    ("states.2.capacity", 8, r"ring cache ring\.k has capacity 8"),
    ("weights.0.shape", ["c", 8], "weight .* has the shape .* not whole numbers"),
    ("weights.0.shape", [3, 8], r"array \S+ is float32.*; manifest\.json says float32\[3, 8\]"),
    ("weights.0.dtype", "int8", r"array \S+ is float32.*; manifest\.json says int8"),
    ("weights.0.name", "other", r"entry \w+ reads a weight \S+ that is not described"),
    ("entries.decode.weights", ["other"], "entry decode reads a weight other that is not described"),
    ("states.2.empty", "other", r"state ring\.k begins as other, which is no weight"),
    ("files.model%so", ..., r"does not list model\.so"),
    ("files.model%so.sha256", 1, "sha256 is a whole number, not text"),
    ("files.model%so.bytes", None, r"files\.model\.so\.bytes is null, not a whole number"),
    ("files.%%/x", {"sha256": "", "bytes": 0}, r"'\.\./x' is no name for a file"),
], ids=str)  # fmt: skip
def test_a_manifest_that_cannot_be(copy: Path, field: str, value: Any, message: str) -> None:
    edit_manifest(copy, field, value)
    _refused(copy, message)


def test_fields_from_the_future_are_left_alone(copy: Path) -> None:
    edit_manifest(copy, "states.0.colour", "red")
    edit_manifest(copy, "novelty", 1)
    load(copy)


def test_any_change_of_the_manifest_is_noticed(copy: Path) -> None:
    """Not of its layout: people may print it for themselves."""
    path = copy / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data, indent=7, sort_keys=True))
    load(copy)
    for change in ({"limits": {**data["limits"], "context": 64}}, {"wasat": "x"}, {"digest": "0"}, {"new": 1}):
        path.write_text(json.dumps({**data, **change}))
        _refused(copy, "is not as it was written")
    path.write_text(json.dumps({k: v for k, v in data.items() if k != "digest"}))
    _refused(copy, "is not as it was written")
    path.write_text("[" * 100_000)
    _refused(copy, r"manifest\.json is damaged")


@pytest.mark.parametrize("size", ["min(c, 16)", "c // 2", "c - 16", "c * c", "max(c, 32)", "c // 0", "c % 0", "c + b", "0 * c"])
def test_a_full_cache_holds_what_it_is_asked_for(copy: Path, size: str) -> None:
    edit_manifest(copy, "states.0.shape", ["b", size, 1, 8])
    _refused(copy, "does not hold c positions|is no dimension|does not grow|holds nothing")


@pytest.mark.parametrize("size", ["b" + "+b" * 20_000, "(" * 300 + "b", "-" * 9_000 + "b", "n // 0", "n % 0", "True", "n.real",
                                  "9" * 5_000, "b if b else b"])  # fmt: skip
def test_sizes_that_cannot_be(copy: Path, size: str) -> None:
    edit_manifest(copy, "entries.decode.inputs.0.shape", [size, 1])
    _refused(copy, "is no dimension")


def test_a_library_that_is_no_program(copy: Path) -> None:
    """Of the right hash: it is looked into before it is loaded, which might end the process."""
    for code in ((copy / "libtvm_ffi.so").read_bytes(), b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 200, b"",
                 (copy / "model.so").read_bytes()[:5000]):  # fmt: skip
        (copy / "model.so").write_bytes(code)
        edit_manifest(copy, "files.model%so", {"sha256": hashlib.sha256(code).hexdigest(), "bytes": len(code)})
        _refused(copy, "is no compiled program")


def test_a_library_that_takes_something_else(copy: Path) -> None:
    """A signature that is none of the library's, whose digest is right: said when the library says so."""
    weights = json.loads((copy / "manifest.json").read_text())["entries"]["prefill"]["weights"]
    edit_manifest(copy, "entries.prefill.weights", weights[:-1])
    edit_manifest(copy, "entries.sum.inputs.0.shape", ["n", 4])
    edit_manifest(copy, "entries.sum.inputs.1.shape", ["n", 4])
    model = load(copy)
    with pytest.raises(ArtifactError, match=r"model\.so does not take what manifest\.json says of prefill: "):
        model.session(1).step([[1, 2, 3]])
    with pytest.raises(ArtifactError, match=r"model\.so does not take what manifest\.json says of sum: "):
        model.run("sum", **{i.name: np.zeros((2, 4), i.dtype) for i in model.manifest.entries["sum"].inputs})


@pytest.mark.parametrize("field, value, message", [
    ("entries.sum.outputs", [], "entry sum has the outputs none"),
    ("entries.sum.inputs.0.name", "y", "entry sum has the inputs y, y"),
    ("entries.sum.inputs.0.shape", ["n*n", 3], None),
    ("entries.sum.inputs.0.shape", ["m*m", 3], r"input of size m\*m, which no array tells"),
    ("entries.sum.inputs.0.shape", ["m + k", 3], "which no array tells"),
    ("entries.sum.inputs.0.shape", ["2*m", 3], None),
    ("entries.sum.inputs.0.shape", ["n", 2**63], "which no array tells"),
    ("limits.context", 0, r"limits\.context is 0; it must be at least 1"),
    ("limits.chunk", 0, r"limits\.chunk is 0"),
    ("interface.vocab", 0, r"interface\.vocab is 0"),
], ids=str)  # fmt: skip
def test_signatures_that_say_too_little(copy: Path, field: str, value: Any, message: str | None) -> None:
    edit_manifest(copy, field, value)
    if message is None:
        load(copy)
    else:
        _refused(copy, message)


ODD = (None, True, -1, 0, 2**70, 1.5, float("inf"), "", "b", "\ud800", "n*n", "n//0", "a/b", [], {}, [[]], {"": 1}, "x" * 300)


def test_damaged_manifests_are_refused_by_name(artifact: Path) -> None:
    """Every field, replaced by every odd value, removed or doubled: accepted or an ArtifactError, nothing raw."""
    whole = json.loads((artifact / "manifest.json").read_text())
    rng = random.Random(7)

    def places(x: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for k in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
            yield (*at, k)
            yield from places(x[k], (*at, k))

    everywhere = [p for p in places(whole) if p[0] not in ("weights", "settings") or rng.random() < 0.1]
    refused = 0
    for *outer, last in everywhere:
        for odd in (*rng.sample(ODD, 5), ...):
            data = json.loads(json.dumps(whole))
            at = data
            for key in outer:
                at = at[key]
            if odd is ...:
                del at[last]
            else:
                at[last] = odd
            try:
                parse_manifest(data)
            except ArtifactError:
                refused += 1
    assert refused > len(everywhere)


def test_a_program_with_other_entries_has_no_session(copy: Path) -> None:
    edit_manifest(copy, "entries.prefill.inputs.1.name", "history")
    edit_manifest(copy, "entries.prefill.indices", [])
    with pytest.raises(ArtifactError, match="prefill does not take tokens, past, last"):
        load(copy).session()
    edit_manifest(copy, "entries.prefill", ...)
    with pytest.raises(InputError, match="no entry 'prefill'; it has decode, sum"):
        load(copy).generate("a")


def test_every_weight_is_where_it_should_be(artifact: Path, model: Model) -> None:
    from safetensors.numpy import load_file

    want = load_file(artifact / "weights.safetensors")
    assert model.engine.weights.keys() == want.keys()
    for name, buffer in model.engine.weights.items():
        assert buffer.tensor.data_ptr() % 64 == 0
        np.testing.assert_array_equal(np.from_dlpack(buffer.tensor), want[name])


def _safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


SPECS = [TensorSpec("a", "uint8", (3,)), TensorSpec("b", "bfloat16", (2,)), TensorSpec("empty", "float32", (0, 4))]
HEADER = {
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [3, 7]}, "__metadata__": {"k": "v"},
    "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [7, 7]},
}  # fmt: skip


def test_types_that_numpy_lacks_and_odd_offsets(tmp_path: Path, model: Model) -> None:
    """bfloat16 goes from file to tensor; an array at offset 3 is aligned in memory. (``model``: the runtime is loaded.)"""
    path = _safetensors(tmp_path / "w.safetensors", HEADER, b"\x01\x02\x03\x80\x3f\x00\x40")
    weights = Weights(path, SPECS)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    a, b, empty = (x.tensor for x in weights.buffers().values())
    assert np.from_dlpack(a).tolist() == [1, 2, 3]
    assert (str(b.dtype), tuple(b.shape), b.data_ptr() % 64) == ("bfloat16", (2,), 0)
    view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
    assert np.from_dlpack(view(b, tvm_ffi.Shape((2,)), tvm_ffi.dtype("uint16"), 0)).tolist() == [0x3F80, 0x4000]
    assert tuple(empty.shape) == (0, 4)


def _without(name: str) -> dict[str, Any]:
    return {k: v for k, v in HEADER.items() if k != name}


@pytest.mark.parametrize("header, data, message", [
    (_without("a"), bytes(4), "lacks an array a"),
    ({**HEADER, "z": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}, bytes(8), "has an array z"),
    ({**HEADER, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, bytes(7), r"uint8\[4\]; .* says uint8\[3\]"),
    ({**HEADER, "b": {"dtype": "F16", "shape": [2], "data_offsets": [3, 7]}}, bytes(7), "says bfloat16"),
    ({**HEADER, "b": {"dtype": "I3", "shape": [2], "data_offsets": [3, 7]}}, bytes(7), "header cannot be read .*I3"),
    ({**HEADER, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, bytes(7), "array . lies at 0"),
    ({**HEADER, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [3, 8]}}, bytes(8), r"lies at 3\.\.8, which does not fit"),
    ({**HEADER, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]}}, bytes(8), r"lies at 4\.\.8, which does not fit"),
    ({**HEADER, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [3]}}, bytes(7), "header cannot be read"),
    (HEADER, bytes(8), "its arrays have 7 bytes, the file 8"),
    (HEADER, bytes(6), "its arrays have 7 bytes, the file 6"),
    (b"{", b"", "header cannot be read"),
    (b"[]", b"", "header cannot be read"),
], ids=str)  # fmt: skip
def test_a_weight_file_that_cannot_be(tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Weights(_safetensors(tmp_path / "w.safetensors", header, data), SPECS)


@pytest.mark.parametrize("content", [b"", b"\x01\x00", (1 << 60).to_bytes(8, "little") + b"{}"])
def test_a_weight_file_without_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged: it"):
        Weights(tmp_path / "w.safetensors", SPECS)


def test_dimensions() -> None:
    shape = (4, "b", "c // 16", "(s + 15) // 16 * 2 - 1", "max(s, 3)", "-s + 20", "s % 4")
    assert extents(shape, {"b": 2, "c": 64, "s": 17}) == (4, 2, 4, 3, 17, 3, 1)
    for wrong in ("c ** 2", "c.real", "f(c, 1)", "'c'"):
        with pytest.raises(ArtifactError, match="is no dimension"):
            extents([wrong], {"c": 16})
    with pytest.raises(KeyError):
        extents(["k"], {})


# -- the process -----------------------------------------------------------------------------------------------------------
def test_an_artifact_compiled_anew_is_loaded_anew(copy: Path, artifact: Path) -> None:
    """The system's loader takes a path that it has seen for the library it has: the second load must not get the first's."""
    load(copy)
    shutil.rmtree(copy)
    shutil.copytree(artifact, copy)
    (copy / "model.so").write_bytes(b"no library")
    edit_manifest(copy, "files.model%so", {"sha256": hashlib.sha256(b"no library").hexdigest(), "bytes": 10})
    _refused(copy, r"model\.so cannot be loaded: it is no compiled program")


def test_threads_that_cannot_be(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        load(artifact, threads=0)
    running = int(tvm_ffi.get_global_func("runtime.NumThreads")())
    monkeypatch.setenv("TVM_NUM_THREADS", str(running))  # load() sets it; put it back afterwards
    with pytest.raises(RuntimeErrorBase, match=f"already runs with {running} threads"):
        load(artifact, threads=running + 1)


def test_a_number_of_threads_from_the_environment_that_comes_too_late(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = int(tvm_ffi.get_global_func("runtime.NumThreads")())
    monkeypatch.setenv("TVM_NUM_THREADS", str(running + 1))
    with pytest.warns(UserWarning, match=f"already runs with {running} threads .* cannot change to {running + 1}"):
        load(artifact)


def test_without_tvm_ffi(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("wasat.runtime.module.version", absent)
    _refused(artifact, r"which is not installed: pip install apache-tvm-ffi==")


def test_sessions_in_several_threads(model: Model) -> None:
    prompts = [[i, 2 * i, 3 * i] for i in range(4)]
    want = [model.generate([p], max_tokens=30)[0].tokens for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda p: model.generate([p], max_tokens=30)[0].tokens, prompts))
    assert got == want


ALONE = """
    import json, os, sys
    for name in ("tvm", "torch", "ml_dtypes", "wasat.ir", "wasat.passes", "wasat.backends", "wasat.frontend", "wasat.training",
                 "wasat.driver"):
        sys.modules[name] = None  # importing it raises ImportError
    import wasat as ws
    import wasat.runtime
    assert "tvm_ffi" not in sys.modules  # importing costs little, and works where tvm_ffi does not
    model = ws.load(sys.argv[1])
    (got,) = model.generate("naïve ", max_tokens=12, logprobs=0)
    maps = open("/proc/self/maps").read()
    import tvm_ffi
    print(json.dumps({
        "tokens": got.tokens, "text": got.text,
        "libraries": sorted({line.split("/")[-1] for line in maps.splitlines() if "libtvm" in line}),
        "own": sys.argv[1] + "/libtvm_runtime.so" in maps,
        "threads": int(tvm_ffi.get_global_func("runtime.NumThreads")()),
        "cpus": len(os.sched_getaffinity(0)),
    }))
"""


def _alone(artifact: Path, **environment: str) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TVM", "OMP", "LD_", "PATH"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE), str(artifact)], env={**clean, **environment}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_runs_without_the_compiler_and_the_other_rooms(artifact: Path, model: Model) -> None:
    got = _alone(artifact)
    (want,) = model.generate("naïve ", max_tokens=12)
    assert (got["tokens"], got["text"]) == (want.tokens, want.text)
    assert "libtvm_runtime.so" in got["libraries"]
    assert "libtvm_compiler.so" not in got["libraries"]
    assert got["own"], "the TVM runtime must be the artifact's own"
    assert got["threads"] == got["cpus"]
    assert _alone(artifact, TVM_NUM_THREADS="1")["threads"] == 1
