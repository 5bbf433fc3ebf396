"""What sampling options cost: throughput with each of them beside that of greedy decoding, on one machine, in one run.

    python benchmarks/sampling.py [--model MODEL] [--dtype bfloat16] [--prompts 64] [--tokens 64] [--only OPTION ...]

All have the same prompts, of 48 to 80 tokens cut out of English text, and generate as many tokens for each, without end
of sequence. Greedy decoding runs beside each option anew, in another engine, each a step in turn, since the speed of
shared machines drifts within seconds; the figure is the median of the ratios. Log-probabilities are made into dicts for
those who read them: "all read" includes that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import english, in_turns

from taco import LLM, SamplingParams, __version__
from taco.entrypoints.demo_model import packaged_model

GREEDY: dict[str, Any] = {"temperature": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "logprobs=1": GREEDY | {"logprobs": 1},
    "logprobs=20": GREEDY | {"logprobs": 20},
    "logprobs=20, all read": GREEDY | {"logprobs": 20},
    "prompt_logprobs=20": GREEDY | {"prompt_logprobs": 20},
    "repetition_penalty=1.1": GREEDY | {"repetition_penalty": 1.1},
    "temperature=1": {"temperature": 1.0},
    "temperature=0.7": {"temperature": 0.7},
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "top_k=50, top_p=0.9": {"top_k": 50, "top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, metavar="OPTION", help="one of: " + "; ".join(OPTIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = args.model or str(packaged_model("smollm2"))
    llm, other = (LLM(model, dtype=args.dtype, max_model_len=1024) for _ in range(2))
    rng = random.Random(0)
    text = english(llm.get_tokenizer(), 60_000)
    starts = [rng.randrange(len(text) - 80) for _ in range(args.prompts)]
    prompts = [{"prompt_token_ids": text[start : start + rng.randint(48, 80)]} for start in starts]

    num_tokens = args.prompts * args.tokens

    def params(options: dict[str, Any]) -> list[SamplingParams]:
        return [SamplingParams(max_tokens=args.tokens, ignore_eos=True, **options)] * args.prompts

    in_turns(prompts, [(llm, params(GREEDY)), (other, params(GREEDY))])
    ratios: dict[str, list[float]] = {name: [] for name in args.only or OPTIONS}
    greedy: list[float] = []
    for _ in range(args.repeats):
        for name, values in ratios.items():
            (greedy_s, _), (seconds, outputs) = in_turns(
                prompts, [(other, params(GREEDY)), (llm, params(OPTIONS[name]))]
            )
            if name.endswith("all read"):
                started = time.perf_counter()
                assert all(output.outputs[0].logprobs is not None for output in outputs)
                seconds += time.perf_counter() - started
            greedy.append(num_tokens / greedy_s)
            values.append(greedy_s / seconds)
    print(
        f"taco {__version__}, torch {torch.__version__}, {args.threads} threads; {Path(model).name} in {args.dtype}; "
        f"{args.prompts} prompts, {args.tokens} new tokens each"
    )
    print(f"{'greedy':24} {statistics.median(greedy):8.1f} tok/s ({min(greedy):.1f} to {max(greedy):.1f})")
    for name, values in ratios.items():
        print(f"{name:24} {statistics.median(values):8.3f} of greedy ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
