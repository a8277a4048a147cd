"""Text that is no graph: refused with its line and a caret, soon and in little memory; no number is changed."""

from __future__ import annotations

import base64
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from wasat.ir import DimError, DimLike, DType, Graph, ParseError, parse, parse_dim, parse_program, symbol
from wasat.ir.dims import floordiv, maximum
from wasat.ir.op import OPS
from wasat.ir.types import type_of

from wasat.testing import random_graph


def _literal(dtype: str, number: str) -> str:
    return f"graph @g(%x: {dtype}[n]) {{\n  %y: {dtype}[n] = add(%x, {number}:{dtype})\n  return %y\n}}"


def _constant(type: str, content: str) -> str:
    return f"graph @g(%x: f32[n]) {{\n  %c: {type} = constant() {{value=dense<{type}, {content}>}}\n  return %c\n}}"


def _size(text: str) -> str:
    return f"graph @g(%x: f32[{text}]) {{\n  return %x\n}}"


def _returns(text: str) -> str:
    return f"graph @g(%x: f32[n], %y: f32[n]) {{\n  return {text}\n}}"


def _packed(data: bytes) -> str:
    return f'"{base64.b64encode(zlib.compress(data)).decode()}"'


def _refused(text: str) -> str:
    """The message, whose caret stands under its last line."""
    with pytest.raises(ParseError) as e:
        parse(text, "g.txt")
    head, source, caret = str(e.value).rsplit("\n", 2)
    assert re.match(r"g\.txt:\d+: ", head)
    assert caret.strip() == "^"
    assert len(caret) <= len(source) + 1
    return head


@pytest.mark.parametrize("dtype, number, message", [
    ("u8", "300", "300 is outside u8, which goes from 0 to 255"), ("u8", "-1", "outside u8"), ("i8", "128", "outside i8"),
    ("i64", "9223372036854775808", "outside i64"), ("i64", "-9223372036854775809", "outside i64"),
    ("u64", "18446744073709551616", "outside u64"), ("i32", "1.5", "1.5 is no integer"), ("i32", "1.0", "is no integer"),
    ("i32", "inf", "inf is no integer"), ("i32", "nan", "nan is no integer"), ("i32", "true", "'true' is no i32"),
    ("f32", "true", "'true' is no f32"), ("bool", "1", "'1' is no bool"), ("f32", "1e39", "1e39 is outside f32"),
    ("f16", "65520", "outside f16"), ("f64", "1e400", "outside f64"), ("bf16", "-1e39", "outside bf16"),
    ("f8e4m3", "1000.0", "outside f8e4m3"), ("f8e4m3", "inf", "outside f8e4m3"), ("f8e8m0", "-1.0", "outside f8e8m0"),
    ("f8e8m0", "0.0", "outside f8e8m0"), ("i64", "1" * 5000, "outside i64"),
])  # fmt: skip
def test_a_number_that_its_type_does_not_hold(dtype: str, number: str, message: str) -> None:
    assert message in _refused(_literal(dtype, number))
    assert message in _refused(_constant(f"{dtype}[1]", number))


@pytest.mark.parametrize("dtype, numbers", [
    ("u8", [0, 255]), ("i8", [-128, 127]), ("i64", [-(2**63), 2**63 - 1]), ("u64", [2**64 - 1]), ("i4", [-8, 7]), ("u4", [15]),
    ("i2", [-2, 1]), ("f16", [65504.0, -65504.0]), ("f8e8m0", [2.0**-127, 2.0**127]), ("f4e2m1", [6.0]),
])  # fmt: skip
def test_the_ends_of_each_type(dtype: str, numbers: list[float]) -> None:
    for number in numbers:
        g = parse(_literal(dtype, str(number)))
        [constant] = [n.output.const for n in g.nodes if n.op.name == "constant"]
        assert constant is not None
        assert constant == np.array(number).astype(DType.of(dtype).np)


