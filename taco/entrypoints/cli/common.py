"""What the commands share: flags for the engine and for sampling, and the objects made from them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taco.entrypoints.demo_model import packaged_model

if TYPE_CHECKING:
    from taco import LLM, SamplingParams

# Field of SamplingParams: type of its flag, and help, to which the default is added.
SAMPLING_FLAGS = {
    "max_tokens": (int, "most tokens to generate for a prompt"),
    "min_tokens": (int, "tokens to generate before a stop condition counts"),
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the most likely tokens whose probabilities add up to this; 1 keeps all"),
    "top_k": (int, "keep this many most likely tokens; -1 keeps all"),
    "min_p": (float, "keep tokens at least this likely, relative to the most likely one"),
    "presence_penalty": (float, "lower the logits of tokens that occurred in the output; 0 is none"),
    "frequency_penalty": (float, "lower the logits of tokens for each time they occurred in the output; 0 is none"),
    "repetition_penalty": (float, "divide (or multiply) the logits of tokens that occurred anywhere; 1 is none"),
    "no_repeat_ngram_size": (int, "no n-gram of this size occurs twice; 0 allows all"),
}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `EngineArgs` as a group; without `--model`, `make_llm` takes the demo model."""
    from taco.engine.arg_utils import EngineArgs

    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="Folder, .gguf file or hub id of the model. (default: that of `taco demo`)")
    flags = argparse.ArgumentParser(add_help=False)
    EngineArgs.add_cli_args(flags)
    for action in flags._actions:
        if action.dest != "model":
            group._add_action(action)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int, description: str) -> None:
    """Add flags for the fields of `SamplingParams` that make sense for every request.

    Args:
        max_tokens: the default of `--max-tokens`.
        description: where the values of flags that are not given come from.
    """
    from taco.sampling_params import SamplingParams

    group = parser.add_argument_group("sampling", description)
    defaults = SamplingParams(max_tokens=max_tokens)
    for name, (kind, text) in SAMPLING_FLAGS.items():
        help = f"{text} (default: {getattr(defaults, name):g})"
        default = max_tokens if name == "max_tokens" else None
        group.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=help)
    group.add_argument("--sampling-seed", type=int, help="seed of the requests (--seed is that of the engine)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


def sampling_params(
    args: argparse.Namespace, defaults: Mapping[str, Any] | None = None, **fields: Any
) -> SamplingParams:
    """Parameters from the flags that were given; the others come from `defaults`, else from `SamplingParams`.

    Without `defaults` this tells whether the flags are valid, before a model is loaded.

    Args:
        defaults: what the engine says, `LLM.default_sampling_params`.
        fields: further fields of `SamplingParams`.

    Raises:
        TacoValidationError: a value is out of range.
    """
    from taco import SamplingParams

    given = dict(defaults or {})
    given |= {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}
    if args.sampling_seed is not None:
        given["seed"] = args.sampling_seed
    if args.stop:
        given["stop"] = args.stop
    return SamplingParams(**given, ignore_eos=args.ignore_eos, **fields)


def make_llm(args: argparse.Namespace) -> LLM:
    """The engine that the flags describe."""
    from taco import LLM, EngineArgs

    if args.model is None:
        args.model = str(packaged_model("smollm2"))
    return LLM(**vars(EngineArgs.from_cli_args(args)))
