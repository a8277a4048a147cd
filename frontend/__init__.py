"""Where graphs come from: the ``nn`` DSL, model families, Hugging Face folders."""

from wasat.ir import CheckpointError

from . import nn
from .huggingface import from_pretrained
from .models import FAMILIES, ConfigError, Fields
from .weights import FileParam, load_weights

__all__ = ["FAMILIES", "CheckpointError", "ConfigError", "Fields", "FileParam", "from_pretrained", "load_weights", "nn"]
