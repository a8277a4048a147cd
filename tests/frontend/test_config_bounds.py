"""config.json: fields that change no number are left alone; sizes that no machine holds are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wasat.frontend.models import ConfigError

from wasat.driver import described

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
    with pytest.raises(ConfigError, match=f"{field} is {2**power}; at most"):
        described(write(tmp_path, **{field: 2**power}))
