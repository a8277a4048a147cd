"""Artifacts for CUDA in sessions, on a GPU in software: a driver's rules, and kernels' CUDA C++ computed by the processor."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "backends"), str(HERE.parent / "runtime")]
from plan_help import loaded
from soft_cuda import AS_NEW, SoftGPU, soft_gpu
from test_gemini_on_devices import RED, TONE, program
from test_plans import (  # noqa: F401 - run here with the model below
    test_a_decoder_through_sessions,
    test_a_step_of_decode_is_one_submission_that_allocates_nothing,
    test_generated_tokens_and_what_is_refused,
)
from tiny_model import Reference, tiny_program
from wasat.backends.tvm.targets import target_named
from wasat.ir import parse_program
from wasat.runtime import ArtifactError, InputError, Model, load
from wasat.runtime.artifact import digest
from wasat.runtime.errors import RuntimeErrorBase
from wasat.runtime.hosts.cuda import Cuda
from wasat.runtime.hosts.cuda_driver import OUT_OF_MEMORY, CudaError

import wasat as ws
from wasat.planned import PlanRunner

pytestmark = pytest.mark.machines
ADD = "graph @f(%x: f32[n, 4]) {\n  %y: f32[n, 4] = add(%x, 1:f32)\n  return %y\n}"


@pytest.fixture(scope="module")
def gpu() -> Iterator[SoftGPU]:
    with soft_gpu() as found:
        yield found


@pytest.fixture(scope="module")
def model(gpu: SoftGPU, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded(tiny_program(), "cuda:sm_80,sm_90", tmp_path_factory.mktemp("plan") / "tiny.wasat")


@pytest.fixture
def again(gpu: SoftGPU) -> Iterator[SoftGPU]:
    """The GPU, put right afterwards."""
    yield gpu
    gpu.set(**AS_NEW)
    gpu.library.soft_repair()


def test_decode_is_a_graph_from_its_second_step_on(model: Model, gpu: SoftGPU) -> None:
    session = model.session(1)
    session.step([[1, 2, 3]])
    seen = []
    for token in (4, 5, 6, 7):
        before = {n: gpu.count(n) for n in ("graph launches", "allocations", "waits")}
        session.step([[token]])
        seen.append({n: gpu.count(n) - c for n, c in before.items()})
    assert [s["graph launches"] for s in seen] == [0, 1, 1, 1]
    assert [s["waits"] for s in seen[1:]] == [1, 1, 1]
    assert seen[-1]["allocations"] == 0


@pytest.mark.parametrize("backwards", [0, 1])
def test_tokens_do_not_depend_on_the_order_of_threads(model: Model, again: SoftGPU, backwards: int) -> None:
    """Between barriers, threads go first to last, or turn about: what one reads of another is behind a barrier."""
    again.set(backwards=backwards)
    prompt = [3, 70, 11, 5, 9]
    (found,) = model.generate([prompt], max_tokens=8)
    assert found.tokens == Reference(tiny_program()).greedy(prompt, 8)[: len(found.tokens)]


def test_what_a_session_held_is_given_back(model: Model, gpu: SoftGPU) -> None:
    def held() -> list[int]:
        gc.collect()
        return [gpu.count(n) for n in ("memories", "graphs", "executables", "modules", "pinned")]

    def use() -> None:
        session = model.session(3)
        for _ in range(3):
            session.step([[1], [2], [3]])

    use()
    use()
    before = held()
    for _ in range(3):
        use()
    assert held() == before
    assert gpu.library.soft_get(b"memories") > 0


def test_a_model_that_is_gone_leaves_no_code(again: SoftGPU, tmp_path: Path) -> None:
    gc.collect()
    before = {n: again.count(n) for n in ("memories", "modules", "executables")}
    model = loaded(parse_program(ADD), "cuda:sm_90", tmp_path / "add.wasat")
    x = np.ones((2, 4), np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(model.run("f", x=x)["y"], x + 1)
    assert again.count("modules") == before["modules"] + 1
    del model
    gc.collect()
    after = {n: again.count(n) for n in before}
    assert after["modules"] == before["modules"]
    assert after["memories"] <= before["memories"]
    assert after["executables"] == before["executables"]


def test_pictures_sound_and_text(gpu: SoftGPU, tmp_path: Path) -> None:
    """The Gemini-style model: the tokens that the CPU writes."""
    made = program(tmp_path)
    for name in ("cpu", "cuda"):
        ws.compile(made, tmp_path / name, target={"cpu": "cpu:x86-64-v3", "cuda": "cuda:sm_90"}[name], chunk=8)
    cpu, device = (ws.load(tmp_path / name) for name in ("cpu", "cuda"))
    assert {p.name for p in (tmp_path / "cuda").iterdir()} == {
        "manifest.json", "plan.json", "kernels.fatbin", "weights.safetensors", "tokenizer.json",
    }  # fmt: skip
    for medium in (RED, TONE):
        np.testing.assert_allclose(device.embed(medium), cpu.embed(medium), atol=1e-4)
    prompts = [[RED, "what is this"], [TONE, "is this", RED]]
    want = [cpu.generate([prompt], max_tokens=5)[0].tokens for prompt in prompts]
    assert [device.generate([prompt], max_tokens=5)[0].tokens for prompt in prompts] == want


def test_a_choice_is_made_on_the_device(again: SoftGPU) -> None:
    """Launches before and after it are graphs of their own."""
    runner = PlanRunner(parse_program("""graph @f(%x: f32[4], %c: bool[]) {
  %y: f32[4] = mul(%x, 2:f32)
  %z: f32[4] = cond(%c, %y) {then=graph @yes(%a: f32[4]) {
    %b: f32[4] = add(%a, 1:f32)
    return %b
  }, otherwise=graph @no(%a: f32[4]) {
    %b: f32[4] = exp(%a)
    return %b
  }}
  %w: f32[4] = sqrt(%z)
  return %w
}"""), target_named("cuda:sm_90"))
    x = np.arange(4, dtype=np.float32)
    for _ in range(3):
        for c in (True, False):
            want = np.sqrt(2 * x + 1 if c else np.exp(2 * x))
            np.testing.assert_allclose(runner("f", {"x": x, "c": np.array(c)})["w"], want, rtol=1e-6)


# -- what goes wrong, in sentences --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"devices": 0}, "needs an NVIDIA GPU of the architecture sm_90: the driver here finds none"),
        ({"status": 100}, r"the driver here finds none \(cuInit failed: .*100\)"),
        ({"major": 8}, "needs an NVIDIA GPU of the architecture sm_90: the one here is sm_80"),
        ({"major": 10}, "the one here is sm_100"),
        ({"threads": 128}, "Soft GPU has 128 threads for a workgroup; the artifact needs 256"),
        ({"shared": 1000}, "Soft GPU has 1000 bytes for a workgroup; the artifact needs 49152"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with soft_gpu():
        loaded(parse_program(ADD), "cuda:sm_90", tmp_path / "add.wasat")
    with soft_gpu(**settings), pytest.raises(ArtifactError, match=message):
        load(tmp_path / "add.wasat")


def test_weights_that_do_not_fit(again: SoftGPU, tmp_path: Path) -> None:
    text = "graph @f(%x: f32[n, 64]) {\n  param %w: f32[64, 64]\n  %y: f32[n, 64] = linear(%x, %w)\n  return %y\n}"
    from wasat.testing import random_program

    loaded(random_program(text), "cuda:sm_90", tmp_path / "w.wasat")
    gc.collect()
    again.set(memory=again.count("bytes") + 5000)
    message = r"the weights cannot be put on Soft GPU: .* has 5000 of its \d+ bytes free, and 16384 are asked for: use fewer"
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / "w.wasat")


def test_a_session_that_does_not_fit(model: Model, again: SoftGPU) -> None:
    gc.collect()
    again.set(memory=again.count("bytes") + 2000)
    with pytest.raises(RuntimeErrorBase, match=r"Soft GPU has \d+ of its \d+ bytes free, and \d+ are asked for"):
        model.session(64).step(np.ones((64, 8), np.int64))
    again.set(memory=1 << 40)
    session = model.session(1)
    assert session.step([[1]]).shape[0] == 1


def test_what_is_computed_does_not_fit(again: SoftGPU) -> None:
    runner = PlanRunner(parse_program("""graph @f(%x: f32[n, 4]) {
  %y: f32[n, 4] = exp(%x)
  %z: f32[4, n] = transpose(%y) {perm=(1, 0)}
  %w: f32[n, n] = matmul(%y, %z)
  %t: f32[n] = reduce_sum(%w) {axes=(1,)}
  return %t
}"""), target_named("cuda:sm_90"))
    x = runner.host.memory.buffer_of(np.ones((100, 4), np.float32))
    gc.collect()
    again.set(memory=again.count("bytes") + 30000)
    message = r"f: there is no memory for what it computes: Soft GPU has \d+ .* 40000 are asked for"
    with pytest.raises(InputError, match=message):
        runner.host.function("f")(x)
    again.set(memory=1 << 40)
    assert runner.host.function("f")(x)[0].shape == (100,)


def test_a_damaged_file_of_kernels(again: SoftGPU, tmp_path: Path) -> None:
    loaded(parse_program(ADD), "cuda:sm_90", tmp_path / "add.wasat")
    path = tmp_path / "add.wasat" / "kernels.fatbin"
    whole = path.read_bytes()
    x = np.ones((2, 4), np.float32)
    cases = {
        b"\0" * len(whole): "cannot run the artifact's kernels, whose file is refused",
        whole.replace(b"_kernel\0", b"_colonel"): r"does not take the kernel k0.*: it is not in the file of kernels",
    }
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=message):
            load(tmp_path / "add.wasat", verify=False).run("f", x=x)
    path.write_bytes(whole)
    again.set(major=8)
    machine = Cuda(_driver())
    with pytest.raises(ArtifactError, match="holds no machine code for it"):
        machine.kernel(next(iter(_plan(tmp_path / "add.wasat").kernels.values())))


def test_a_damaged_plan(again: SoftGPU, tmp_path: Path) -> None:
    """Whatever is missing or of another kind, where hashes are not looked at: a sentence, or it runs."""
    text = ADD.replace("  return %y", "  %z: f32[n, 4] = cumsum(%y) {axis=1}\n  return %z")
    loaded(parse_program(text), "cuda:sm_90", tmp_path / "a.wasat")
    path = tmp_path / "a.wasat" / "plan.json"
    whole = path.read_text()
    x = np.ones((2, 4), np.float32)
    places = list(_places(json.loads(whole), ()))
    assert len(places) > 60
    said, ran = {}, 0
    for place in places:
        for change in ("removed", None, "text"):
            data = json.loads(whole)
            inner = data
            for key in place[:-1]:
                inner = inner[key]
            if change == "removed":
                del inner[place[-1]]
            else:
                inner[place[-1]] = change
            path.write_text(json.dumps(data))
            try:
                size = path.stat().st_size
                manifest = json.loads((path.parent / "manifest.json").read_text())
                manifest["files"]["plan.json"]["bytes"] = size
                (path.parent / "manifest.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))
                load(path.parent, verify=False).run("f", x=x)
                ran += 1
            except RuntimeErrorBase as e:
                said[str(place), change] = str(e)
    assert ran > 10
    assert len(said) > 100
    named = re.compile("damaged|has format|does not know|kernel|shape")
    assert [(where, text) for where, text in said.items() if not named.search(text)] == []


def _places(x: Any, at: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Ways to everything in a JSON value."""
    for key, inner in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield (*at, key)
        yield from _places(inner, (*at, key))


