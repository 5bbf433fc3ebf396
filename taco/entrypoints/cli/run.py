"""`taco run`: run a Python program in which `import vllm` resolves to taco; see `taco.vllm`."""

from __future__ import annotations

import argparse

HELP = "run a Python program that was written for vLLM: in it, `import vllm` resolves to taco"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from taco import vllm

    parser.usage = f"taco run {vllm.USAGE}"
    vllm.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the program and returns the exit status, if the program does not end by itself."""
    from taco import vllm

    return vllm.run(args)
