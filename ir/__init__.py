"""The graph IR: dimensions, types, values, nodes, graphs, programs, operations, text."""

from . import ops
from .builder import Builder, build
from .checks import check_text, require_equal
from .dim_text import parse_dim
from .dims import (
    Dim,
    DimLike,
    equal,
    evaluate_dim,
    less_equal,
    maximum,
    minimum,
    substitute,
    symbol,
    symbols_of,
)
from .errors import (
    CheckpointError,
    DimError,
    IRError,
    Loc,
    NotDifferentiable,
    ParseError,
    TypeMismatch,
    VerifyError,
    WasatError,
)
from .evaluate import bind_symbols, evaluate, run_node, run_nodes
from .graph import ArrayParam, DerivedParam, Graph, Node, ParamSource, Value, copy_node, is_table
from .interface import Embedder, Encoder, Generation, Head, Interface, Media, Origin, State
from .op import OPS, Attrs, Body, ErrorSample, Literal, Op, Sample, op_named, register
from .parser import parse, parse_program, parse_type
from .printer import graph_text, interface_text, node_text
from .program import Program
from .solve import solve
from .types import Array, BlockArray, DType, QArray, QTensorType, TensorType, Type, type_of
from .verify import verify

__all__ = [
    "OPS", "Array", "ArrayParam", "Attrs", "BlockArray", "Body", "Builder", "CheckpointError", "DType", "DerivedParam", "Dim",
    "DimError", "DimLike", "Embedder", "Encoder", "ErrorSample", "Generation", "Graph", "Head", "IRError", "Interface",
    "Literal", "Loc", "Media", "Node", "NotDifferentiable", "Op", "Origin", "ParamSource", "ParseError", "Program", "QArray",
    "QTensorType", "Sample", "State", "TensorType", "Type", "TypeMismatch", "Value", "VerifyError", "WasatError",
    "bind_symbols", "build", "check_text", "copy_node", "equal", "evaluate", "evaluate_dim", "graph_text", "interface_text",
    "is_table", "less_equal", "maximum", "minimum", "node_text", "op_named", "ops", "parse", "parse_dim", "parse_program",
    "parse_type", "register", "require_equal", "run_node", "run_nodes", "solve", "substitute", "symbol", "symbols_of",
    "type_of", "verify",
]  # fmt: skip
