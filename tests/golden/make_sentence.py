"""Makes ``sentence/*``: tiny random models that embed texts or score pairs, with what the reference makes of them.

    pip install torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0
    python make_sentence.py [CASE ...]
    python make_sentence.py minilm FOLDER          minilm.npz, of all-MiniLM-L6-v2's folder (tests/real/fetch.py minilm.zip)

A folder is one of sentence-transformers or of a reranker: config.json, safetensors, modules.json and the modules' own folders.
golden.npz has ``tokens`` i64[b, s], padded on the right, ``lengths``, perhaps ``types`` and ``skip``, and ``wanted``: hidden
states of transformers (eager attention, CPU, f32) through sentence-transformers' modules, or the scores that its CrossEncoder
makes of the logits. Every parameter is random and of noticeable size.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.sentence_transformer.modules.pooling import Pooling
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

HERE = Path(__file__).parent / "sentence"
SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {"model_type": "bert", **SIZES, "max_position_embeddings": 48, "pad_token_id": 0, "type_vocab_size": 2}
ROBERTA = {"model_type": "roberta", **SIZES, "max_position_embeddings": 50, "pad_token_id": 1, "type_vocab_size": 1}
XLMR = {**ROBERTA, "model_type": "xlm-roberta", "layer_norm_eps": 1e-5}
MPNET = {"model_type": "mpnet", **SIZES, "max_position_embeddings": 200, "relative_attention_num_buckets": 32}
DISTIL = {
    "model_type": "distilbert", "vocab_size": 90, "dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": 48,
}  # fmt: skip
MODERN = {
    "model_type": "modernbert", **SIZES, "num_hidden_layers": 4, "max_position_embeddings": 64, "local_attention": 6,
    "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
NOMIC = {"model_type": "nomic_bert", **SIZES, "max_position_embeddings": 64, "pad_token_id": 0, "type_vocab_size": 2}
GTE = {
    "model_type": "gte", **SIZES, "max_position_embeddings": 64, "pad_token_id": 1, "type_vocab_size": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", **SIZES, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3_text", **SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16,
    "query_pre_attn_scalar": 16, "sliding_window": 8, "max_position_embeddings": 64, "use_bidirectional_attention": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "pad_token_id": 0,
}  # fmt: skip
ELECTRA = {**BERT, "model_type": "electra", "embedding_size": 16}
EURO = {
    "model_type": "eurobert", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
JINA = {
    "model_type": "jina_embeddings_v3", **SIZES, "max_position_embeddings": 64, "pad_token_id": 1, "type_vocab_size": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
LENGTHS = [24, 9, 17, 1]
DENSE = {"type": "Dense", "in_features": 32, "out_features": 24, "bias": True, "activation_function": "Tanh"}

CASES: dict[str, dict] = {
    "bert_mean": {"config": BERT, "modules": [("mean",), "Normalize"]},
    "bert_plain": {"config": BERT, "modules": [("mean",)], "plain": True},
    "bert_cls_dense": {"config": {**BERT, "hidden_act": "gelu_new"}, "modules": [("cls",), DENSE, "Normalize"]},
    "bert_skip": {"config": BERT, "modules": [("cls", "mean", "weightedmean", "max")], "skip": 3},
    "roberta_several": {"config": ROBERTA, "modules": [("max", "mean_sqrt_len_tokens", "weightedmean")]},
    "xlmr_cls": {"config": XLMR, "modules": [("cls",), "Normalize"]},
    "mpnet_mean": {"config": MPNET, "modules": [("mean",), "Normalize"], "lengths": [160, 40, 100]},
    "distilbert_mean": {"config": DISTIL, "modules": [("mean",)]},
    "modernbert_cls": {"config": MODERN, "modules": [("cls",), "Normalize"]},
    "modernbert_bias": {
        "config": {**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True}, "modules": [("mean",)],
    },
    "qwen3_last": {"config": QWEN3, "modules": [("lasttoken",), "Normalize"]},
    "embeddinggemma": {"config": GEMMA, "modules": [
        ("mean",), {**DENSE, "out_features": 40, "bias": False, "activation_function": "Identity"},
        {**DENSE, "in_features": 40, "out_features": 32, "bias": False, "activation_function": "Identity"}, "Normalize",
    ]},
    "bert_score": {"config": BERT, "labels": 1},
    "bert_score_logit": {"config": {**BERT, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
                         "labels": 1},
    "roberta_score": {"config": ROBERTA, "labels": 1},
    "xlmr_score": {"config": XLMR, "labels": 3},
    "mpnet_score": {"config": MPNET, "labels": 1},
    "distilbert_score": {"config": DISTIL, "labels": 2},
    "modernbert_score": {"config": {**MODERN, "classifier_pooling": "mean", "classifier_bias": True}, "labels": 1},
    "qwen3_score": {"config": QWEN3, "labels": 1},
    "nomic_mean": {"config": NOMIC, "modules": [("mean",), "Normalize"]},
    "gte_cls": {"config": GTE, "modules": [("cls",), "Normalize"]},
    "nomic_score": {"config": NOMIC, "labels": 1},
    "gte_score": {"config": {**GTE, "type_vocab_size": 1}, "labels": 1},
    "electra_mean": {"config": ELECTRA, "modules": [("mean",), "Normalize"]},
    "electra_score": {"config": ELECTRA, "labels": 1},
    "eurobert_mean": {"config": EURO, "modules": [("mean",), "Normalize"]},
    "eurobert_score": {"config": EURO, "labels": 1},
    "eurobert_score_mean": {"config": {**EURO, "classifier_pooling": "mean"}, "labels": 2},
    "eurobert_score_first": {"config": {**EURO, "classifier_pooling": "bos"}, "labels": 1},
    "jina_mean": {"config": JINA, "modules": [("mean",), "Normalize"]},
    "jina_score": {"config": JINA, "labels": 1},
}  # fmt: skip


def randomize(model: torch.nn.Module, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            mean, std = 0.0, 0.5 if "embed" in name or "bias" in name else 1.2 * p.shape[1] ** -0.5
        else:
            mean, std = float("norm" in name.lower() and "weight" in name and "Gemma" not in type(model).__name__), 0.3
        p.data = mean + std * torch.randn(p.shape, generator=noise)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def embedded(case: dict, folder: Path, hidden: torch.Tensor, mask: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """What the modules make of hidden states; writes them into the folder."""
    listed = [("Transformer", "")]
    features = {"token_embeddings": hidden, "attention_mask": mask}
    if case.get("skip"):
        features["prompt_length"] = case["skip"]
    for i, given in enumerate(case["modules"], 1):
        if given == "Normalize":
            listed.append(("Normalize", f"{i}_Normalize"))
            features["sentence_embedding"] = torch.nn.functional.normalize(features["sentence_embedding"], p=2, dim=1)
        elif isinstance(given, tuple):
            listed.append(("Pooling", f"{i}_Pooling"))
            features = Pooling(hidden.shape[-1], given, not case.get("skip"))(features)
            names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken",
                     "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}  # fmt: skip
            modes = {f"pooling_mode_{v}": k in given for k, v in names.items()} if len(given) == 1 else {"pooling_mode": given}
            write(folder / listed[-1][1] / "config.json", {
                "word_embedding_dimension": hidden.shape[-1], **modes, "include_prompt": not case.get("skip"),
            })  # fmt: skip
        else:
            listed.append(("Dense", f"{i}_Dense"))
            act = given["activation_function"]
            dense = Dense(given["in_features"], given["out_features"], given["bias"], getattr(torch.nn, act)())
            for p in dense.parameters():
                p.data = 0.3 * torch.randn(p.shape, generator=noise)
            features = dense(features)
            where = "linear" if act == "Identity" else "activation"
            write(folder / listed[-1][1] / "config.json", {
                **{k: given[k] for k in ("in_features", "out_features", "bias")},
                "activation_function": f"torch.nn.modules.{where}.{act}",
            })  # fmt: skip
            save_file({k: v.contiguous() for k, v in dense.state_dict().items()}, folder / listed[-1][1] / "model.safetensors")
    if not case.get("plain"):
        write(folder / "modules.json", [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(listed)
        ])  # fmt: skip
        write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    return features["sentence_embedding"]


def make(name: str, case: dict, folder: Path) -> None:
    seed = list(CASES).index(name)
    given = {**case["config"], **({"num_labels": case["labels"]} if "labels" in case else {})}
    config = AutoConfig.for_model(**given, attn_implementation="eager", dtype="float32")
    kind = AutoModelForSequenceClassification if "labels" in case else AutoModel
    model = kind.from_config(config, attn_implementation="eager").eval()
    randomize(model, seed)
    lengths = np.array(case.get("lengths", LENGTHS))
    pad = config.pad_token_id or 0
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, config.vocab_size, (len(lengths), lengths.max()))
    mask = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int64)
    tokens = np.where(mask, tokens, pad)
    arrays = {"tokens": tokens, "lengths": lengths}
    more = {}
    if name.startswith(("bert_score", "electra_score", "nomic_score")):
        arrays["types"] = np.where(np.arange(tokens.shape[1]) >= lengths[:, None] // 2, mask, 0)
        more["token_type_ids"] = torch.from_numpy(arrays["types"])
    if case.get("skip"):
        lengths[3] = 5
        mask[3, :5], tokens[3, :5] = 1, 7
        arrays["skip"] = np.full(len(lengths), case["skip"])
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), **more)
        if "labels" in case:
            wanted = out.logits
            if case["labels"] == 1:
                wanted = wanted[:, 0] if "sentence_transformers" in case["config"] else torch.sigmoid(wanted)[:, 0]
        else:
            noise = torch.Generator().manual_seed(seed)
            wanted = embedded(case, folder, out.last_hidden_state, torch.from_numpy(mask), noise)
    np.savez_compressed(folder / "golden.npz", **arrays, wanted=wanted.numpy())
    print(f"{name}: {list(wanted.shape)} within {wanted.abs().max():.2f}")


TEXTS = [
    "A man is eating food.", "Someone has lunch.", "The girl is carrying a baby.", "", "word " * 400, "Ünïcödé 你好 🙂 naïve",
    "How do I read a file, line by line, in Python?", "with open(path) as f:\n    for line in f: print(line)", "x",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 9, "The capital of France is Paris.", "Paris",
]  # fmt: skip


def minilm(folder: str) -> None:
    wanted = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(TEXTS)
    np.savez_compressed(HERE / "minilm.npz", texts=np.array(TEXTS), wanted=wanted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["minilm"]:
        raise SystemExit(minilm(sys.argv[2]))
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name], HERE / name)
    versions = {m.__name__: m.__version__ for m in (transformers, torch, np, sentence_transformers)}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
