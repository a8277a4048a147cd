"""The main job: the demonstration on the trained example."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from wasat.ir import WasatError

from wasat import demo


@pytest.mark.parametrize("quantize", ["int4", None])
def test_the_demonstration(quantize: str | None) -> None:
    file = io.StringIO()
    demo.main(Console(file=file, width=100), quantize=quantize)
    text = file.getvalue()
    assert re.findall(r"─ (\d)\. ", text) == ["1", "2", "3", "4", "5", "6"]
    written, passes, *_ = text.split("─ 2. ")[0], text.split("─ 2. ")[1].split("─ 3. ")[0]
    assert "= softmax(" in written
    assert "cached_attention(" in passes
    assert "5 × a ring of 576 positions for a window of 64, 1 × a full cache" in passes
    assert "no optimization was missed" in passes
    assert ("weights to int4" in passes) == (quantize == "int4")
    for name in ("model.so", "weights.safetensors", "libtvm_runtime.so", "tokenizer.json"):
        assert re.search(rf"\d+\.\d\d MB  {name}", text)
    assert all(prompt in text for prompt in demo.PROMPTS)
    assert len(re.findall(r"60 tokens in .* s \(.*/s\), finished by length", text)) == 3
    assert re.search(r"prefill [\d,]+ tokens/s \(512 at once\)\ndecode  [\d,]+ tokens/s \(64, one by one\)", text)
    divergence = float(re.search(r"divergence +(\d\.\d+) nats", text)[1])  # type: ignore[index]
    assert divergence < (0.04 if quantize else 1e-5)


def test_a_folder_without_text_is_refused() -> None:
    folder = Path(__file__).resolve().parents[1] / "golden" / "hf" / "llama"
    with pytest.raises(WasatError, match="brings no tokenizer"):
        demo.main(Console(file=io.StringIO()), folder)
