"""`taco generate`: prompts from the command line, a file or standard input; one JSON object a prompt comes out."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from taco.entrypoints.cli.common import add_engine_arguments, add_sampling_arguments, make_llm, sampling_params
from taco.errors import TacoError, TacoValidationError
from taco.interrupts import interrupt, interrupts_deferred

if TYPE_CHECKING:
    from taco import LLM, GuidedDecodingParams, RequestOutput

HELP = "generate text for many prompts and write it as JSON lines (with the demo model unless --model is given)"

INPUT_KEYS = ("prompt", "prompt_token_ids", "messages")
OUTPUT_KEYS = ("index", "num_prompt_tokens", "outputs", "error")

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("input and output")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument(
        "--input", type=Path, metavar="FILE", help="prompts; standard input for -, or if neither is given"
    )
    source.add_argument(
        "--input-format",
        choices=("auto", "text", "jsonl"),
        default="auto",
        help="text: one prompt a line, empty lines are skipped; jsonl: one object a line with one of the keys "
        f"{', '.join(INPUT_KEYS)}, other keys are copied to the output; auto: jsonl if the file's name ends so",
    )
    source.add_argument("--output", type=Path, metavar="FILE", help="write here instead of to standard output")
    source.add_argument("-n", type=int, default=1, help="outputs for each prompt (default: %(default)s)")
    source.add_argument(
        "--on-error",
        choices=("raise", "return"),
        default="raise",
        help="raise: run nothing if a prompt is not valid; return: give it an error and run the others",
    )
    constraints = parser.add_argument_group(
        "guided decoding", "What every output has to match; at most one of these."
    ).add_mutually_exclusive_group()
    constraints.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="JSON that matches the schema in this file"
    )
    constraints.add_argument("--regex", metavar="TEXT", help="a regular expression")
    constraints.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts; may be repeated")
    constraints.add_argument("--grammar", type=Path, metavar="FILE", help="a grammar in this file, Lark or GBNF")
    add_sampling_arguments(
        parser,
        max_tokens=256,
        description="Where the engine takes sampling parameters from the model (--generation-config auto), those "
        "replace the defaults below, except that of --max-tokens.",
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate for all rows; the output is written in their order, and to a file only as a whole.

    Where Ctrl-C, SIGTERM or an error ends it before, the rows that were finished are written: to standard output, or to
    FILE.partial.
    """
    rows = read_rows(args)
    fields = {"n": args.n, "guided_decoding": read_constraint(args)}
    sampling_params(args, **fields)
    with open_output(args.output) as output, terminated_as_interrupted() as signals:
        try:
            with make_llm(args) as llm:
                try:
                    outputs = dict(enumerate(generate(llm, args, rows, fields)))
                except (Exception, KeyboardInterrupt) as error:
                    with interrupts_deferred(drops=True):
                        output.write(rows, getattr(error, "finished_outputs", {}))
                    raise
                with interrupts_deferred():
                    output.write(rows, outputs)
                    output.finish()
        except KeyboardInterrupt:
            print(f"taco generate: interrupted; {output.describe(rows)}.", file=sys.stderr)
            return 128 + (signals[0] if signals else signal.SIGINT)
        except TacoError as error:
            message = str(error).replace('pass on_error="return"', "use --on-error return")
            raise TacoError(f"{message}\n{output.describe(rows)}." if output.num_rows else message) from error
        except Exception:
            print(f"taco generate: {output.describe(rows)}.", file=sys.stderr)
            raise
    num_errors = sum(output.error is not None for output in outputs.values())
    if num_errors:
        print(f'{num_errors} of {len(rows)} rows failed; their "error" says why.', file=sys.stderr)
    return 1 if num_errors else 0


