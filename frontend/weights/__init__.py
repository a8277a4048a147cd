"""Where a model's numbers come from: readers of files, names of tensors mapped to parameters, strict loading."""

from .load import load_weights
from .safetensors import FileParam
from .storage import StoredTensor, store_as

__all__ = ["FileParam", "StoredTensor", "load_weights", "store_as"]
