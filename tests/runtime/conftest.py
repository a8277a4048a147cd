"""The tiny models as artifacts, compiled once."""

from __future__ import annotations

import os

os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_BIND_THREADS", "0")

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from tiny_media import media_program
from tiny_model import Reference, tiny_program
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from wasat.backends.tvm.build import build
from wasat.backends.tvm.targets import Target, cpu, cpu_features, host_cpu
from wasat.backends.tvm.weights import write_weights
from wasat.ir import Program
from wasat.passes import PassManager, QuantizeCaches
from wasat.runtime import Model, load, write_artifact

from wasat import driver
from wasat.manifest import manifest_of


@pytest.fixture(scope="session")
def program() -> Program:
    return tiny_program()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte: random tokens are mostly no UTF-8."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    t.add_special_tokens(["<eos>", "<bos>"])
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    t.save(str(path))
    return path


@pytest.fixture(scope="session")
def compiled(
    program: Program, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The program as an artifact for a target, with keys and values in f32 or in fewer bits."""

    def make(target: Target, cache: str | None = None) -> Path:
        stored = program.copy()
        if cache is not None:
            PassManager([QuantizeCaches(cache)]).run(stored)
        library = build(stored, target)
        out = tmp_path_factory.mktemp("artifact") / "tiny.wasat"
        files = {
            "model.so": library.export,
            "weights.safetensors": lambda path: write_weights(path, library.plan, stored.load),
            "tokenizer.json": tokenizer_file,
            **{p.name: p for p in library.target.runtime_files()},
        }
        write_artifact(out, manifest_of(stored, library, {}), files)
        return out

    return make


@pytest.fixture(scope="session", params=["generic", "kernels"])
def artifact(request: pytest.FixtureRequest, compiled: Callable[[Target], Path]) -> Path:
    """The program compiled: caches as the graph has them, and in the layout of the CPU kernels."""
    plain = Target("cpu", host_cpu(), features=cpu_features)
    return compiled(plain if request.param == "generic" else cpu())


@pytest.fixture(scope="session")
def model(artifact: Path) -> Model:
    return load(artifact)


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy.wasat"))


@pytest.fixture
def reference(program: Program) -> Reference:
    return Reference(program)


@pytest.fixture(scope="session")
def source() -> Program:
    """The tiny model that sees and hears."""
    return media_program()


@pytest.fixture(scope="session")
def folder(source: Program, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as an artifact."""
    out = tmp_path_factory.mktemp("media") / "tiny.wasat"
    source.origin = replace(source.origin, tokenizer=str(tokenizer_file))
    driver.compile(source, out, chunk=8)
    return out


@pytest.fixture(scope="session")
def seeing(folder: Path) -> Model:
    return load(folder)
