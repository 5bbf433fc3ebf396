"""The command `taco`, with an engine that echoes instead of a model."""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import taco
from taco.engine.arg_utils import EngineArgs
from taco.entrypoints.cli import chat, demo, generate
from taco.entrypoints.cli.main import main
from taco.errors import BatchValidationError, TacoValidationError
from taco.outputs import CompletionOutput, RequestOutput
from taco.sampling_params import RequestOutputKind, SamplingParams


def completion(text: str, finish_reason: str | None = "stop", index: int = 0) -> CompletionOutput:
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=list(text.encode()),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=finish_reason,
    )


def request_output(request_id: str, text: str, finish_reason: str | None = "stop", n: int = 1) -> RequestOutput:
    outputs = [completion(text, finish_reason, index) for index in range(n)]
    return RequestOutput(request_id, None, [1, 2, 3], None, outputs, finish_reason is not None)


class EchoTokenizer:
    """Renders the last message alone, after a template's text."""

    def get_chat_template(self, chat_template: str | None, tools: None) -> str:
        return chat_template or ""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, chat_template: str, tokenize: bool, **kwargs: bool
    ) -> str:
        assert not tokenize
        return chat_template + messages[-1]["content"]


class EchoEngine:
    """Streams a prompt back in capitals, one character a step. "^" in a prompt is a Ctrl-C while it is its turn."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(
            model="/some/model.gguf", served_model_name="echo", dtype="float32", chat_template=None
        )
        self.device_config = SimpleNamespace(device="cpu")
        self.pending: list[tuple[str, str]] = []
        self.params: list[SamplingParams] = []

    def add_request(
        self, request_id: str, text: str, params: SamplingParams, *, tokenization_kwargs: dict[str, bool]
    ) -> None:
        assert tokenization_kwargs == {"add_special_tokens": False}
        if len(text) > 100:
            raise TacoValidationError("the prompt is too long")
        self.params.append(params)
        self.pending.append((request_id, text.upper()))

    def has_unfinished_requests(self) -> bool:
        return bool(self.pending)

    def abort_request(self, request_id: str) -> None:
        self.pending = [entry for entry in self.pending if entry[0] != request_id]

    def step(self) -> list[RequestOutput]:
        request_id, text = self.pending.pop()
        if text[0] == "^":
            signal.raise_signal(signal.SIGINT)
        if text[1:]:
            self.pending.append((request_id, text[1:]))
        finish_reason = None if text[1:] else "length" if text == "$" else "stop"
        return [request_output(request_id, text[0], finish_reason)]


class EchoLLM:
    """Answers with the prompt in capitals; "bad" is a prompt that is not valid."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs
        self.llm_engine = EchoEngine()
        self.closed = False

    def __enter__(self) -> EchoLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True

    def get_tokenizer(self) -> EchoTokenizer:
        return EchoTokenizer()

    def generate(self, prompts: list[dict[str, Any]], params: SamplingParams, on_error: str) -> list[RequestOutput]:
        self.params = params
        texts = [prompt["prompt"] if "prompt" in prompt else str(prompt["prompt_token_ids"]) for prompt in prompts]
        if "bad" in texts and on_error == "raise":
            raise BatchValidationError({texts.index("bad"): "is bad"}, len(texts))
        outputs = [request_output(str(index), text.upper(), n=params.n) for index, text in enumerate(texts)]
        for output, text in zip(outputs, texts, strict=True):
            if text == "bad":
                output.error = "is bad"
        return outputs

    def chat(self, messages: list[Any], params: SamplingParams, **kwargs: Any) -> list[RequestOutput]:
        prompts = [{"prompt": conversation[-1]["content"]} for conversation in messages]
        return self.generate(prompts, params, kwargs.get("on_error", "raise"))


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EchoLLM]]:
    """The commands make echo engines; those that were made."""
    made: list[EchoLLM] = []

    def make(**kwargs: Any) -> EchoLLM:
        made.append(EchoLLM(**kwargs))
        return made[-1]

    monkeypatch.setitem(vars(taco), "LLM", make)
    yield made
    assert all(llm.closed for llm in made)


