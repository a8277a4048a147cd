"""The page that runs a model in a browser, and its host: ES modules as they are served, without a build step.

Text is split by the npm package @huggingface/tokenizers (Apache-2.0): plain JavaScript without dependencies, 37 kB, by the
authors of the library that Python uses, and read from the same ``tokenizer.json``. ``fetch`` puts it, with its licence,
beside this file.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactError

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "app.js", "model.js", "plan.js", "device.js", "sampling.js", "media.js", "text.js")
TOKENIZERS = ("tokenizers.min.mjs", "tokenizers.LICENSE")


def fetched() -> bool:
    """Whether the JavaScript of the tokenizers is here."""
    return all((HERE / name).exists() for name in TOKENIZERS)


def files(with_tokenizer: bool) -> dict[str, Path]:
    """The files that all web folders share, by name. Raises ArtifactError where the tokenizers are missing."""
    if with_tokenizer and not fetched():
        raise ArtifactError(
            "the JavaScript package of tokenizers is not here: python -m wasat.runtime.web.fetch brings it (once, with npm)"
        )
    return {name: HERE / name for name in (*PAGE, *(TOKENIZERS if fetched() else ()))}