def generate(llm: LLM, args: argparse.Namespace, rows: list[Row], fields: dict[str, Any]) -> list[RequestOutput]:
    """One output a row.

    Args:
        fields: of the sampling parameters, beside what the flags of all commands say.
    """
    use_tqdm = sys.stderr.isatty()
    params = sampling_params(args, llm.default_sampling_params, **fields)
    if "messages" in rows[0]:
        conversations = [row["messages"] for row in rows]
        return llm.chat(conversations, params, use_tqdm=use_tqdm, on_error=args.on_error)
    prompts = [{key: row[key] for key in INPUT_KEYS if key in row} for row in rows]
    return llm.generate(prompts, params, use_tqdm=use_tqdm, on_error=args.on_error)


@contextmanager
def terminated_as_interrupted() -> Iterator[list[int]]:
    """Within this context SIGTERM does what Ctrl-C does; yields a list that it is then noted in."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        received.append(number)
        interrupt()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def read_constraint(args: argparse.Namespace) -> GuidedDecodingParams | None:
    """What the flags say of all outputs.

    Raises:
        TacoValidationError: a file cannot be read.
    """
    from taco import GuidedDecodingParams

    if args.regex is not None or args.choice is not None:
        return GuidedDecodingParams(regex=args.regex, choice=args.choice)
    if args.json_schema is not None:
        return GuidedDecodingParams(json=read_text("--json-schema", args.json_schema))
    if args.grammar is not None:
        return GuidedDecodingParams(grammar=read_text("--grammar", args.grammar))
    return None


def read_text(flag: str, path: Path) -> str:
    """
    Raises:
        TacoValidationError: the file that a flag names cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TacoValidationError(f"{flag}: cannot read {path}: {error}.") from error


class Output:
    """Where results go.

    Args:
        file: to write to.
        partial: its path as long as not all rows are there; None for one that is written directly.
        path: its path from then on.

    Attributes:
        num_rows: how many have been written.
        is_finished: all of them have, and the file has its name.
    """

    def __init__(self, file: TextIO, partial: Path | None = None, path: Path | None = None) -> None:
        self.file, self.partial, self.path = file, partial, path
        self.num_rows = 0
        self.is_finished = False

    def write(self, rows: list[Row], outputs: Mapping[int, RequestOutput]) -> None:
        """Adds the rows that have an output, in their order."""
        write_rows(self.file, rows, outputs)
        self.num_rows += len(outputs)

    def finish(self) -> None:
        """Gives the file its name.

        Raises:
            TacoError: it cannot have that.
        """
        self.file.flush()
        if self.partial is not None and self.path is not None:
            try:
                os.replace(self.partial, self.path)
            except OSError as error:
                raise TacoError(f"--output: {self.partial} cannot become {self.path}: {error.strerror}.") from error
        self.is_finished = True

    def describe(self, rows: list[Row]) -> str:
        """What there is of a run that did not come to its end."""
        if not self.num_rows:
            return "no row was finished, and nothing was written"
        place = "written" if self.partial is None else f"are in {self.path if self.is_finished else self.partial}"
        return f"{self.num_rows} of {len(rows)} rows were finished and {place}"


@contextmanager
def open_output(path: Path | None) -> Iterator[Output]:
    """The file to write to: standard output for None, else one that gets its name when it is finished.

    One that is not finished keeps the name FILE.partial, if there is anything in it. A device or a pipe, such as
    /dev/stdout, is written directly: it cannot be replaced by a file.

    Raises:
        TacoValidationError: nothing can be written there.
    """
    if path is None:
        yield Output(sys.stdout)
        return
    try:
        if path.is_dir():
            raise TacoValidationError(f"--output: {path} is a folder; give the name of a file.")
        if not path.parent.is_dir():
            raise TacoValidationError(f"--output: there is no folder {path.parent}.")
        is_special = path.exists() and not path.is_file()
        partial = path.with_name(path.name + ".partial")
        if not is_special and partial.exists() and partial.stat().st_size:
            raise TacoValidationError(
                f"--output: {partial} has what an earlier run had finished; move it away or delete it."
            )
        file = (path if is_special else partial).open("w", encoding="utf-8")
    except OSError as error:
        raise TacoValidationError(f"--output: cannot write {path}: {error.strerror}.") from error
    output = Output(file) if is_special else Output(file, partial, path)
    try:
        with file:
            yield output
    finally:
        if not (is_special or output.is_finished or output.num_rows):
            partial.unlink(missing_ok=True)


