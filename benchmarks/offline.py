"""Throughput of taco beside transformers, on one machine, in one run.

    python benchmarks/offline.py [--model MODEL] [--dtype bfloat16] [--workloads W1 W2 ...] [--repeats 3] [--json FILE]

Workloads, all greedy and without end of sequence, from token-id prompts cut out of English text:
  W1  one prompt of 32 tokens, 128 new tokens: decoded tokens/s, less the time of the first token
  W2  64 prompts of 48 to 80 tokens, 64 new tokens each: output tokens/s
  W3  32 prompts of 448 to 576 tokens, 8 new tokens each: input tokens/s
  W4  64 prompts sharing their first 384 tokens, 16 of their own, 16 new tokens each: input + output tokens/s

Engines take turns, and a figure is the median of the repeats, with the smallest and the largest. The limit is what this
machine could do at most: weights read once a token at the measured memory bandwidth (W1), or the products of the linear
layers at the measured peak of one product alone (the others). Attention and everything else would come on top.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    commit,
    english,
    num_parameters,
    processor,
    run_taco,
    run_transformers,
    timed_parts,
    times_of,
    versions,
)

from taco import LLM, __version__
from taco.entrypoints.demo_model import packaged_model
from taco.kernels.linear import linear, pack_weight

NEW_TOKENS = {"W1": 128, "W2": 64, "W3": 8, "W4": 16}
PEER_BATCH = {"W1": 1, "W2": 64, "W3": 8, "W4": 64}


def make_prompts(tokenizer: Any) -> dict[str, list[list[int]]]:
    rng = random.Random(0)
    text = english(tokenizer, 60_000)

    def cut(length: int) -> list[int]:
        start = rng.randrange(len(text) - length)
        return text[start : start + length]

    shared = cut(384)
    return {
        "W1": [cut(32)],
        "W2": [cut(rng.randint(48, 80)) for _ in range(64)],
        "W3": [cut(rng.randint(448, 576)) for _ in range(32)],
        "W4": [shared + cut(16) for _ in range(64)],
    }


class Taco:
    name = "taco"

    def __init__(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        started = time.perf_counter()
        self.llm = LLM(model=model, dtype=dtype, max_model_len=1024, **options)
        self.load_s = time.perf_counter() - started

    def run(self, prompts: list[list[int]], new_tokens: int, workload: str) -> float:
        return run_taco(self.llm, prompts, new_tokens)


class Transformers:
    """`generate` of transformers with the same weights, in left-padded batches."""

    name = "transformers"

    def __init__(self, model: str, dtype: str) -> None:
        from taco.models.loader.opening import open_checkpoint
        from taco.models.loader.source import load_hf_config, resolve_model

        started = time.perf_counter()
        source = resolve_model(model)
        config = load_hf_config(source)
        self.model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
        checkpoint = open_checkpoint(source, load_format="auto", hf_config=config)
        state = self.model.state_dict()
        with torch.no_grad():
            for name in checkpoint.infos():
                state[name].copy_(checkpoint.read(name))
        self.model.tie_weights()
        self.model.generation_config.eos_token_id = None
        self.load_s = time.perf_counter() - started

    def run(self, prompts: list[list[int]], new_tokens: int, workload: str) -> float:
        return run_transformers(self.model, prompts, new_tokens, PEER_BATCH[workload])


def rate(workload: str, prompts: list[list[int]], seconds: float, first_token_s: float) -> float:
    """The workload's figure, in tokens/s."""
    output = len(prompts) * NEW_TOKENS[workload]
    if workload == "W1":
        return (output - 1) / (seconds - first_token_s)
    total_input = sum(map(len, prompts))
    return {"W2": output, "W3": total_input, "W4": total_input + output}[workload] / seconds


