"""What a deployed machine needs and no more: artifacts, sessions, sampling, generation.

    from wasat import runtime
    model = runtime.load("model.wasat")
    print(model.generate("def main():", max_tokens=50)[0].text)

Needs NumPy, apache-tvm-ffi and, for text, tokenizers; neither TVM's compiler nor any other room of Wasat.
"""

from .artifact import write_artifact
from .chat import Chat, Reply
from .errors import ArtifactError, ContextLimitError, InputError, MediaError, ModelError, RuntimeErrorBase
from .generate import Generation
from .media import Audio, Image, Video
from .model import Model, load
from .sampling import SamplingOptions, TokenLogprob
from .session import Session
from .tokenizer import Tokenizer

__all__ = [
    "ArtifactError", "Audio", "Chat", "ContextLimitError", "Generation", "Image", "InputError", "MediaError", "Model",
    "ModelError", "Reply", "RuntimeErrorBase", "SamplingOptions", "Session", "TokenLogprob", "Tokenizer", "Video", "load",
    "write_artifact",
]  # fmt: skip