def read_rows(args: argparse.Namespace) -> list[Row]:
    """The input as dicts with one of the keys of `INPUT_KEYS`, the same kind (chat or not) for all.

    Raises:
        TacoValidationError: no input, a file that cannot be read, or lines that are not valid rows; all bad lines
            are named.
    """
    if args.prompt is not None:
        if args.input is not None:
            raise TacoValidationError("Give prompts with --prompt or with --input, not with both.")
        return [{"prompt": prompt} for prompt in args.prompt]
    if args.input is None or str(args.input) == "-":
        if args.input is None and sys.stdin.isatty():
            raise TacoValidationError("There is no prompt: use --prompt TEXT, --input FILE, or a pipe.")
        name, text = "standard input", sys.stdin.read()
    else:
        name, text = str(args.input), read_text("--input", args.input)
    text = text.removeprefix("\ufeff")  # the byte order mark of files from Windows
    is_jsonl = args.input_format == "jsonl" or (args.input_format == "auto" and name.endswith(".jsonl"))
    # str.splitlines would also split at U+2028 and others, which JSON strings and prompts may contain.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = parse_jsonl(name, numbered) if is_jsonl else [{"prompt": line} for _, line in numbered]
    if not rows:
        raise TacoValidationError(f"{name} has no prompts.")
    return rows


def parse_jsonl(name: str, lines: Iterable[tuple[int, str]]) -> list[Row]:
    """Rows from numbered lines; `name` is that of the file, for messages."""
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in lines:
        try:
            row = json.loads(line, parse_float=_finite, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
            continue
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and deep nesting
            problems.append(f"line {number}: not JSON that can be read ({error})")
            continue
        if not isinstance(row, dict):
            problems.append(f"line {number}: {type(row).__name__} instead of an object")
        elif sum(key in row for key in INPUT_KEYS) != 1:
            problems.append(f"line {number}: needs exactly one of the keys {', '.join(INPUT_KEYS)}")
        elif reserved := [key for key in OUTPUT_KEYS if key in row]:
            problems.append(f"line {number}: the output would overwrite the keys {', '.join(reserved)}; rename them")
        elif not isinstance(row.get("prompt", ""), str):
            problems.append(f"line {number}: prompt is a {type(row['prompt']).__name__} instead of a string")
        elif wrong := [key for key in INPUT_KEYS[1:] if not isinstance(row.get(key, []), list)]:
            problems.append(f"line {number}: {wrong[0]} is a {type(row[wrong[0]]).__name__} instead of a list")
        elif rows and ("messages" in row) != ("messages" in rows[0]):
            problems.append(f"line {number}: chat rows (messages) and prompt rows need a file each")
        else:
            rows.append(row)
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more lines"] if len(problems) > 20 else [])
        raise TacoValidationError(f"{name} is not valid:\n  " + "\n  ".join(shown))
    return rows


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is larger than any number of 64 bits")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def write_rows(file: TextIO, rows: list[Row], outputs: Mapping[int, RequestOutput]) -> None:
    """One JSON object a line for each row that has an output, in the order of the input."""
    for index, output in sorted(outputs.items()):
        result = result_row(index, rows[index], output)
        line = json.dumps(result, ensure_ascii=False)
        try:
            line.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, which a bad row or a key that is copied may have
            line = json.dumps(result)
        file.write(line + "\n")


def result_row(index: int, row: Row, output: RequestOutput) -> Row:
    """One line of the output: the row as it came, and what was generated for it."""
    result = {
        **row,
        "index": index,
        "num_prompt_tokens": len(output.prompt_token_ids or []),
        "outputs": [
            {
                "index": completion.index,
                "text": completion.text,
                "num_tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            for completion in output.outputs
        ],
    }
    if output.error is not None:
        result["error"] = output.error
    return result