@pytest.mark.parametrize("type, content, message", [
    ("i4[1]", "100", "100 is outside i4"), ("f32[2]", "1.0", "1 elements for f32[2]"), ("f32[1]", "foo", "'foo' is no f32"),
    ("f32[2]", '"a"', "no compressed elements"), ("f32[2]", '"YWJj"', "no compressed elements"),
    ("f32[2]", _packed(bytes(7)), "not the 8 bytes"), ("f32[2]", _packed(bytes(9)), "not the 8 bytes"),
    ("f32[2]", f'"{base64.b64encode(zlib.compress(bytes(8))[:-1]).decode()}"', "not the 8 bytes"),
    ("f32[2]", f'"{base64.b64encode(zlib.compress(bytes(8)) + bytes(1)).decode()}"', "not the 8 bytes"),
    ("bool[2]", _packed(b"\x01\x02"), "an element is outside bool"),
    ("i4[2]", _packed(b"\x07\x08"), "an element is outside i4"),
    ("i4[1]", _packed(b"\xf7"), "an element is outside i4"), ("u4[1]", _packed(b"\x10"), "an element is outside u4"),
    ("i2[1]", _packed(b"\x02"), "an element is outside i2"), ("f4e2m1[1]", _packed(b"\x10"), "an element is outside f4e2m1"),
    ("f32[n]", "1.0", "a dense type without symbols"), ("int8b32f16[2]", "1.0", "a dense type without symbols"),
])  # fmt: skip
def test_constants_that_are_none(type: str, content: str, message: str) -> None:
    assert message in _refused(_constant(type, content))


@pytest.mark.parametrize("type, data", [
    ("bool[2]", b"\x00\x01"), ("i4[2]", b"\x07\xf8"), ("u4[2]", b"\x00\x0f"), ("i2[2]", b"\x01\xfe"),
    ("f4e2m1[2]", b"\x00\x0f"),
])  # fmt: skip
def test_packed_elements_at_the_ends(type: str, data: bytes) -> None:
    [node] = parse(_constant(type, _packed(data))).nodes
    assert node.attrs.value.data == data  # type: ignore[attr-defined]


