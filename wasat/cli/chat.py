"""``wasat chat``: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from wasat.cli.console import MinP, Refusal, RepetitionPenalty, Seed, Stop, Temperature, TopK, TopP, err, text_file

if TYPE_CHECKING:
    from wasat.runtime import Model

_HELP = """\
/help             this
/image FILE       a picture for the next message; /audio and /video likewise, of models that take them
/system TEXT      what the model is told before all messages; without a text: nothing
/undo             take the last message and its answer back
/retry            answer the last message again
/reset            begin anew
/save FILE        write the conversation as JSON (the messages, as model.chat takes them)
/load FILE        go on with a conversation that was saved
/exit             end; end of input does, too
A line that ends with \\ goes on in the next one. // begins a message with a /. Ctrl-C stops an answer; twice, at once.
"""


def chat(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder made by `wasat compile`.", show_default=False)],
    system: Annotated[str | None, typer.Option(help="What the model is told before all messages.", show_default=False)] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture for the first message; repeatable.", show_default=False)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="A file of a chat template, or the name of one of the model's.", show_default=False)
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="A JSON file: a list of tools, passed through to the template.", show_default=False)
    ] = None,
    variable: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="`NAME=VALUE` for the template, e.g. `enable_thinking=false`; repeatable.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", show_default=False)] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the answers.")] = False,
) -> None:
    """Talk with a model. Needs the artifact and the runtime, not the compiler; `pip install 'wasat[chat]'`.

    The artifact must have a chat template: models that were trained on conversations bring one. `/help` lists what else can be
    said. What the model has read of a conversation is kept, so each message costs only its own tokens.

    Examples:

    - `wasat chat smollm2.wasat`
    - `wasat chat qwen3.wasat --set enable_thinking=false --temperature 0.7 --top-p 0.8 --system "Answer in French."`
    - `echo "What is 2 + 3?" | wasat chat smollm2.wasat --quiet`
    - `wasat chat gemini.wasat --template gemini.jinja --image photo.jpg`
    """
    from wasat import runtime

    model = runtime.load(artifact)
    given: dict[str, Any] = {
        "max_tokens": max_tokens, "tools": _json(tools) if tools else None, "template": _template(template),
        "variables": dict(map(_variable, variable or ())), "stop": stop or [],
        "options": runtime.SamplingOptions(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
        ),
    }  # fmt: skip
    model.conversation.ends(given["template"], given["tools"])  # refused now rather than after the first message
    _Conversation(model, given, system, image or [], quiet).run()


class _Conversation:
    """The loop: a line in, an answer out."""

    def __init__(self, model: Model, given: dict[str, Any], system: str | None, images: list[Path], quiet: bool) -> None:
        self.model, self.given, self.quiet = model, given, quiet
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        """Media for the next message."""
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._say(_HELP), "system": self._system, "undo": self._undo, "retry": self._retry,
            "reset": self._reset, "save": self._save, "load": self._load,
            **{kind: partial(self._medium, kind) for kind in ("image", "audio", "video")},
        }  # fmt: skip
        if system:
            self._system(system)
        for path in images:
            self._medium("image", str(path))

    def run(self) -> None:
        from wasat.runtime import RuntimeErrorBase

        terminal = sys.stdin.isatty()
        if terminal:
            with suppress(ImportError):
                import readline  # noqa: F401
            if not self.quiet:
                self._say(f"{self.model.manifest.interface.name}: /help says what there is, /exit ends")
        while (line := self._line(terminal)) is not None:
            command, _, rest = line[1:].partition(" ") if line.startswith("/") and not line.startswith("//") else ("", "", "")
            if command in ("exit", "quit", "bye"):
                break
            try:
                if not command:
                    text = line[1:] if line.startswith("//") else line
                    if text.strip() or self.waiting:
                        self._send(text)
                elif command in self._commands:
                    self._commands[command](rest.strip())
                else:
                    raise Refusal(f"there is no /{command}; /help lists what there is")
            except KeyboardInterrupt:  # pressed twice: what was read is forgotten, the conversation is as before
                sys.stdout.write("\n")
            except (Refusal, RuntimeErrorBase, OSError) as e:
                if not terminal:
                    raise
                err.print(f"[bold red]error:[/] {escape(str(e))}", highlight=False, soft_wrap=True)

    def _line(self, terminal: bool) -> str | None:
        """What is typed next; None at the end. Ctrl-C empties the line."""
        text = ""
        while True:
            try:
                text += input(("> " if not text else ". ") if terminal else "")
            except EOFError:
                return text or None
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                text = ""
                continue
            if not text.endswith("\\"):
                return text
            text = text[:-1] + "\n"

    def _say(self, text: str) -> None:
        err.print(text.rstrip("\n"), style="dim", markup=False, highlight=False, soft_wrap=True)

    # -- turns -----------------------------------------------------------------------------------------------------------
    def _send(self, text: str) -> None:
        content: Any = [*self.waiting, {"type": "text", "text": text}] if self.waiting else text
        held = list(self.messages)
        self.messages.append({"role": "user", "content": content})
        try:
            self._answer()
        except BaseException:
            self.messages = held  # perhaps with an answer, while what it took was being shown
            raise
        self.waiting = []

    def _answer(self) -> None:
        """Streams the answer to the messages, and adds it to them."""
        def write(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        with _interruptible() as interrupted:
            reply = self.model.chat(self.messages, stream=write, interrupted=interrupted, **self.given)
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages.append(reply.message)
        if not self.quiet:
            self._say(reply.summary())

    def _undo(self, _: str) -> None:
        """Back to before the last message of the user."""
        at = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)
        if at is None:
            raise Refusal("there is nothing to take back")
        del self.messages[at:]

    def _retry(self, _: str) -> None:
        if not any(m["role"] == "user" for m in self.messages):
            raise Refusal("there is no message to answer")
        held = list(self.messages)
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        try:
            self._answer()
        except BaseException:
            self.messages = held
            raise

    def _reset(self, _: str) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self.waiting = []

    def _system(self, text: str) -> None:
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def _medium(self, kind: str, file: str) -> None:
        spec = self.model.manifest.interface.media
        if spec is None or kind not in spec.kinds:
            raise Refusal(f"the model takes no {kind}; it takes {', '.join(['text', *(spec.kinds if spec else ())])}")
        if not Path(file).is_file():
            raise Refusal(f"/{kind} FILE: there is no file {file!r}")
        self.waiting.append({"type": kind, kind: str(Path(file).resolve())})

    # -- files -----------------------------------------------------------------------------------------------------------
    def _save(self, file: str) -> None:
        if not file:
            raise Refusal("/save FILE: say where")
        part = Path(file).with_name(f".{Path(file).name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            part.replace(file)
        except (OSError, ValueError) as e:  # of characters that UTF-8 has not, which a loaded file may hold
            raise Refusal(f"{file} cannot be written: {e.strerror if isinstance(e, OSError) else e}") from None
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        if not self.quiet:
            self._say(f"{file}: {len(self.messages)} messages")

    def _load(self, file: str) -> None:
        if not file:
            raise Refusal("/load FILE: say which")
        found = _json(Path(file))
        if not isinstance(found, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found):
            raise Refusal(f"{file} is no list of messages with a role each")
        self.messages = found


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is remembered, and not raised amid a step; the second time it is raised."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _template(given: str | None) -> str | None:
    """A template's text where that is a file."""
    if given is None or not Path(given).is_file():
        return given
    return text_file(Path(given))


def _variable(item: str) -> tuple[str, Any]:
    name, sign, value = item.partition("=")
    if not name or not sign:
        raise Refusal(f"--set {item!r}: write NAME=VALUE, e.g. enable_thinking=false")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise Refusal(f"{path} cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise Refusal(f"{path} is no JSON file: {e}") from None


__all__ = ["chat"]
