"""The names of ``wasat``, and what importing them brings in."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wasat as ws


@pytest.mark.parametrize("name", dir(ws))
def test_every_name_is_there(name: str) -> None:
    assert getattr(ws, name) is not None


def test_help_is_a_page() -> None:
    text = pydoc.render_doc(ws, renderer=pydoc.plaintext)
    assert len(text.splitlines()) < 60
    assert set(re.findall(r"[A-Za-z_]\w+", text)) >= set(dir(ws)) - {"__version__"}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'wasat' has no attribute 'nothing'"):
        _ = ws.nothing


def _loaded(code: str) -> set[str]:
    """Packages that a fresh interpreter has loaded after ``code``."""
    show = "; import sys; print(*{m.partition('.')[0] if m[:6] != 'wasat.' else m for m in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_brings_nothing_in() -> None:
    assert _loaded("import wasat").isdisjoint({"tvm", "tvm_ffi", "numpy", "networkx", "wasat.ir", "wasat.runtime"})


def test_the_command_line_loads_what_a_command_needs() -> None:
    assert _loaded("import wasat.cli").isdisjoint({"tvm", "tvm_ffi", "numpy", "wasat.ir", "wasat.runtime"})


def test_no_command_imports_torch_for_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import sys\nsys.modules['torch_was_asked_for'] = sys\nraise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "torch_was_asked_for" in _loaded("import tvm_ffi")
    command = "import sys; sys.argv = ['wasat', '--version']\nfrom wasat.cli import main\ntry: main()\nexcept SystemExit: 0\n"
    loaded = _loaded(command + "import tvm")
    assert {"tvm", "tvm_ffi"} <= loaded
    assert "torch_was_asked_for" not in loaded
    assert "torch_was_asked_for" in _loaded(command + "try: import torch\nexcept ImportError: pass\npass")


def test_graphs_and_passes_need_no_tvm() -> None:
    assert "tvm" not in _loaded("import wasat; wasat.optimize, wasat.run, wasat.from_pretrained, wasat.trace")


def test_the_runtime_needs_no_other_room() -> None:
    loaded = _loaded("import wasat; wasat.load")
    assert "tvm" not in loaded
    assert {m.split(".")[1] for m in loaded if m.startswith("wasat.")} == {"runtime", "errors"}


def test_errors_have_one_root() -> None:
    """What compiles and what runs raise alike, and the name costs no room."""
    from wasat.ir import IRError
    from wasat.runtime import MediaError

    import wasat as ws
    from wasat.errors import WasatError

    assert ws.WasatError is WasatError
    assert issubclass(IRError, ws.WasatError)
    assert issubclass(MediaError, ws.WasatError)
    with pytest.raises(ws.WasatError, match="is no artifact"):
        ws.load("nowhere")
    assert {m for m in _loaded("import wasat; wasat.WasatError") if m.startswith("wasat.")} == {"wasat.errors"}
