"""The command `taco`, with an engine that echoes instead of a model."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import taco
from taco.compat import V0_6
from taco.engine.arg_utils import EngineArgs
from taco.entrypoints.cli import chat, demo, generate
from taco.entrypoints.cli.main import main
from taco.errors import BatchValidationError, TacoValidationError
from taco.outputs import CompletionOutput, RequestOutput
from taco.sampling_params import GuidedDecodingParams, RequestOutputKind, SamplingParams


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
            served_model_name="echo", dtype_name="float32", chat_template=None, pooler_config=None, task="generate"
        )
        self.config = SimpleNamespace(behaviour=V0_6)
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

    default_sampling_params: ClassVar[dict[str, Any]] = {}

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

    def generate(
        self, prompts: list[dict[str, Any]], params: SamplingParams, *, use_tqdm: bool, on_error: str = "raise"
    ) -> list[RequestOutput]:
        self.params = params
        self.use_tqdm = use_tqdm
        texts = [prompt["prompt"] if "prompt" in prompt else str(prompt["prompt_token_ids"]) for prompt in prompts]
        if "^" in texts:
            try:
                signal.raise_signal(signal.SIGTERM if "term" in texts else signal.SIGINT)
            except KeyboardInterrupt as error:
                error.finished_outputs = {  # type: ignore[attr-defined]
                    index: request_output(str(index), text.upper())
                    for index, text in enumerate(texts)
                    if text == "done"
                }
                raise
        if "bad" in texts and on_error == "raise":
            raise BatchValidationError({texts.index("bad"): "is bad"}, len(texts))
        outputs = [request_output(str(index), text.upper(), n=params.n) for index, text in enumerate(texts)]
        for output, text in zip(outputs, texts, strict=True):
            if text == "bad":
                output.error = "is bad"
        return outputs

    def chat(self, messages: list[Any], params: SamplingParams, **kwargs: Any) -> list[RequestOutput]:
        prompts = [{"prompt": conversation[-1]["content"]} for conversation in messages]
        return self.generate(prompts, params, **kwargs)


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


def usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_unknown_flags_are_explained_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--temprature", "0", "--enable-lora", "--max-loras=3", "--quite-another", "--prompt", "a"]
    assert usage_error(["generate", *argv], capsys) == [
        "usage: taco generate [OPTIONS]",
        "taco generate: error: unrecognized arguments: --temprature 0 --enable-lora --max-loras=3 --quite-another",
        "  --temprature: did you mean --temperature?",
        "  --enable-lora: LoRA is not supported",
        "  --max-loras: it would have no effect and can go: it is read only together with enable_lora",
    ]


def test_commands_without_an_engine_explain_no_engine_flags(capsys: pytest.CaptureFixture[str]) -> None:
    lines = usage_error(["demo", "--enable-lora"], capsys)
    assert lines == ["usage: taco demo [OPTIONS]", "taco demo: error: unrecognized arguments: --enable-lora"]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_ends_with_the_engine_flags_of_which_model_is_the_first(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    own, engine = capsys.readouterr().out.split("\nengine:\n")
    assert engine.startswith("  --model MODEL ")
    assert all(flag in own for flag in ("--temperature ", "--prompt " if command == "generate" else "--system "))
    assert "--max-num-seqs " in engine and "\n\n" not in engine


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_gives_the_defaults_of_sampling(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "0 is greedy (default: 1)" in text and "-1 keeps all (default: -1)" in text
    assert f"for a prompt (default: {256 if command == 'generate' else 512})" in text
    assert ("demo model's temperature is 0.2" in text) == (command == "chat")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown_on_terminals(
    is_terminal: bool, echo: list[EchoLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    monkeypatch.setattr(demo, "packaged_model", lambda name: tmp_path / f"{name}.gguf")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    for argv in (["demo"], ["generate", "--model", "m", "--prompt", "a"], ["generate", "--model", "m", "--input"]):
        assert main([*argv, str(source)] if argv[-1] == "--input" else argv) == 0
    assert [llm.use_tqdm for llm in echo] == [is_terminal] * 3


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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--regex", "a+"], {"regex": "a+"}),
        (["--choice", "yes", "--choice", "no"], {"choice": ["yes", "no"]}),
        (["--json-schema", "FILE"], {"json": "{}"}),
        (["--grammar", "FILE"], {"grammar": "{}"}),
    ],
)
def test_a_constraint_holds_for_all_outputs(
    echo: list[EchoLLM], tmp_path: Path, flags: list[str], expected: dict[str, Any]
) -> None:
    file = tmp_path / "constraint"
    file.write_text("{}")
    assert main(["generate", "--prompt", "a", *(str(file) if flag == "FILE" else flag for flag in flags)]) == 0
    assert echo[0].params.guided_decoding == GuidedDecodingParams(**expected)


def test_there_is_one_constraint_and_its_file_must_be_there(
    echo: list[EchoLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "a", "--regex", "a", "--choice", "b"])
    assert "--choice: not allowed with argument --regex" in capsys.readouterr().err
    assert main(["generate", "--prompt", "a", "--json-schema", "/no/such"]) == 1
    assert "--json-schema: cannot read /no/such" in capsys.readouterr().err
    assert not echo


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
    lines += ['{"prompt": "a", "outputs": []}', '{"messages": []}', '{"prompt": 5}', '{"prompt_token_ids": "5"}']
    lines += ['{"prompt": "a", "x": 1e400}', '{"prompt": "a", "x": NaN}']
    source.write_text("\n".join(lines))
    assert main(["generate", "--model", "m", "--input", str(source)]) == 1
    message = capsys.readouterr().err
    assert [f"line {number}:" in message for number in range(1, 12)] == [False] + [True] * 10
    assert echo == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--input", "f"], "not with both"),
        (["--input", "/nowhere/in.txt"], "cannot read"),
        (["--prompt", "a", "--output", "/nowhere/out.jsonl"], "no folder /nowhere"),
        (["--prompt", "a", "--output", "/"], "/ is a folder"),
        (["--prompt", "a", "--output", "x" * 300], "cannot write " + "x" * 300),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be"),
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


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_what_was_finished_before_an_interruption_is_written(
    echo: list[EchoLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("before")
    prompts = ["--prompt", "a", "--prompt", "done", "--prompt", "^", "--prompt", "done"]
    argv = ["generate", "--model", "m", *prompts, "--output", str(target)]
    assert main(argv) == 130
    partial = tmp_path / "out.jsonl.partial"
    assert [row["index"] for row in json_lines(partial.read_text())] == [1, 3]
    assert target.read_text() == "before"
    assert capsys.readouterr().err == f"taco generate: interrupted; 2 of 4 rows were finished and are in {partial}.\n"
    partial.unlink()
    assert main(["generate", "--model", "m", *prompts, "--prompt", "term"]) == 143
    captured = capsys.readouterr()
    assert [row["prompt"] for row in json_lines(captured.out)] == ["done", "done"]
    assert "2 of 5 rows were finished and written" in captured.err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert main(["generate", "--model", "m", "--prompt", "^", "--output", str(target)]) == 130
    assert "no row was finished, and nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "before"


@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["close", "write"])
def test_an_interruption_at_the_end_loses_nothing(
    place: str, number: int, echo: list[EchoLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            signal.raise_signal(number)
            return function(*args)

        return call

    if place == "close":
        monkeypatch.setattr(EchoLLM, "__exit__", interrupted(EchoLLM.__exit__))
    else:
        monkeypatch.setattr(generate, "write_rows", interrupted(generate.write_rows))
    target = tmp_path / "out.jsonl"
    argv = ["generate", "--model", "m", "--prompt", "a", "--prompt", "b", "--output", str(target)]
    assert main(argv) == 128 + number
    assert [row["outputs"][0]["text"] for row in json_lines(target.read_text())] == ["A", "B"]
    assert list(tmp_path.iterdir()) == [target]
    for llm in echo:
        llm.closed = True


def test_any_error_leaves_what_was_finished_and_the_next_run_does_not_take_it(
    echo: list[EchoLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        error = RuntimeError("CUDA error")
        error.finished_outputs = {1: request_output("1", "B")}  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(EchoLLM, "generate", fail)
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    argv = ["generate", "--model", "m", "--prompt", "a", "--prompt", "b", "--output", str(target)]
    with pytest.raises(RuntimeError, match="CUDA error"):
        main(argv)
    assert f"1 of 2 rows were finished and are in {partial}" in capsys.readouterr().err
    kept = partial.read_text()
    assert [row["index"] for row in json_lines(kept)] == [1]
    assert main(argv) == 1
    assert "has what an earlier run had finished; move it away or delete it" in capsys.readouterr().err
    assert len(echo) == 1 and partial.read_text() == kept


def test_generate_runs_in_other_threads(echo: list[EchoLLM]) -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(main, ["generate", "--model", "m", "--prompt", "a"]).result() == 0


def test_the_package_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "taco", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"taco {taco.__version__}\n"


def test_advice_is_that_of_the_command_line(echo: list[EchoLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "m", "--prompt", "a", "--prompt", "bad"]) == 1
    assert "correct them, or use --on-error return to run the others:\n  row 1: is bad" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_byte_order_mark_is_no_text(
    suffix: str,
    echo: list[EchoLLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = '{"prompt": "one"}\n' if suffix == "jsonl" else "one\n"
    source = tmp_path / f"in.{suffix}"
    source.write_text(text, encoding="utf-8-sig")
    assert main(["generate", "--model", "m", "--input", str(source)]) == 0
    give_input(monkeypatch, "\ufeff" + text)
    assert main(["generate", "--model", "m", "--input", "-", "--input-format", suffix.replace("txt", "text")]) == 0
    assert [row["outputs"][0]["text"] for row in json_lines(capsys.readouterr().out)] == ["ONE", "ONE"]


def test_a_failed_run_leaves_the_output_as_it_was(echo: list[EchoLLM], tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("before")
    assert main(["generate", "--model", "m", "--prompt", "bad", "--output", str(target)]) == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    assert len(echo) == 1


def test_text_that_is_not_valid_unicode_does_not_cost_the_results(echo: list[EchoLLM], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "a", "note": "\ud800"}, {"prompt": "é"}]
    source.write_text("\n".join(map(json.dumps, rows)))
    assert main(["generate", "--model", "m", "--input", str(source), "--output", str(target)]) == 0
    lines = target.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["outputs"][0]["text"] for line in lines] == ["A", "É"]
    assert "\\ud800" in lines[0] and '"prompt": "é"' in lines[1]


@pytest.mark.parametrize("line", ['{"prompt": "a", "n": ' + "1" * 5000 + "}", "[" * 100_000])
def test_lines_that_python_cannot_read_are_named(line: str) -> None:
    with pytest.raises(TacoValidationError, match="(?s)line 7: not JSON"):
        generate.parse_jsonl("x", [(7, line)])


def test_a_pipe_is_written_and_not_replaced(echo: list[EchoLLM], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert main(["generate", "--model", "m", "--prompt", "a", "--output", str(pipe)]) == 0
    assert json.loads(os.read(reader, 1000))["prompt"] == "a"
    os.close(reader)
    assert pipe.is_fifo()


def test_sampling_parameters_of_the_engine_hold_where_no_flag_is_given(
    echo: list[EchoLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EchoLLM, "default_sampling_params", {"top_p": 0.5, "min_p": 0.1, "max_tokens": 9})
    assert main(["generate", "--model", "m", "--prompt", "a", "--min-p", "0.3"]) == 0
    assert echo[0].params == SamplingParams(top_p=0.5, min_p=0.3, max_tokens=256)
    assert echo[0].kwargs["generation_config"] is None


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
    conversation = chat.Conversation(conversation.llm, SamplingParams(), system=None)
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


def test_an_answer_that_failed_says_why(conversation: chat.Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = request_output("0", "", "error")
    failed.error = "the logits are not finite"
    engine = conversation.llm.llm_engine
    monkeypatch.setattr(engine, "step", lambda: engine.pending.clear() or [failed])  # type: ignore[attr-defined]
    assert conversation.ask("hi", lambda text: None) == "failed: the logits are not finite"
    assert conversation.messages == []


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


@pytest.mark.parametrize("obstacle", ["generates no text (its task is 'embed')", "has no chat template"])
def test_a_model_that_cannot_chat_ends_the_command(
    obstacle: str, echo: list[EchoLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def add_pooler(engine: EchoEngine) -> None:
        make_engine(engine)
        engine.model_config.pooler_config, engine.model_config.task = object(), "embed"

    def find_no_template(*args: object) -> str:
        raise ValueError("no template")

    make_engine = EchoEngine.__init__
    if "template" in obstacle:
        monkeypatch.setattr(EchoTokenizer, "get_chat_template", find_no_template)
    else:
        monkeypatch.setattr(EchoEngine, "__init__", add_pooler)
    give_input(monkeypatch, "hi\n")
    assert main(["chat", "--model", "m"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("taco chat: error: echo cannot chat: it ") and obstacle in captured.err


def test_a_local_model_is_greeted_by_its_last_name(tmp_path: Path) -> None:
    llm = EchoLLM()
    (tmp_path / "tiny.gguf").touch()
    names = {"": tmp_path.name, "tiny.gguf": "tiny.gguf", ".": tmp_path.name}
    for name, shown in names.items():
        llm.llm_engine.model_config.served_model_name = f"{tmp_path}/{name}"
        assert chat.shown_name(llm) == shown  # type: ignore[arg-type]
    llm.llm_engine.model_config.served_model_name = "some/hub-id"
    assert chat.shown_name(llm) == "some/hub-id"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argv", "own", "generation_config", "temperature"),
    [
        (["--model", "m"], {"temperature": 0.7}, "auto", 0.7),
        (["--model", "m"], {}, "auto", 1.0),
        (["--model", "m", "--temperature", "0.4"], {"temperature": 0.7}, "auto", 0.4),
        (["--model", "m", "--generation-config", "vllm"], {}, "vllm", 1.0),
        ([], {}, "auto", chat.DEMO_TEMPERATURE),
        ([], {"temperature": 0.7}, "auto", 0.7),
        (["--generation-config", "vllm"], {}, "vllm", 1.0),
    ],
)
def test_chat_samples_as_the_model_says(
    argv: list[str],
    own: dict[str, float],
    generation_config: str,
    temperature: float,
    echo: list[EchoLLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taco.entrypoints.cli.common.packaged_model", lambda name: Path(name))
    monkeypatch.setattr(EchoLLM, "default_sampling_params", own)
    give_input(monkeypatch, "hi\n")
    assert main(["chat", *argv]) == 0
    assert echo[0].kwargs["generation_config"] == generation_config
    assert echo[0].llm_engine.params[0].temperature == temperature


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
