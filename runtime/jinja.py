"""Renders chat templates: a program of its own, to which :mod:`wasat.runtime.template` talks through pipes.

A template comes with a model, from whoever made it, and can loop for ever, fill the memory or nest until the stack ends. Here
it runs within Jinja's sandbox, in the environment that Hugging Face transformers gives it, in a process of bounded memory that
can be ended from outside. Frames are eight bytes of length and as many more: a request is ``marshal`` of (template, variables),
an answer ``.`` and the text, or ``!`` and what was wrong. Nothing of Wasat is imported.
"""

from __future__ import annotations

import json
import marshal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY = 20, 1 << 30
"""What one rendering may take."""


class Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``, by which trainers find answers, is what stands in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class Dict:
    """What templates make dictionaries by: the type itself has attributes that they should not see."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name that begins with an underscore: {name!r}")


def _raise(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """The template, in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": Dict(), "namespace": Namespace}
    return environment.from_string(template)


def answer(request: bytes) -> bytes:
    """The rendered text, or what is wrong."""
    try:
        template, variables = marshal.loads(request)
        return b"." + compiled(template).render(variables).encode("utf-8", "surrogatepass")
    except jinja2.TemplateSyntaxError as e:
        return b"!" + f"line {e.lineno}: {e.message}".encode(errors="replace")
    except MemoryError:
        return b"!it takes more memory than a template may"
    except RecursionError:
        return b"!it is nested too deeply"
    except Exception as e:
        kind = "" if isinstance(e, jinja2.TemplateError) else f"{type(e).__name__}: "
        return b"!" + (kind + (str(e) or type(e).__name__))[:2000].encode(errors="replace")


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def serve(source: BinaryIO, to: BinaryIO) -> None:
    """Answers requests until there are no more."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while head := source.read(8):
        request = source.read(int.from_bytes(head, "little"))
        signal.alarm(SECONDS)  # ends this process, should nobody else
        found = answer(request)
        signal.alarm(0)
        to.write(frame(found))
        to.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
