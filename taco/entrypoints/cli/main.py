"""Entry point of the command `taco`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from taco.entrypoints.cli import chat, demo, generate, run
from taco.errors import TacoError
from taco.version import __version__

COMMANDS = {"demo": demo, "generate": generate, "chat": chat, "run": run}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command line; only `command` gets its arguments.

    Engine flags come from `EngineArgs`; leaving out those of other commands keeps `taco --help` fast.
    """
    parser = argparse.ArgumentParser(prog="taco", description="An offline LLM engine.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"taco {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            usage=f"taco {name} [OPTIONS]",
            help=module.HELP,
            description=module.HELP,
            allow_abbrev=False,
            conflict_handler="resolve",
        )
        if name == command:
            module.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status: 0, 1 after an error that was reported, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(arguments[0] if arguments else None).parse_args(arguments)
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
