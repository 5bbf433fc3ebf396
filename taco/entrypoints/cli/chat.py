"""`taco chat`: talk to a model in the terminal; the answer appears as it is generated."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from taco.entrypoints.chat import ChatOptions, ChatRenderer
from taco.entrypoints.cli.common import add_engine_arguments, add_sampling_arguments, make_llm, sampling_params
from taco.errors import TacoValidationError

if TYPE_CHECKING:
    from taco import LLM, SamplingParams

HELP = "talk to a model in the terminal (the demo model unless --model is given)"

COMMANDS = """\
/reset          forget the conversation
/system [TEXT]  set the system message (without TEXT: remove it) and forget the conversation
/help           show this list
/exit           leave; so does Ctrl-D
Ctrl-C stops an answer."""
# The demo model is small: at a temperature of 1 it rambles.
DEMO_TEMPERATURE = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_arguments(
        parser,
        max_tokens=512,
        description="The model's own values (its generation_config.json) replace the defaults below, except that of "
        "--max-tokens, unless --generation-config vllm is given. The demo model's temperature is "
        f"{DEMO_TEMPERATURE:g}.",
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer lines of standard input until it ends."""
    from taco.sampling_params import RequestOutputKind

    sampling_params(args)
    defaults: dict[str, Any] = {}
    if args.generation_config is None:
        args.generation_config = "auto"
        if args.model is None:
            defaults["temperature"] = DEMO_TEMPERATURE
    with make_llm(args) as llm:
        defaults |= llm.default_sampling_params
        params = sampling_params(args, defaults, output_kind=RequestOutputKind.DELTA)
        conversation = Conversation(llm, params, args.system)
        print(f"{shown_name(llm)}; /help lists the commands.")
        for line in read_lines():
            if line.startswith("/"):
                if not run_command(conversation, line):
                    break
            elif line.strip():
                try:
                    note = conversation.ask(line, write)
                except TacoValidationError as error:
                    note = str(error)
                print(f"\n[{note}]" if note else "")
    return 0


def shown_name(llm: LLM) -> str:
    """What the model is called: of a local path, the last part."""
    name = llm.llm_engine.model_config.served_model_name
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def read_lines() -> Iterator[str]:
    """Lines of the user. Where nobody types, each one is printed, so that the transcript reads well."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and line editing)
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
    else:
        for line in sys.stdin:
            print(f"> {line.rstrip()}")
            yield line.rstrip("\n")


def run_command(conversation: Conversation, line: str) -> bool:
    """Obey a line that begins with a slash; False ends the session."""
    command, _, text = line.strip().partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = text.strip() or None
        conversation.reset()
    elif command == "/help":
        print(COMMANDS)
    else:
        print(f"There is no command {command}.\n{COMMANDS}")
    return True


def write(text: str) -> None:
    """Show a piece of the answer now."""
    print(text, end="", flush=True)


class Conversation:
    """Messages so far, and the engine that answers the next one.

    Raises:
        TacoValidationError: the model cannot chat: it generates no text, or has no chat template.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        config = llm.llm_engine.model_config
        if config.pooler_config is not None:
            raise TacoValidationError(
                f"{shown_name(llm)} cannot chat: it generates no text (its task is {config.task!r}). Give another "
                "--model."
            )
        tokenizer = llm.get_tokenizer()
        behaviour = llm.llm_engine.config.behaviour
        try:
            self._renderer = ChatRenderer(tokenizer, ChatOptions(), behaviour, config.chat_template)
        except TacoValidationError as error:
            if config.chat_template is not None:
                raise
            raise TacoValidationError(
                f"{shown_name(llm)} cannot chat: it has no chat template. Give a --model that is tuned to follow "
                "instructions, or a --chat-template."
            ) from error
        self.llm = llm
        self.params = params
        self.system = system
        self.num_requests = 0
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Generate the answer to one message and remember both.

        Ctrl-C ends the answer; what was generated until then is kept. A message without an answer is forgotten.

        Args:
            text: the user's message.
            write: takes each piece of the answer when it is there.

        Returns:
            What the user should know about how the answer ended; empty after a normal end.

        Raises:
            TacoValidationError: the conversation cannot be rendered or is too long; the message is forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        note = ""
        try:
            request_id = self._add_request()
            engine = self.llm.llm_engine
            with interrupt_flag() as interrupted:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        completion = output.outputs[0]
                        pieces.append(completion.text)
                        write(completion.text)
                        if output.error is not None:
                            note = f"failed: {output.error}"
                        if completion.finish_reason == "length":
                            note = "stopped at the length limit: --max-tokens, or the model's context (then /reset)"
                    if interrupted.is_set():
                        engine.abort_request(request_id)
                        note = "stopped"
                        break
        finally:
            answer = "".join(pieces)
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()
        return note

    def _add_request(self) -> str:
        prompt = self._renderer.render(self.messages)
        self.num_requests += 1
        request_id = f"chat-{self.num_requests}"
        # The template has written the special tokens already.
        self.llm.llm_engine.add_request(
            request_id, prompt, self.params, tokenization_kwargs={"add_special_tokens": False}
        )
        return request_id


@contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C sets a flag, so that no engine step is cut in half; the second one raises."""
    interrupted = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
