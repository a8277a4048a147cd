"""Makes ``training/*.npz``: gradients, losses, optimizers and a training run of torch.

    pip install torch==2.13.0 transformers==5.23.0
    python make_training.py

Models are those of ``hf/`` (make_hf.py). ``gradients_*.npz``: ids, labels (-100: left out), loss, and by parameter name the
gradient. ``losses.npz``: the operands, ``<case>.loss``, and ``<case>.grad`` of the logits (or points). ``optimizers.npz``:
parameters that start at ``start.<name>`` and get the gradients ``grad.<name>[step]``; what they are after each step,
``<case>.<name>[step]``. ``muon.npz``: the same of one case. ``run.npz``: the ids and labels of 4 batches, which take turns for
20 steps; the losses, the norms before clipping, and a parameter afterwards. ``scaler.npz``: ``gradients[step]`` of a parameter
that starts at ``start``, some not finite; what AdamW behind a GradScaler makes of it, ``parameter[step]``, the scales, and with
gradients of two steps summed ``summed.parameter`` and ``summed.scale``.
"""

import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent


def model_of(name: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(HERE / "hf" / name, attn_implementation="eager", dtype="float32")
    model.get_input_embeddings().padding_idx = None  # torch drops the gradient of that row, although the forward pass reads it
    return model


def batch(vocab: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, (2, 12)))
    labels = torch.roll(ids, -1, 1)
    labels[:, -1] = -100
    labels[1, :3] = -100
    return ids, labels


def nll(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())


def gradients(name: str) -> dict[str, np.ndarray]:
    model = model_of(name)
    ids, labels = batch(model.config.vocab_size, 7)
    loss = nll(model, ids, labels)
    loss.backward()
    grads = {k: p.grad.numpy() for k, p in model.named_parameters()}
    return {"ids": ids.numpy(), "labels": labels.numpy(), "loss": loss.detach().numpy(), **grads}


def losses() -> dict[str, np.ndarray]:
    noise = torch.Generator().manual_seed(0)
    x, labels = 2 * torch.randn(3, 4, 7, generator=noise), torch.randint(0, 7, (3, 4), generator=noise)
    padded, weight = labels.clone(), torch.rand(7, generator=noise) + 0.5
    padded[0, 1:] = -100
    operands = {"x": x, "labels": labels, "padded": padded, "weight": weight}
    found = {k: v.numpy() for k, v in operands.items()}

    def add(case: str, f: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor = x) -> None:
        at = at.clone().requires_grad_()
        y = f(at)
        y.backward()
        found[f"{case}.loss"], found[f"{case}.grad"] = y.detach().numpy(), at.grad.numpy()

    def ce(v: torch.Tensor, t: torch.Tensor, **more: object) -> torch.Tensor:
        return F.cross_entropy(v.flatten(0, 1), t.flatten(), **more)

    keep = padded != -100
    add("plain", lambda v: ce(v, labels))
    add("smooth", lambda v: ce(v, padded, label_smoothing=0.2))
    add("weighted", lambda v: ce(v, padded, weight=weight))
    add("weighted_smooth", lambda v: ce(v, padded, weight=weight, label_smoothing=0.2))
    add("z", lambda v: ce(v, padded) + 0.1 * (v.logsumexp(-1)[keep] ** 2).mean())
    other = torch.randn(3, 5, generator=noise)
    found["other"], found["points"] = other.numpy(), x[:, 0, :5].numpy()

    def clip(v: torch.Tensor) -> torch.Tensor:
        logits = math.exp(1.3) * F.normalize(v) @ F.normalize(other).T
        own = torch.arange(3)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    add("contrastive", clip, x[:, 0, :5])
    return found


