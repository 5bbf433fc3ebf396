"""Entry point of the command `taco`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence

from taco.entrypoints.cli import chat, demo, generate, run
from taco.errors import TacoError
from taco.version import __version__

COMMANDS = {"demo": demo, "generate": generate, "chat": chat, "run": run}


def build_parsers(command: str | None) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line and those of the commands; only `command` gets its arguments.

    Engine flags come from `EngineArgs`; leaving out those of other commands keeps `taco --help` fast.
    """
    parser = argparse.ArgumentParser(prog="taco", description="An offline LLM engine.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"taco {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, module in COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name,
            usage=f"taco {name} [OPTIONS]",
            help=module.HELP,
            description=module.HELP,
            allow_abbrev=False,
        )
        if name == command:
            module.add_arguments(commands[name])
    return parser, commands


def describe_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """What is wrong with arguments that `parser` does not know, and which of its flags may have been meant."""
    lines = [f"unrecognized arguments: {' '.join(unknown)}"]
    flags = list(parser._option_string_actions)
    for flag in [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]:
        reason = why_no_flag(flag) if "--model" in flags else ""
        close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.7)
        if reason:
            lines.append(f"  {flag}: {reason}")
        elif close:
            lines.append(f"  {flag}: did you mean {close[0]}?")
    return "\n".join(lines)


def why_no_flag(flag: str) -> str:
    """Why a field of `EngineArgs` has no flag; empty where there is no such field."""
    from taco.engine.arg_fields import Immaterial, NotBuilt, treatment_of
    from taco.engine.arg_utils import EngineArgs

    name = flag.removeprefix("--").replace("-", "_")
    for field in dataclasses.fields(EngineArgs):
        treatment = treatment_of(field)
        if field.name == name and isinstance(treatment, NotBuilt):
            return f"{treatment.feature} is not supported"
        if field.name == name and isinstance(treatment, Immaterial):
            return f"it would have no effect and can go: {treatment.reason}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status: 0, 1 after an error that was reported, 130 after Ctrl-C, 143 after SIGTERM in `generate`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parsers(arguments[0] if arguments else None)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        # The command before the flags, else the command's parser does not have them.
        parser = commands[args.command] if args.command == arguments[0] else parser
        parser.error(describe_unknown(parser, unknown))
    try:
        return COMMANDS[args.command].run(args)
    except TacoError as error:
        print(f"taco {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`head`, a closed pager) has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