def _driver() -> Any:
    from wasat.runtime.hosts.cuda_driver import driver

    return driver()


def _plan(folder: Path) -> Any:
    from wasat.runtime.hosts.plan import read_plan

    return read_plan(folder, "cuda")


def test_a_kernel_that_leaves_its_memory(again: SoftGPU) -> None:
    """The driver's error is told, and that nothing can be computed any more."""
    runner = PlanRunner(parse_program(ADD), target_named("cuda:sm_90"))
    [entry] = runner.host.plan.entries.values()
    [launch] = entry["steps"]
    launch["grid"][0], launch["scalars"] = 4000, [1 << 22 for _ in launch["scalars"]]
    message = r"Soft GPU failed, and this process cannot use it any more: .*no memory of the device"
    with pytest.raises(RuntimeErrorBase, match=message):
        runner("f", {"x": np.ones((2, 4), np.float32)})


def test_a_graph_that_is_refused_is_no_broken_device(again: SoftGPU) -> None:
    runner = PlanRunner(parse_program(ADD), target_named("cuda:sm_90"))
    x = runner.host.memory.buffer_of(np.ones((2, 4), np.float32))
    call = runner.host.function("f")
    call(x)
    again.set(refused=1)
    with pytest.raises(RuntimeErrorBase, match=r"Soft GPU failed: cuGraphInstantiateWithFlags failed"):
        call(x)
    again.set(refused=0)
    np.testing.assert_array_equal(call(x)[0], np.full((2, 4), 2, np.float32))


