"""Makes ``onnx/*``: tiny random transformers models as torch exports them, with their outputs as golden values.

    pip install torch==2.13.0 transformers==5.23.0 onnx onnxscript
    python make_onnx.py [CASE ...]

Per case ``NAME.onnx`` (float32, no cache, symbolic batch and sequence) and ``NAME.npz``: ``in.*`` under the model's input
names and ``out``, of eager execution on the CPU, at sizes other than those of the export and longer than every window.
Stack traces and the like that the exporters leave beside nodes are dropped; nodes, names and numbers are as they come.
"""

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxscript
import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

HERE = Path(__file__).parent / "onnx"
DIM, HEADS, VOCAB, MEMORY = 32, 4, 40, 20
DECODER = {
    "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class Causal(torch.nn.Module):
    """Logits of a decoder, from tokens and whatever else the case names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


class CausalMasked(Causal):
    def forward(self, input_ids, attention_mask, position_ids):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits


class CausalPast(Causal):
    """With keys and values of the past as inputs, those of past and present as outputs."""

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = transformers.DynamicCache()
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return (out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)))


class Placed(Causal):
    """A decoder of text and pictures: positions by time, height and width; its head made here."""

    def __init__(self, model):
        super().__init__(model)
        self.head = torch.nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, input_ids, position_ids=None):
        seen = torch.ones_like(input_ids)
        out = self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=seen, use_cache=False)
        return self.head(out.last_hidden_state)


class Encoder(Causal):
    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Vision(Causal):
    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).last_hidden_state


class Audio(Causal):
    def forward(self, input_features):
        return self.model.model.encoder(input_features).last_hidden_state


class Translator(Causal):
    """The decoder of an encoder-decoder, over what the encoder made."""

    def forward(self, input_ids, encoder_hidden_states):
        memory = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=encoder_hidden_states)
        return self.model(decoder_input_ids=input_ids, encoder_outputs=memory, use_cache=False).logits


def gpt2(attention):
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_embd=DIM, n_layer=2, n_head=HEADS, n_positions=64, n_inner=32, attn_implementation=attention,
        bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def llama(attention):
    return LlamaForCausalLM(LlamaConfig(**DECODER, attn_implementation=attention))


def qwen3(attention):
    return Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=16, attn_implementation=attention))


def gptj(attention):
    """Cosines and sines in a table, neighbours turned, half of each head."""
    return GPTJForCausalLM(GPTJConfig(
        vocab_size=VOCAB, n_embd=DIM, n_layer=2, n_head=HEADS, n_positions=64, n_inner=32, rotary_dim=4,
        attn_implementation=attention, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def neox(attention):
    """One frequency, which is 1."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**DECODER, attn_implementation=attention))


def qwen2_vl(attention):
    return Qwen2VLTextModel(Qwen2VLTextConfig(**DECODER, rope_parameters={
        "rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}, attn_implementation=attention))  # fmt: skip


def qwen3_vl(attention):
    """Height and width stand between the features of time."""
    return Qwen3VLTextModel(Qwen3VLTextConfig(**DECODER, head_dim=16, rope_parameters={
        "rope_type": "default", "rope_theta": 100.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True,
    }, attn_implementation=attention))  # fmt: skip


def gemma3(attention):
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**{
        **DECODER, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5, "layer_types": kinds,
    }, attn_implementation=attention))  # fmt: skip


def bert(attention):
    return BertModel(BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=32,
        max_position_embeddings=64, attn_implementation=attention,
    ), add_pooling_layer=False)  # fmt: skip


def vit(attention):
    return ViTModel(ViTConfig(
        hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=32, image_size=16, patch_size=4,
        attn_implementation=attention,
    ), add_pooling_layer=False)  # fmt: skip


def whisper(attention):
    return WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=VOCAB, d_model=DIM, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=MEMORY,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        attn_implementation=attention,
    ))  # fmt: skip