STEPS = 6
OPTIMIZERS: dict[str, Callable[[list[torch.Tensor], list[torch.Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda m, v: torch.optim.SGD([{"params": m, "weight_decay": 0.1}, {"params": v}], 0.05),
    "momentum": lambda m, v: torch.optim.SGD([{"params": m, "weight_decay": 0.1}, {"params": v}], 0.05, momentum=0.9),
    "nesterov": lambda m, v: torch.optim.SGD(m + v, 0.05, momentum=0.8, nesterov=True),
    "adamw": lambda m, v: torch.optim.AdamW(
        [{"params": m, "weight_decay": 0.1}, {"params": v, "weight_decay": 0.0}], 0.02, betas=(0.8, 0.95), eps=1e-6
    ),
    "adafactor": lambda m, v: torch.optim.Adafactor(
        [{"params": m, "weight_decay": 0.1}, {"params": v, "weight_decay": 0.0}], 0.03
    ),
}


def optimizers() -> dict[str, np.ndarray]:
    noise = torch.Generator().manual_seed(1)
    shapes = {"kernel": (2, 3, 4), "matrix": (4, 3), "bias": (3,)}
    start = {k: torch.randn(s, generator=noise) for k, s in shapes.items()}
    grads = {k: torch.randn(STEPS, *s, generator=noise) * torch.logspace(-1, 1, s[-1]) for k, s in shapes.items()}
    found = {f"start.{k}": p.numpy() for k, p in start.items()} | {f"grad.{k}": g.numpy() for k, g in grads.items()}

    def trace(case: str, schedule: Callable[[int], float] | None, clip: float | None, every: int) -> None:
        params = {k: p.clone().requires_grad_() for k, p in start.items()}
        made = OPTIMIZERS[case if case in OPTIMIZERS else "adamw"]([params["kernel"], params["matrix"]], [params["bias"]])
        rate = torch.optim.lr_scheduler.LambdaLR(made, schedule or (lambda t: 1.0))
        after: dict[str, list[np.ndarray]] = {k: [] for k in params}
        for t in range(STEPS):
            for k, p in params.items():
                g = grads[k][t] / every
                p.grad = g.clone() if t % every == 0 else p.grad + g
            if t % every == every - 1:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(list(params.values()), clip)
                made.step()
                rate.step()
            for k, p in params.items():
                after[k].append(p.detach().numpy().copy())
        found.update({f"{case}.{k}": np.stack(x) for k, x in after.items()})

    for case in OPTIMIZERS:
        trace(case, None, None, 1)
    trace("clipped", None, 1.0, 1)
    trace("accumulated", None, 1.0, 3)
    trace("linear", lambda t: min((t + 1) / 2, (6 - t) / 4), None, 1)
    trace("cosine", lambda t: (t + 1) / 2 if t < 2 else 0.1 + 0.45 * (1 + math.cos(math.pi * (t - 2) / 4)), None, 1)
    return found


def muon() -> dict[str, np.ndarray]:
    """Matrices by Muon, the rest by AdamW; as torch has it but for the precision of the products, bf16 there, here f32."""
    noise = torch.Generator().manual_seed(3)
    shapes = {"tall": (6, 4), "wide": (3, 7), "embedding": (5, 3), "kernel": (2, 3, 4), "bias": (4,)}
    params = {k: torch.randn(s, generator=noise).requires_grad_() for k, s in shapes.items()}
    found = {f"start.{k}": p.detach().numpy().copy() for k, p in params.items()}
    own = torch.optim.Muon(
        [params["tall"], params["wide"]], 0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": [params["embedding"], params["kernel"]], "weight_decay": 0.1},
        {"params": [params["bias"]], "weight_decay": 0.0},
    ]
    others = torch.optim.AdamW(groups, 0.02, betas=(0.8, 0.95), eps=1e-6)
    after: dict[str, list[np.ndarray]] = {x: [] for k in params for x in (k, f"grad.{k}")}
    for _ in range(STEPS):
        for k, p in params.items():
            p.grad = torch.randn(p.shape, generator=noise) * torch.logspace(-1, 1, p.shape[-1])
            after[f"grad.{k}"].append(p.grad.numpy().copy())
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            own.step()
        others.step()
        for k, p in params.items():
            after[k].append(p.detach().numpy().copy())
    return found | {k: np.stack(x) for k, x in after.items()}


def run() -> dict[str, np.ndarray]:
    model = model_of("llama")
    params = dict(model.named_parameters())
    groups = [[p for p in params.values() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    made = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], 3e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(
        made, lambda t: (t + 1) / 5 if t < 5 else 0.5 * (1 + math.cos(math.pi * (t - 5) / 15))
    )
    batches = [batch(model.config.vocab_size, seed) for seed in range(4)]
    trajectory, norms = [], []
    for t in range(20):
        ids, labels = batches[t % 4]
        made.zero_grad()
        loss = nll(model, ids, labels)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)))
        made.step()
        rate.step()
        trajectory.append(loss.item())
    name = "model.layers.1.mlp.down_proj.weight"
    fed = {k: torch.stack(v).numpy() for k, v in zip(("ids", "labels"), zip(*batches))}
    return {**fed, "losses": np.array(trajectory), "norms": np.array(norms), name: params[name].detach().numpy()}


def scaler() -> dict[str, np.ndarray]:
    noise = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(3, generator=noise), torch.randn(16, 3, generator=noise)
    gradients[2, 1], gradients[3, 0], gradients[10, 2] = math.inf, math.nan, -math.inf
    found = {"start": start.numpy(), "gradients": gradients.numpy()}
    for prefix, every in (("", 1), ("summed.", 2)):
        p = start.clone().requires_grad_()
        made = torch.optim.AdamW([p], 0.05, weight_decay=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        after, scales = [], []
        for t, g in enumerate(gradients):
            scaler.scale((p * g).sum() / every).backward()
            if t % every == every - 1:
                scaler.step(made)
                scaler.update()
                made.zero_grad()
            after.append(p.detach().numpy().copy())
            scales.append(scaler.get_scale())
        found |= {f"{prefix}parameter": np.stack(after), f"{prefix}scale": np.array(scales)}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {f"gradients_{n}": gradients(n) for n in ("llama", "gemma3")}
    made |= {"losses": losses(), "optimizers": optimizers(), "muon": muon(), "run": run(), "scaler": scaler()}
    for name, arrays in made.items():
        np.savez_compressed(HERE / "training" / f"{name}.npz", **arrays)
        print(name, sum(a.nbytes for a in arrays.values()), "bytes")
    print(made["run"]["losses"])