def machine_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of reading memory, and operations/s of a matrix product of 256 rows: of the fastest of some calls."""
    block = torch.ones(64 << 20, dtype=torch.float32)
    bandwidth = block.numel() * 4 / times_of(block.sum, 15)[0]
    x, w = torch.randn(256, 576).to(dtype), torch.randn(3072, 576).to(dtype)
    packed = pack_weight(w)
    product = times_of(lambda: linear(x, packed), 50)[0]
    return bandwidth, 2 * 256 * 576 * 3072 / product


def limit(
    workload: str, prompts: list[list[int]], body: int, head: int, item: int, peaks: tuple[float, float]
) -> float:
    """Tokens/s that no engine can pass: bytes of the weights, or operations of the linear layers that must happen."""
    bandwidth, peak = peaks
    output = len(prompts) * NEW_TOKENS[workload]
    if workload == "W1":
        return bandwidth / ((body + head) * item)
    distinct = sum(map(len, prompts)) if workload != "W4" else 384 + 64 * 16
    operations = 2 * body * (distinct + output - len(prompts)) + 2 * head * output
    return rate(workload, prompts, operations / peak, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--workloads", nargs="+", default=list(NEW_TOKENS), choices=list(NEW_TOKENS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peer", action="store_true", help="taco alone")
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    model = args.model or str(packaged_model("smollm2"))
    taco = Taco(model, args.dtype, {})
    engines: list[Any] = [taco] if args.no_peer else [taco, Transformers(model, args.dtype)]
    prompts = make_prompts(taco.llm.get_tokenizer())
    body, head = num_parameters(taco.llm.llm_engine._executor.worker.model)
    dtype = getattr(torch, args.dtype)
    peaks = machine_limits(dtype)
    print(
        f"{processor()}, {args.threads} threads, {date.today()}; taco {__version__} ({commit()}), "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {Path(model).name} in {args.dtype}\n"
        f"memory {peaks[0] / 1e9:.1f} GB/s, products {peaks[1] / 1e9:.0f} GFLOP/s; "
        + ", ".join(f"{engine.name} loaded in {engine.load_s:.1f} s" for engine in engines)
    )
    results: dict[str, Any] = {}
    for workload in args.workloads:
        rows = prompts[workload]
        for engine in engines:
            engine.run(rows[: PEER_BATCH["W3"]], 4, workload)  # warm-up
        times: dict[str, list[float]] = defaultdict(list)
        first: dict[str, list[float]] = defaultdict(list)
        for _ in range(args.repeats):
            for engine in engines:
                if workload == "W1":
                    first[engine.name].append(engine.run(rows, 1, workload))
                times[engine.name].append(engine.run(rows, NEW_TOKENS[workload], workload))
        # Shared machines drift: the limit is that of the fastest moment seen.
        again = machine_limits(dtype)
        peaks = max(peaks[0], again[0]), max(peaks[1], again[1])
        bound = limit(workload, rows, body, head, dtype.itemsize, peaks)
        figures = {}
        for engine in engines:
            first_s = statistics.median(first[engine.name]) if workload == "W1" else 0.0
            figures[engine.name] = [rate(workload, rows, seconds, first_s) for seconds in times[engine.name]]
        medians = {name: statistics.median(values) for name, values in figures.items()}
        line = f"{workload}: limit {bound:8.0f} tok/s"
        for name, values in figures.items():
            line += f" | {name} {medians[name]:8.1f} ({min(values):.1f} to {max(values):.1f})"
        if len(engines) > 1:
            line += f" | ratio {medians['taco'] / medians['transformers']:.2f}"
        if workload == "W1":
            line += " | first token " + ", ".join(f"{n} {statistics.median(v) * 1e3:.0f} ms" for n, v in first.items())
        print(line, flush=True)
        with timed_parts(taco.llm) as spent:
            total = taco.run(rows, NEW_TOKENS[workload], workload)
        spent["everything else"] = total - sum(spent.values())
        parts = sorted(spent.items(), key=lambda part: -part[1])
        print(
            "    parts of taco: "
            + ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in parts if s / total > 0.002)
        )
        results[workload] = {"limit": bound, "tokens_per_s": figures, "parts_s": dict(parts)}
    if args.json:
        header = versions() | {"threads": args.threads, "model": Path(model).name, "dtype": args.dtype}
        header |= {"memory_bytes_per_s": peaks[0], "products_per_s": peaks[1]}
        header |= {"load_s": {engine.name: engine.load_s for engine in engines}}
        args.json.write_text(json.dumps(header | {"workloads": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