def test_more_workgroups_than_it_counts(again: SoftGPU) -> None:
    runner = PlanRunner(parse_program(ADD), target_named("cuda:sm_90"))
    [entry] = runner.host.plan.entries.values()
    entry["steps"][0]["grid"][1] = 65536
    with pytest.raises(InputError, match=r"has \(\d+, 65536, 1\) workgroups, which this device cannot count"):
        runner("f", {"x": np.ones((2, 4), np.float32)})


def test_memory_for_results_that_is_refused_once(again: SoftGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next results are not written where that memory would be."""
    runner = PlanRunner(parse_program(ADD), target_named("cuda:sm_90"))
    machine = runner.host.machine
    assert isinstance(machine, Cuda)
    give = machine._driver.handle

    def refused(name: str, *args: Any) -> Any:
        if name == "cuMemHostAlloc":
            raise CudaError(OUT_OF_MEMORY, "cuMemHostAlloc failed: out of memory")
        return give(name, *args)

    small, large = (np.ones((n, 4), np.float32) for n in (2, 8192))
    np.testing.assert_array_equal(runner("f", {"x": small})["y"], small + 1)
    before = machine._room
    with monkeypatch.context() as patch:
        patch.setattr(machine._driver, "handle", refused)
        with pytest.raises(RuntimeErrorBase, match="Soft GPU failed: cuMemHostAlloc failed: out of memory"):
            runner("f", {"x": large})
    assert machine._room == before < large.nbytes
    np.testing.assert_array_equal(runner("f", {"x": large})["y"], large + 1)
