"""config.json: fields that change no number are left alone; sizes that no machine holds are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from wasat.frontend.models import ConfigError
from wasat.frontend.models.gemini import Config
from wasat.ir import WasatError

from wasat.driver import described, from_pretrained

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA | changes))
    return path


@pytest.mark.parametrize("field", ["_model_name_or_path", "unk_token_id", "cls_token_id", "_attn_implementation"])
def test_a_field_that_changes_no_number(tmp_path: Path, field: str) -> None:
    assert len(described(write(tmp_path, **{field: 0}))["forward"])


@pytest.mark.parametrize(
    "field, power",
    [("num_hidden_layers", 30), ("head_dim", 40), ("vocab_size", 40), ("intermediate_size", 50)],
)
def test_a_size_that_no_machine_holds(tmp_path: Path, field: str, power: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} = {2**power} must be at most"):
        described(write(tmp_path, **{field: 2**power}))


@pytest.mark.parametrize("digits", [30, 400, 5000])
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "num_hidden_layers", "hidden_act", "bos_token_id"])
def test_a_number_of_many_digits(tmp_path: Path, field: str, digits: int) -> None:
    """Refused where it is a size, or no f32; what does not matter is left alone. No Python error in any case."""
    path = write(tmp_path, **{field: 0})
    path.write_text(path.read_text().replace(f'"{field}": 0', f'"{field}": 1{"0" * digits}'))
    if (field, digits) in (("rms_norm_eps", 30), ("rope_theta", 30), ("bos_token_id", 30), ("bos_token_id", 400)):
        return
    with pytest.raises(WasatError, match=rf"{field}|digits"):
        described(path)


GEMINI = {"text": {"vocab": 96, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "hidden": 48, "context": 64}}


@pytest.mark.parametrize("value", [2**40, 10**30, 10**400])
@pytest.mark.parametrize("field", sorted(GEMINI["text"]))
def test_sizes_of_gemini(field: str, value: int) -> None:
    Config.from_json(GEMINI)
    with pytest.raises(ConfigError, match=rf"{field} is .*; at most"):
        Config.from_json({"text": GEMINI["text"] | {field: value}})


@pytest.mark.parametrize("field, value", [("seconds", 10**400), ("seconds", 1e308), ("rate", 10**400), ("seconds", 1e30)])
def test_sounds_of_gemini(field: str, value: float) -> None:
    audio = {"seconds": 1.0, "rate": 8000, "mels": 40, "window": 200, "hop": 100, "dim": 8, "layers": 1, "heads": 2}
    audio["hidden"] = 8
    Config.from_json(GEMINI | {"audio": audio})
    with pytest.raises(ConfigError, match=rf"{field} (=|is) |seconds are more than"):
        Config.from_json(GEMINI | {"audio": audio | {field: value}})


@pytest.mark.parametrize("pad", [-1, 10**30])
def test_a_token_of_padding_that_no_table_holds(tmp_path: Path, pad: int) -> None:
    folder = shutil.copytree(Path(__file__).parents[1] / "golden" / "sentence" / "xlmr_cls", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    with pytest.raises(ConfigError, match="pad_token_id = "):
        from_pretrained(folder)


def test_the_configuration_of_an_encoder_alone(tmp_path: Path) -> None:
    """It was said to be not supported, and nearest to itself."""
    with pytest.raises(ConfigError, match=r"model_type 'bert' is an encoder: .* give the folder"):
        described(write(tmp_path, model_type="bert"))
