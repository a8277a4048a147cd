"""Where a model's numbers come from: readers of files, names of tensors mapped to parameters, strict loading."""

from .load import load_weights
from .safetensors import CheckpointError, FileParam
from .storage import store_as

__all__ = ["CheckpointError", "FileParam", "load_weights", "store_as"]