def give_input(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ---------------------------------------------------------------------------------------------------------------- main


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_no_large_library(flag: str) -> None:
    code = (
        "import sys\nfrom taco.entrypoints.cli.main import main\n"
        f"try:\n    main([{flag!r}])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'taco.engine.arg_utils') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"taco {taco.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["serve"], ["generate", "--temprature", "1"]])
def test_wrong_command_line_is_a_usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: taco" in capsys.readouterr().err


@pytest.mark.parametrize("module", [generate, chat])
def test_engine_flags_replace_no_flag_of_a_command(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, own = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    EngineArgs.add_cli_args(engine)
    monkeypatch.setattr(module, "add_engine_arguments", lambda parser: None)
    module.add_arguments(own)
    assert own._option_string_actions
    assert not set(own._option_string_actions) & set(engine._option_string_actions)


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_help_of_a_command_names_the_default_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ("(default: that of `taco demo`)" in " ".join(text.split())) == (command != "demo")


def test_error_of_taco_is_one_message_and_status_1(echo: list[EchoLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "m", "--prompt", "good", "--prompt", "bad"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("taco generate: error: 1 of 2 rows is not valid")
    assert "row 1: is bad" in captured.err


def test_reader_that_goes_away_is_no_traceback() -> None:
    code = "from taco.entrypoints.cli import demo, main\ndemo.run = lambda args: [print('x' * 999) for _ in range(999)]"
    code += "\nraise SystemExit(main.main(['demo']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


# ------------------------------------------------------------------------------------------------------------ generate


def test_generate_writes_a_row_for_each_prompt_in_order(
    echo: list[EchoLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", "m", "-n", "2", "--prompt", "a", "--prompt", "b"]) == 0
    rows = json_lines(capsys.readouterr().out)
    assert [(row["index"], row["prompt"], row["num_prompt_tokens"]) for row in rows] == [(0, "a", 3), (1, "b", 3)]
    expected = {"text": "B", "num_tokens": 1, "finish_reason": "stop", "stop_reason": None}
    assert rows[1]["outputs"] == [{"index": 0, **expected}, {"index": 1, **expected}]


def test_flags_reach_engine_and_sampling(echo: list[EchoLLM]) -> None:
    argv = ["generate", "--model", "m", "--prompt", "a", "--max-num-seqs", "7", "--seed", "3"]
    argv += ["--temperature", "0", "--stop", "x", "--stop", "y", "--sampling-seed", "4", "--ignore-eos"]
    assert main(argv) == 0
    [llm] = echo
    assert llm.kwargs == {**vars(EngineArgs(model="m")), "max_num_seqs": 7, "seed": 3}
    expected = SamplingParams(temperature=0, stop=["x", "y"], seed=4, ignore_eos=True, max_tokens=256)
    assert llm.params == expected


def test_every_sampling_flag_is_a_field_of_its_name(echo: list[EchoLLM]) -> None:
    for name, value in {"top_k": 5, "min_p": 0.25, "no_repeat_ngram_size": 3, "repetition_penalty": 1.5}.items():
        assert main(["generate", "--prompt", "a", "--model", "m", "--" + name.replace("_", "-"), str(value)]) == 0
        assert getattr(echo[-1].params, name) == value


def test_text_file_has_a_prompt_a_line(echo: list[EchoLLM], tmp_path: Path) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    # U+2028 is a line separator for str.splitlines, and an ordinary character of a prompt here.
    source.write_text("one\u2028more\n\nzwölf\n", encoding="utf-8")
    assert main(["generate", "--model", "m", "--input", str(source), "--output", str(target)]) == 0
    rows = json_lines(target.read_text(encoding="utf-8").replace("\u2028", "\\u2028"))
    assert [row["prompt"] for row in rows] == ["one\u2028more", "zwölf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def test_standard_input_is_text_unless_a_format_is_given(
    echo: list[EchoLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = '{"prompt": "a", "id": 7}'
    give_input(monkeypatch, line + "\n")
    assert main(["generate", "--model", "m"]) == 0
    give_input(monkeypatch, line + "\n")
    assert main(["generate", "--model", "m", "--input-format", "jsonl"]) == 0
    text_row, json_row = json_lines(capsys.readouterr().out)
    assert text_row["prompt"] == line
    assert (json_row["prompt"], json_row["id"]) == ("a", 7)


def test_chat_rows_go_through_chat(echo: list[EchoLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}], "id": "x"}))
    assert main(["generate", "--model", "m", "--input", str(source)]) == 0
    [row] = json_lines(capsys.readouterr().out)
    assert (row["id"], row["outputs"][0]["text"]) == ("x", "HELLO")


def test_bad_rows_can_be_returned(echo: list[EchoLLM], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", "m", "--on-error", "return", "--prompt", "bad", "--prompt", "good"]
    assert main(argv) == 1
    captured = capsys.readouterr()
    bad, good = json_lines(captured.out)
    assert bad["error"] == "is bad"
    assert "error" not in good and good["outputs"][0]["text"] == "GOOD"
    assert "1 of 2 rows failed" in captured.err


def test_all_bad_lines_are_named_before_a_model_is_loaded(
    echo: list[EchoLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    lines = ['{"prompt": "fine"}', "{", '"text"', '{"id": 1}', '{"prompt": "a", "messages": []}']
    lines += ['{"prompt": "a", "outputs": []}', '{"messages": []}']
    source.write_text("\n".join(lines))
    assert main(["generate", "--model", "m", "--input", str(source)]) == 1
    message = capsys.readouterr().err
    assert [f"line {number}:" in message for number in range(1, 8)] == [False] + [True] * 6
    assert echo == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--input", "f"], "not with both"),
        (["--input", "/nowhere/in.txt"], "cannot read"),
        (["--prompt", "a", "--output", "/nowhere/out.jsonl"], "no folder /nowhere"),
        ([], "has no prompts"),
    ],
)
def test_input_and_output_problems_are_found_before_a_model_is_loaded(
    argv: list[str],
    message: str,
    echo: list[EchoLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    give_input(monkeypatch, "\n")
    assert main(["generate", "--model", "m", *argv]) == 1
    assert message in capsys.readouterr().err
    assert echo == []


# ---------------------------------------------------------------------------------------------------------------- chat


@pytest.fixture
def conversation() -> chat.Conversation:
    return chat.Conversation(EchoLLM(), SamplingParams(), system=None)  # type: ignore[arg-type]


def contents(conversation: chat.Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_answer_arrives_in_pieces_and_is_remembered(conversation: chat.Conversation) -> None:
    pieces: list[str] = []
    assert conversation.ask("hi", pieces.append) == ""
    assert pieces == ["H", "I"]
    assert contents(conversation) == [("user", "hi"), ("assistant", "HI")]


def test_template_of_the_engine_is_used(conversation: chat.Conversation) -> None:
    conversation.llm.llm_engine.model_config.chat_template = "say "
    pieces: list[str] = []
    conversation.ask("hi", pieces.append)
    assert "".join(pieces) == "SAY HI"


def test_interrupt_stops_the_answer_and_keeps_its_beginning(conversation: chat.Conversation) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert conversation.ask("ab^cd", lambda text: None) == "stopped"
    assert contents(conversation) == [("user", "ab^cd"), ("assistant", "AB^")]
    assert not conversation.llm.llm_engine.has_unfinished_requests()
    assert signal.getsignal(signal.SIGINT) is handler
    assert conversation.ask("ok", lambda text: None) == ""
    assert contents(conversation)[2:] == [("user", "ok"), ("assistant", "OK")]


def test_rejected_message_is_forgotten(conversation: chat.Conversation) -> None:
    with pytest.raises(TacoValidationError, match="too long"):
        conversation.ask("x" * 101, lambda text: None)
    assert conversation.messages == []


def test_length_limit_is_mentioned(conversation: chat.Conversation) -> None:
    assert "length limit" in conversation.ask("a$", lambda text: None)


def test_commands_change_the_conversation(conversation: chat.Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    conversation.ask("hi", lambda text: None)
    assert chat.run_command(conversation, "/system be brief")
    assert contents(conversation) == [("system", "be brief")]
    conversation.ask("hi", lambda text: None)
    assert chat.run_command(conversation, "/reset")
    assert contents(conversation) == [("system", "be brief")]
    assert chat.run_command(conversation, "/system")
    assert conversation.messages == []
    assert chat.run_command(conversation, "/quit")
    assert "There is no command /quit" in capsys.readouterr().out
    assert not chat.run_command(conversation, "/exit")


def test_piped_chat_is_a_readable_transcript(
    echo: list[EchoLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_input(monkeypatch, "hi\n\n" + "x" * 101 + "\n/exit\nnever\n")
    assert main(["chat", "--model", "m"]) == 0
    expected = ["echo; /help lists the commands.", "> hi", "HI", "> ", "> " + "x" * 101, "", "[the prompt is too long]"]
    assert capsys.readouterr().out.splitlines() == [*expected, "> /exit"]
    assert echo[0].llm_engine.params[0].output_kind is RequestOutputKind.DELTA


# ---------------------------------------------------------------------------------------------------------------- demo


def test_demo_prints_pairs_and_speed(
    echo: list[EchoLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "packaged_model", lambda name: tmp_path / f"{name}.gguf")
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(demo.QUESTIONS) == 8
    for question in demo.QUESTIONS:
        assert lines[lines.index(f"Prompt: {question}") + 1] == f"Text:   {question.upper()}"
    num_output = sum(len(question) for question in demo.QUESTIONS)
    assert lines[-1].startswith(f"24 input and {num_output} output tokens in ")
    assert "output tokens/s (echo, float32, cpu;" in lines[-1]
    assert echo[0].kwargs == {"model": str(tmp_path / "smollm2.gguf"), "served_model_name": "smollm2"}


def test_without_a_model_the_demo_model_is_used(
    echo: list[EchoLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("taco.entrypoints.cli.common.packaged_model", lambda name: tmp_path / f"{name}.gguf")
    assert main(["generate", "--prompt", "a"]) == 0
    assert echo[0].kwargs["model"] == str(tmp_path / "smollm2.gguf")
