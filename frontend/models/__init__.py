"""Model families, by the ``model_type`` of their Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Callable

from wasat.frontend.fields import ConfigError
from wasat.frontend.nn import Module

from . import classic, families, mixtures
from .config import Fields
from .gemma2 import gemma2
from .gemma3 import gemma3_text
from .llama import llama, mistral, qwen2, qwen3

FAMILIES: dict[str, tuple[str, Callable[[Fields], Module]]] = {
    "gemma2": ("Gemma2ForCausalLM", gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", gemma3_text),
    "llama": ("LlamaForCausalLM", llama),
    "mistral": ("MistralForCausalLM", mistral),
    "qwen2": ("Qwen2ForCausalLM", qwen2),
    "qwen3": ("Qwen3ForCausalLM", qwen3),
    "arcee": ("ArceeForCausalLM", families.arcee),
    "bloom": ("BloomForCausalLM", classic.bloom),
    "codegen": ("CodeGenForCausalLM", classic.codegen),
    "cohere": ("CohereForCausalLM", families.cohere),
    "cohere2": ("Cohere2ForCausalLM", families.cohere2),
    "deepseek_v2": ("DeepseekV2ForCausalLM", mixtures.deepseek_v2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", mixtures.deepseek_v3),
    "ernie4_5": ("Ernie4_5ForCausalLM", families.ernie4_5),
    "exaone4": ("Exaone4ForCausalLM", families.exaone4),
    "falcon": ("FalconForCausalLM", classic.falcon),
    "gemma": ("GemmaForCausalLM", families.gemma),
    "glm": ("GlmForCausalLM", families.glm),
    "glm4": ("Glm4ForCausalLM", families.glm4),
    "glm4_moe": ("Glm4MoeForCausalLM", mixtures.glm4_moe),
    "gpt2": ("GPT2LMHeadModel", classic.gpt2),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", classic.gpt_bigcode),
    "gpt_neox": ("GPTNeoXForCausalLM", classic.gpt_neox),
    "gpt_oss": ("GptOssForCausalLM", mixtures.gpt_oss),
    "gptj": ("GPTJForCausalLM", classic.gptj),
    "granite": ("GraniteForCausalLM", families.granite),
    "granitemoe": ("GraniteMoeForCausalLM", mixtures.granitemoe),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", mixtures.granitemoeshared),
    "helium": ("HeliumForCausalLM", families.helium),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", families.hunyuan_v1_dense),
    "lfm2": ("Lfm2ForCausalLM", families.lfm2),
    "llama4_text": ("Llama4ForCausalLM", mixtures.llama4_text),
    "ministral": ("MinistralForCausalLM", families.ministral),
    "mixtral": ("MixtralForCausalLM", families.mixtral),
    "mpt": ("MptForCausalLM", classic.mpt),
    "nemotron": ("NemotronForCausalLM", families.nemotron),
    "olmo": ("OlmoForCausalLM", families.olmo),
    "olmo2": ("Olmo2ForCausalLM", families.olmo2),
    "olmo3": ("Olmo3ForCausalLM", families.olmo3),
    "olmoe": ("OlmoeForCausalLM", families.olmoe),
    "opt": ("OPTForCausalLM", classic.opt),
    "phi": ("PhiForCausalLM", families.phi),
    "phi3": ("Phi3ForCausalLM", families.phi3),
    "qwen2_moe": ("Qwen2MoeForCausalLM", families.qwen2_moe),
    "qwen3_moe": ("Qwen3MoeForCausalLM", families.qwen3_moe),
    "seed_oss": ("SeedOssForCausalLM", families.seed_oss),
    "smollm3": ("SmolLM3ForCausalLM", families.smollm3),
    "stablelm": ("StableLmForCausalLM", families.stablelm),
    "starcoder2": ("Starcoder2ForCausalLM", families.starcoder2),
}
"""``model_type`` -> (the architecture that it builds, the builder)."""

__all__ = ["FAMILIES", "ConfigError", "Fields"]
