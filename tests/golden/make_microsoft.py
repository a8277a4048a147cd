"""What onnxruntime makes of the models of ``tests/microsoft_models.py`` -> ``onnx/microsoft.npz``.

    python tests/golden/make_microsoft.py          # onnxruntime 1.32.0
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parent.parent))
from microsoft_models import CASES, DECODERS, TOKENS


def main() -> None:
    found = {}
    for name, case in CASES.items():
        try:
            session = onnxruntime.InferenceSession(case.model.SerializeToString(), providers=["CPUExecutionProvider"])
            outputs = session.run(None, case.feeds)
        except Exception as e:
            print(f"{name}: {str(e)[:200]}")
            continue
        found |= {f"{name}/{o.name}": y for o, y in zip(session.get_outputs(), outputs)}
    for name, model in DECODERS.items():
        found[f"{name}/logits"] = stepwise(onnxruntime.InferenceSession(model.SerializeToString()))
    np.savez_compressed(Path(__file__).parent / "onnx" / "microsoft.npz", **found)


def stepwise(session: onnxruntime.InferenceSession) -> np.ndarray:
    """The logits of all tokens: the first five in one call, then one by one, each past that comes out put in again."""
    shapes = {i.name: i.shape for i in session.get_inputs()}
    past = {k: np.zeros((2, d[1], 0, d[3]), np.float32) for k, d in shapes.items() if k.startswith("past")}
    logits, at = [], 0
    for end in range(5, TOKENS.shape[1] + 1):
        feeds = {"input_ids": TOKENS[:, at:end], "attention_mask": np.ones((2, end), np.int64), **past}
        if "position_ids" in shapes:
            feeds["position_ids"] = np.broadcast_to(np.arange(at, end), (2, end - at))
        out = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds)))
        logits.append(out["logits"])
        past, at = {k: out[k.replace("past_key_values", "present")] for k in past}, end
    return np.concatenate(logits, axis=1)


if __name__ == "__main__":
    main()