T5 = {
    "vocab_size": VOCAB, "d_model": DIM, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": HEADS,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip


def t5(attention):
    return T5ForConditionalGeneration(T5Config(**T5, attn_implementation=attention))


def t5_encoder(attention):
    return T5EncoderModel(T5Config(**T5, attn_implementation=attention))


TOKENS = {"input_ids": {0: "b", 1: "s"}}
MASKED = {**TOKENS, "attention_mask": {0: "b", 1: "s"}}
PLACED = {**MASKED, "position_ids": {0: "b", 1: "s"}}
WITH_PAST = {
    **PLACED, "attention_mask": {0: "b", 1: "t + s"},
    **{f"past_key_values.{i}.{x}": {0: "b", 2: "t"} for i in range(2) for x in ("key", "value")},
}  # fmt: skip
KINDS = {**TOKENS, "position_ids": {1: "b", 2: "s"}}
PIXELS = {"pixel_values": {0: "b"}}
SOUND = {"input_features": {0: "b"}}
PAIR = {**TOKENS, "encoder_hidden_states": {0: "b", 1: "t"}}


@dataclass(frozen=True)
class Case:
    model: Callable
    attention: str
    exporter: str
    """``dynamo`` (``_23``: operator set 23, which has Attention) or ``legacy``."""
    wrap: type = Causal
    axes: dict = field(default_factory=lambda: TOKENS)


CASES = {
    "gpt2_eager": Case(gpt2, "eager", "dynamo"),
    "gpt2_sdpa_legacy": Case(gpt2, "sdpa", "legacy", CausalMasked, PLACED),
    "llama_sdpa": Case(llama, "sdpa", "dynamo"),
    "llama_sdpa_23": Case(llama, "sdpa", "dynamo_23"),
    "llama_masked": Case(llama, "eager", "dynamo", CausalMasked, PLACED),
    "llama_legacy": Case(llama, "eager", "legacy", CausalMasked, PLACED),
    "llama_past": Case(llama, "eager", "legacy", CausalPast, WITH_PAST),
    "qwen3_sdpa": Case(qwen3, "sdpa", "dynamo"),
    "gptj": Case(gptj, "eager", "dynamo"),
    "gptj_legacy": Case(gptj, "eager", "legacy", CausalMasked, PLACED),
    "neox": Case(neox, "sdpa", "dynamo"),
    "qwen2_vl": Case(qwen2_vl, "eager", "dynamo", Placed, KINDS),
    "qwen2_vl_alone_legacy": Case(qwen2_vl, "eager", "legacy", Placed),
    "qwen3_vl_legacy": Case(qwen3_vl, "eager", "legacy", Placed, KINDS),
    "gemma3_eager": Case(gemma3, "eager", "dynamo"),
    "gemma3_sdpa_legacy": Case(gemma3, "sdpa", "legacy", CausalMasked, PLACED),
    "bert_eager": Case(bert, "eager", "dynamo", Encoder, MASKED),
    "bert_sdpa_legacy": Case(bert, "sdpa", "legacy", Encoder, MASKED),
    "vit_sdpa": Case(vit, "sdpa", "dynamo", Vision, PIXELS),
    "vit_legacy": Case(vit, "eager", "legacy", Vision, PIXELS),
    "whisper_encoder": Case(whisper, "sdpa", "dynamo", Audio, SOUND),
    "whisper_decoder": Case(whisper, "eager", "dynamo", Translator, PAIR),
    "t5_encoder": Case(t5_encoder, "eager", "dynamo", Encoder, MASKED),
    "t5_decoder_legacy": Case(t5, "eager", "legacy", Translator, PAIR),
}


def sample(axes: dict, sizes: dict, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Inputs at these sizes. Masks hide the end of the first row."""
    out = {}
    for name in axes:
        b, s, t = (sizes[k] for k in "bst")
        past = t if axes is WITH_PAST else 0
        if name == "input_ids":
            x = rng.integers(3, VOCAB, (b, s))
        elif name == "attention_mask":
            n = past + s
            x = (np.arange(n)[None] < np.where(np.arange(b) == 0, n - 3, n)[:, None]).astype(np.int64)
        elif axes is KINDS:
            x = rng.integers(0, 2, (3, b, s)).cumsum(-1)
        elif name == "position_ids":
            x = np.broadcast_to(past + np.arange(s), (b, s)).copy()
        elif name.startswith("past"):
            x = rng.standard_normal((b, 2, past, DIM // HEADS)).astype(np.float32)
        else:
            shape = {"pixel_values": (b, 3, 16, 16), "input_features": (b, 8, 2 * MEMORY)}.get(name, (b, t, DIM))
            x = rng.standard_normal(shape).astype(np.float32)
        out[name] = torch.from_numpy(np.asarray(x))
    return out


def randomize(model: torch.nn.Module) -> None:
    """Every parameter random: matrices keep the size of what they multiply, norms and biases spread by 0.3."""
    noise = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.data = 1.2 * p[0].numel() ** -0.5 * torch.randn(p.shape, generator=noise)
        else:
            mean = 1.0 if name.endswith("weight") and not isinstance(model, Gemma3ForCausalLM) else 0.0
            p.data = mean + 0.3 * torch.randn(p.shape, generator=noise)


def make(name: str, case: Case) -> None:
    torch.manual_seed(0)
    model = case.model(case.attention).eval()
    randomize(model)
    wrapped = case.wrap(model).eval()
    rng = np.random.default_rng(3)
    traced, golden = (sample(case.axes, dict(zip("bst", sizes)), rng) for sizes in ((2, 7, 5), (3, 13, 9)))
    path = HERE / f"{name}.onnx"
    present = [name.replace("past_key_values", "present") for name in case.axes if name.startswith("past")]
    common = {"input_names": list(case.axes), "output_names": ["out", *present], "external_data": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = wrapped(*golden.values())
        out = out[0] if isinstance(out, tuple) else out
        if case.exporter == "legacy":
            del common["external_data"]
            torch.onnx.export(
                wrapped, tuple(traced.values()), str(path), dynamo=False, opset_version=17, dynamic_axes=case.axes, **common
            )
        else:
            opset = 23 if case.exporter.endswith("_23") else 18
            torch.onnx.export(
                wrapped, (), str(path), kwargs=traced, dynamo=True, opset_version=opset, dynamic_shapes=case.axes,
                verbose=False, **common,
            )  # fmt: skip
    strip(path)
    arrays = {f"in.{k}": v.numpy() for k, v in golden.items()}
    np.savez_compressed(path.with_suffix(".npz"), out=out.numpy(), **arrays)
    print(f"{name}: {path.stat().st_size} bytes")


def strip(path: Path) -> None:
    """Drops what tells where in Python a node came from."""
    model = onnx.load(path)
    for graph in [model.graph, *model.functions]:
        del graph.metadata_props[:]
        for item in [*graph.node, *graph.value_info, *getattr(graph, "initializer", ())]:
            del item.metadata_props[:]
            item.doc_string = ""
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    onnx.save(model, path)


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name])
    versions = {m.__name__: m.__version__ for m in (torch, transformers, onnx, onnxscript, np)}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
