"""Hugging Face folders whose weights or files are damaged, missing or disagree: each is refused, and says what is wrong."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_huggingface import LLAMA, save, shard, tensors
from wasat.frontend import CheckpointError, ConfigError, from_pretrained


def test_everything_wrong_with_the_tensors_is_named_at_once(tmp_path: Path) -> None:
    weights = tensors(LLAMA)
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 15), np.float32)
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((24, 16), np.int8)
    weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    with pytest.raises(CheckpointError) as e:
        from_pretrained(save(tmp_path / "m", LLAMA, weights))
    for m in (
        "missing: model.norm.weight f32[16]",
        "unexpected: model.layers.2.mlp.up_proj.weight f32[24, 16]",
        "misshaped: model.layers.0.mlp.up_proj.weight is [24, 15], the configuration asks for [24, 16]",
        "wrong type: model.layers.1.mlp.up_proj.weight is stored as i8",
    ):
        assert m in str(e.value)


def _cut(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:n])


def _header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def _text(path: Path, header: str) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated data": (lambda f: _cut(f, f.stat().st_size - 10), "truncated"),
    "truncated header": (lambda f: _cut(f, 100), "truncated"),
    "empty": (lambda f: _cut(f, 0), "truncated"),
    "not json": (lambda f: f.write_bytes((8).to_bytes(8, "little") + b"notjson!"), "not JSON"),
    "trailing bytes": (lambda f: f.write_bytes(f.read_bytes() + b"12"), "2 bytes follow the last tensor"),
    "wrong size": (lambda f: _header(f, lambda h: h["model.norm.weight"].update(shape=[17])), "model.norm.weight"),
    "negative": (lambda f: _header(f, lambda h: h["model.norm.weight"].update(shape=[-16])), "model.norm.weight"),
    "unknown type": (lambda f: _header(f, lambda h: h["model.norm.weight"].update(dtype="F6")), "element type 'F6'"),
    "no offsets": (lambda f: _header(f, lambda h: h["model.norm.weight"].pop("data_offsets")), "malformed"),
    "offsets are text": (
        lambda f: _header(f, lambda h: h["model.norm.weight"].update(data_offsets=["0", "64"])), "malformed"),
    "a fractional size": (lambda f: _header(f, lambda h: h["model.norm.weight"].update(shape=[16.5])), "malformed"),
    "type is a list": (lambda f: _header(f, lambda h: h["model.norm.weight"].update(dtype=["F32"])), "malformed"),
    "entry is a number": (lambda f: _header(f, lambda h: h.update({"model.norm.weight": 3})), "malformed"),
    "header is a list": (lambda f: f.write_bytes((2).to_bytes(8, "little") + b"[]"), "not an object"),
    "header too deep": (
        lambda f: f.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000), "not JSON"),
    "header larger than the file": (lambda f: f.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), "its header 109951"),
    "tensor twice": (
        lambda f: f.write_bytes((14).to_bytes(8, "little") + b'{"a":1, "a":2}'), "'a' is given twice"),
    "nothing, of sizes that no array has": (
        lambda f: _header(f, lambda h: h.update(none={"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]})),
        "would be F32[0, 4611686018427387904]"),
    "sizes of thousands of digits": (
        lambda f: _header(f, lambda h: h["model.norm.weight"].update(shape=[10**4000] * 9)), "would be F32[100"),
    "more axes than an array has": (
        lambda f: _header(f, lambda h: h.update(none={"dtype": "F32", "shape": [0] * 65, "data_offsets": [0, 0]})),
        "has 65 axes; at most 64"),
    "a hundred thousand axes": (
        lambda f: _header(f, lambda h: h["model.norm.weight"].update(shape=[9] * 100_000)), "has 100,000 axes"),
    "twice, at the end of many": (
        lambda f: _text(f, "{" + ",".join(f'"k{i}":1' for i in range(20_000)) + ',"k19999":1}'), "'k19999' is given twice"),
    "a name of a million letters": (
        lambda f: _header(f, lambda h: h.update({"k" * 10**6: h["model.norm.weight"] | {"shape": [1]}})), "kkk... F32[1]"),
    "overlap": (
        lambda f: _header(f, lambda h: h["model.norm.weight"].update(
            data_offsets=h["model.layers.0.input_layernorm.weight"]["data_offsets"])), "does not begin where"),
    "a hole": (lambda f: _header(f, lambda h: h.pop("model.layers.0.mlp.up_proj.weight")), "does not begin where"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = save(tmp_path / "m", LLAMA, tensors(LLAMA))
    damage(folder / "model.safetensors")
    begun = time.process_time()
    with pytest.raises(CheckpointError) as e:
        from_pretrained(folder)
    assert "model.safetensors" in str(e.value)
    assert message in str(e.value)
    assert len(str(e.value)) < 1000
    assert time.process_time() - begun < 1.5


def test_more_layers_or_experts_than_tensors(tmp_path: Path) -> None:
    """Hundreds of them are not built before somebody looks whether they are there."""
    folder = save(tmp_path / "m", LLAMA, tensors(LLAMA))
    for change in ({"num_hidden_layers": 4096}, {"model_type": "mixtral", "num_local_experts": 4096}, {"model_type": "bert"}):
        config = LLAMA | {"num_hidden_layers": 3000 if "num_local_experts" not in change else 1, "architectures": None} | change
        (folder / "config.json").write_text(json.dumps(config))
        begun = time.process_time()
        with pytest.raises(CheckpointError, match=r"(layers|experts) is [34]\d\d\d, and the checkpoint has \d\d tensors"):
            from_pretrained(folder)
        assert time.process_time() - begun < 1


def _twice(path: Path, key: str) -> None:
    """Repeats the entry ``key`` of a JSON text."""
    text = path.read_text()
    assert key in text
    path.write_text(text.replace(key, f'{key}"x", {key}'))


def _index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing"),
    "shard truncated": (lambda f: _cut(f / SECOND, 3000), "truncated"),
    "tensor not in its shard": (lambda f: _index(f, lambda m: m.update(extra=FIRST)), f"extra is not in {FIRST}"),
    "tensor not in the index": (
        lambda f: _index(f, lambda m: m.pop("model.norm.weight")), "model.norm.weight is in"),
    "tensor in another shard": (
        lambda f: _index(f, lambda m: m.update({"model.norm.weight": FIRST})), "model.norm.weight is not in"),
    "shard outside the folder": (
        lambda f: _index(f, lambda m: m.update(x="../x.safetensors")), "'../x.safetensors' is not the name of a"),
    "shard by absolute path": (lambda f: _index(f, lambda m: m.update(x=str(f / FIRST))), "inside the folder"),
    "shard is the parent": (lambda f: _index(f, lambda m: m.update(x="..")), "'..' is not the name of a safetensors"),
    "tensor twice in the index": (
        lambda f: _twice(f / "model.safetensors.index.json", '"model.norm.weight": '), "'model.norm.weight' is given twice"),
    "tensor in two shards": (
        lambda f: shutil.copy(f / FIRST, f / SECOND), f"model.embed_tokens.weight is in {SECOND}, but the index places it in"),
    "shard is a folder": (lambda f: (f / SECOND).unlink() or (f / SECOND).mkdir(), "cannot be read"),
    "index too deep": (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "too deeply"),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text('{"a": '), "index.json:1:7: not JSON"),
    "no weight map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", SHARDS.values(), ids=SHARDS)
def test_shards_that_disagree_are_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = shard(tmp_path / "m", LLAMA, tensors(LLAMA))
    damage(folder)
    with pytest.raises(CheckpointError) as e:
        from_pretrained(folder)
    assert message in str(e.value)


def test_folders_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(CheckpointError, match=r"config\.json:2:2: not JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*pytorch_model\.bin.*safetensors"):
        from_pretrained(tmp_path)
    save(tmp_path, LLAMA, tensors(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        from_pretrained(tmp_path)


def test_a_file_cut_after_loading_began_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", LLAMA, tensors(LLAMA))
    program = from_pretrained(folder)
    _cut(folder / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight cannot be read"):
        program.params["model.norm.weight"].load()
