"""The bundle for a GPU machine: made, unpacked and run here, on a GPU in software."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from soft_cuda import soft_gpu

pytestmark = pytest.mark.machines
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Unpacked from its archive, somewhere else."""
    folder = tmp_path_factory.mktemp("made")
    with soft_gpu():
        archive = module(BENCHMARKS / "gpu_bundle.py").bundle(folder / "bundle", "cuda:sm_90", small=True)
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path_factory.mktemp("there"), filter="data")
            yield tmp_path_factory.getbasetemp() / "there0" / "bundle"


@pytest.fixture(scope="module")
def check(bundle: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(bundle))  # as Python does for a script
        yield module(bundle / "gpu_check.py")


def test_what_is_right_passes(bundle: Path, check: Any, tmp_path: Path) -> None:
    failed = check.check(bundle, ["operations", "decoders", "products", "models"], "", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert failed == 0, found
    assert check.runtime.__file__ == str(bundle / "wasat_runtime" / "__init__.py")  # nothing of this checkout
    assert {name.rpartition("_")[0] for name in found["operations"]["passed"]} == {"add", "cast", "scan", "softmax"}
    assert found["decoders"]["passed"] == ["int4"]
    assert found["products"]["rates"].keys() == {
        "attention-f16", "attention-bf16", "conv-f16", "linear-attention-bf16",
        "gemm-f16", "gemm-bf16", "gemm-int4", "gemm-int8-bf16",
    }  # fmt: skip
    rates = found["models"]["rates"]["tiny-int4"]
    assert rates["decode tokens/s"] > 0
    assert rates["prefill tokens/s"].keys() == {"4", "8"}
    assert 0 < rates["share of bandwidth"] < 1


def test_what_is_wrong_is_named(bundle: Path, check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "operations" / "add" / "arrays.npz"
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    outputs = [k for k in arrays if k.startswith("softmax") and ".out0" in k]
    key = next(k for k in outputs if arrays[k].dtype == np.float32 and arrays[k].size > 1)
    arrays[key].ravel()[1] += 1e-3
    np.savez(path, **arrays)  # type: ignore[arg-type]
    logits = bundle / "decoders" / "int4.npz"
    held = dict(np.load(logits))
    smallest = 0, 9, np.abs(held["logits"][0, 9]).argmin()
    held["logits"][smallest] += 2.1 * held["allowed"][smallest]  # no more than what rows of bf16 hide, twice
    np.savez(logits, **held)  # type: ignore[arg-type]
    assert check.check(bundle, ["operations", "decoders", "nothing"], "", tmp_path / "out.json") == 3
    path.write_bytes(whole)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["operations"]["passed"]) > 10
    [(name, why)] = found["operations"]["failed"].items()
    assert key == f"{name}.out0"
    assert "Mismatched elements: 1 /" in why
    assert f"graph @{name}(" in why
    assert "AssertionError: 1 of 6400 logits are wrong" in found["decoders"]["failed"]["int4"]
    assert "nothing FAILED: KeyError: 'nothing'" in capsys.readouterr().out