def test_what_is_unpacked_is_bounded_by_the_type() -> None:
    """256 packed MiB for two numbers: two numbers' worth of it is unpacked."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 << 22)) for _ in range(64)) + packer.flush()
    text = _constant("f32[2]", f'"{base64.b64encode(data).decode()}"')
    tracemalloc.start()
    assert "not the 8 bytes" in _refused(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("text, message", [
    ('%x, %"\\q"', "this is no string"), ('"\\ud800"=%x', "this is no string"), ("%x, %x", "two outputs named x"),
    ("x=%y, %x", "two outputs named x"), ("a=%x, a=%y", "two outputs named a"), ("%x, ", "expected a value"),
    ("%x: f32", "expected ','"), ("1:i32", "expected ','"), ("", "expected a value"), ("a=", "expected a value"),
])  # fmt: skip
def test_outputs_that_are_none(text: str, message: str) -> None:
    cut = _returns(text).rstrip("}\n") if "expected" in message else _returns(text)
    assert message in _refused(cut)


@pytest.mark.parametrize("before, after, message", [
    ("%y: f32[n])", "%x: f32[n])", "already has a value %x"),
    ("return", 'param %w: f32[2] = "k"\n  param %v: f32[2] = "k"\n  return', "parameter k is declared twice"),
    ("return", "%z: f32[n] = softmax(%x) {axis=0, axis=0}\n  return", "axis is given twice"),
    ("return", "%z: f32[n] = softmax(%x) {axis=(0,)}\n  return", "softmax"),
    ("return", "%z: f32[n] = softmax(%x) {axis=\"0\"}\n  return", "softmax"),
    ("return", "%z: f32[n] = bitcast(%x) {dtype=(1,)}\n  return", "bitcast"),
    ("return", "%z: f32[n] = softmax(%x) {axis=1e400}\n  return", "axis inf"),
])  # fmt: skip
def test_declarations_that_are_none(before: str, after: str, message: str) -> None:
    assert message in _refused(_returns("%x").replace(before, after, 1))


@pytest.mark.parametrize("size, message", [
    ("n // 0", "division of dimension n by zero"), ("n % 0", "the modulus must be positive"),
    ("-1", "a dimension cannot be -1"),
    ("9223372036854775808", "does not fit into 64 bits"), ("max", "cannot name a dimension"), ("max(n)", "expected ','"),
    ("1" * 100, "does not fit into 64 bits"), ("1.5", "a dimension is an integer"), ("inf", "a dimension is an integer"),
    ("*".join(["(a + b + c + d + e + f + g + h)"] * 20), "a size would have about"),
    ("+".join(f"n{i}" for i in range(5000)), "a size would have about"), ("*".join(["n"] * 5000), "a size would have about"),
    ("(" * 5000 + "n" + ")" * 5000, "nested more than"), ("- " * 5000 + "n", "nested more than"),
    ("max(n, 7 + " * 5000 + "n" + ")" * 5000, "nested more than"),
])  # fmt: skip
def test_sizes_that_are_none(size: str, message: str) -> None:
    assert message in _refused(_size(size))


def test_nesting_of_attributes_is_bounded() -> None:
    deep = "(" * 5000 + "1," + ")" * 5000
    node = f"%z: f32[n] = softmax(%x) {{axis={deep}}}"
    assert "nested more than" in _refused(_returns("%x").replace("return", f"{node}\n  return"))
    bodies = "graph @b(%x: f32[n]) {\n %y: f32[n] = scan(%x) {body=" * 500
    assert "nested more than" in _refused(bodies)


def test_sizes_that_grow_without_end_are_refused() -> None:
    """Each step doubles the text: forty would take all memory."""

    def grown(step: Callable[[DimLike], DimLike]) -> DimLike:
        d: DimLike = symbol("n")
        for _ in range(60):
            d = step(d)
        return d

    with pytest.raises(DimError, match="a size would have about"):
        grown(lambda d: maximum(d % 7, d // 3) * 2 + d)
    with pytest.raises(DimError, match="nested 41 deep"):
        grown(lambda d: floordiv(d + 1, symbol("k") + 3))
    with pytest.raises(DimError, match="is not a dimension"):
        parse_dim("(" * 500 + "n" + ")" * 500)


def test_a_long_line_is_shown_around_the_caret() -> None:
    with pytest.raises(ParseError) as e:
        parse(_size("n, " * 100_000 + "?" + ", n" * 100_000))
    assert len(str(e.value)) < 2000
    _, source, caret = str(e.value).rsplit("\n", 2)
    assert source[len(caret) - 1] == "?"


_WORDS = [
    "0", "-1", "1", "99999999999999999999999", "1.5", "nan", "inf", "true", "none", "%x", "n", "b", "max(", "(", ")", "[",
    "]", "{", "}", "//", "%", "*", "-", ",", ":", "=", "f32", "i4", "bool", "int4b32f16", "int8b0f32", "dense<", "graph @a(",
    "return", "param", '""', '"\\ud800"', '"a"', "\x00", "é", "axis=", "1e400", "9223372036854775808", "(1,)", "()", "(0, 1)",
    "(1.5,)", '("a",)', "((1, 2), (3,))", "n*n", "1:f32", "dense<f32[2], 1 2>", "graph @b() { return }", "(none,)",
]  # fmt: skip
_PIECE = re.compile(r"\s+|[A-Za-z_]\w*|-?\d+\.?\d*(?:e-?\d+)?|\"[^\"]*\"|.", re.DOTALL)


def _texts() -> list[str]:
    """Random graphs, and one graph for each of the operations' samples."""
    found = [str(random_graph(np.random.default_rng(i), nodes=12)) for i in range(20)]
    for op in OPS.values():
        for sample in list(op.samples())[:3]:
            g = Graph("g")
            inputs = [g.add_input(f"x{i}", type_of(x)) for i, x in enumerate(sample.inputs)]
            attrs = op.Attrs(**sample.attrs).canonical(*(v.type for v in inputs))
            g.set_outputs(g.add_node(op, inputs, attrs).outputs)
            found.append(str(g))
    return found


def test_damaged_texts_are_refused_or_read() -> None:
    """Pieces of text exchanged, doubled, lost: what comes is a ParseError, or a graph whose text reads back to itself."""
    rng, texts, read = random.Random(0), _texts(), 0
    for _ in range(3000):
        pieces = _PIECE.findall(rng.choice(texts))
        named = [i for i, p in enumerate(pieces) if p == "=" and pieces[i - 1].isidentifier()]
        attrs = [i + 1 for i in named if pieces[i - 2] in ("{", " ")]
        if attrs and rng.random() < 0.6:
            pieces[rng.choice(attrs)] = rng.choice(_WORDS)
        else:
            i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
            match rng.randrange(5):
                case 0: pieces[i] = rng.choice(_WORDS)  # noqa: E701
                case 1: pieces.insert(i, rng.choice(_WORDS))  # noqa: E701
                case 2: del pieces[i]  # noqa: E701
                case 3: pieces[i], pieces[j] = pieces[j], pieces[i]  # noqa: E701
                case 4: del pieces[i:]  # noqa: E701
        try:
            program = parse_program("".join(pieces))
        except ParseError:
            continue
        read += 1
        assert str(parse_program(str(program))) == str(program)
    assert read > 100
