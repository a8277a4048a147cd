"""What is new stands in one place: each kind of thing is added here from outside, and works (CONTRIBUTING: places to touch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper
from typer.testing import CliRunner
from wasat.frontend.onnx import registry

import wasat as ws
from wasat.cli.app import app


def test_a_converter_is_one_function(tmp_path: Path) -> None:
    node = helper.make_node("Thrice", ["x"], ["y"], domain="test.places", bias=2.0)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("test.places", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=10)
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ws.WasatError, match=r"not supported:\n  test\.places\.Thrice: 1"):
        ws.from_onnx(tmp_path / "m.onnx")

    def thrice(c: Any, n: Any, x: Any) -> Any:
        return c.add(c.mul(x, 3.0), n.attrs["bias"])

    try:
        registry.op("Thrice", domain="test.places", attributes="bias")(thrice)
        got = ws.run(ws.from_onnx(tmp_path / "m.onnx"), x=np.arange(3, dtype=np.float32))
    finally:
        del registry.CONVERTERS["test.places", "Thrice"], registry.ATTRIBUTES["test.places", "Thrice"]
    assert np.array_equal(got["y"], [2, 5, 8])


def test_a_command_is_one_function() -> None:
    own = list(app.registered_commands)
    try:

        @app.command("thrice")
        def thrice(number: int) -> None:
            """Three times as much."""
            typer.echo(str(3 * number))

        assert "Three times as much." in CliRunner().invoke(app, ["--help"]).output
        assert CliRunner().invoke(app, ["thrice", "14"]).output.strip() == "42"
    finally:
        app.registered_commands[:] = own
