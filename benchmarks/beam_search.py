"""Throughput of beam search beside sampling as many sequences, on one machine, in one run.

    python benchmarks/beam_search.py [--model MODEL] [--dtype bfloat16] [--prompts 16] [--width 4] [--tokens 64]

Both have the same prompts, of 48 to 80 tokens cut out of English text, run as many sequences (`beam_width`, and `n`)
and generate as many tokens in each, without end of sequence. The figure is output tokens/s over all sequences; the
ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from common import english

from taco import LLM, SamplingParams, __version__
from taco.entrypoints.demo_model import packaged_model
from taco.sampling_params import BeamSearchParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = args.model or str(packaged_model("smollm2"))
    llm = LLM(model, dtype=args.dtype, max_model_len=1024, max_logprobs=max(20, 2 * args.width))
    rng = random.Random(0)
    text = english(llm.get_tokenizer(), 60_000)
    starts = [rng.randrange(len(text) - 80) for _ in range(args.prompts)]
    prompts = [text[start : start + rng.randint(48, 80)] for start in starts]
    num_tokens = args.prompts * args.width * args.tokens

    def search() -> int:
        params = BeamSearchParams(beam_width=args.width, max_tokens=args.tokens, ignore_eos=True)
        outputs = llm.beam_search(prompts, params)
        lengths = [len(prompt) for prompt in prompts for _ in range(args.width)]
        found = [len(sequence.tokens) for output in outputs for sequence in output.sequences]
        return sum(found) - sum(lengths)

    def sample() -> int:
        params = SamplingParams(n=args.width, max_tokens=args.tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    ways = {f"beam search, width {args.width}": search, f"sampling, n={args.width}": sample}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, way in ways.items():
            llm.llm_engine.reset_prefix_cache()
            started = time.perf_counter()
            assert way() == num_tokens
            if repeat:  # the first time is the warm-up
                rates[name].append(num_tokens / (time.perf_counter() - started))
    print(
        f"taco {__version__}, torch {torch.__version__}, {args.threads} threads; {Path(model).name} in {args.dtype}; "
        f"{args.prompts} prompts, {args.tokens} new tokens a sequence"
    )
    medians = [statistics.median(values) for values in rates.values()]
    for (name, values), median in zip(rates.items(), medians, strict=True):
        print(f"{name}: {median:8.1f} tok/s ({min(values):.1f} to {max(values):.1f})")
    print(f"ratio: {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
