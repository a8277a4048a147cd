"""Model families, by the ``model_type`` of their Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Callable

from wasat.frontend.fields import ConfigError
from wasat.frontend.nn import Module

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
}
"""``model_type`` -> (the architecture that it builds, the builder)."""

__all__ = ["FAMILIES", "ConfigError", "Fields"]
