"""Throughput of taco beside transformers, on one machine, in one run.

    python benchmarks/offline.py [--model MODEL] [--dtype bfloat16] [--workloads W1 W2 ...] [--repeats 3] [--json FILE]

Workloads, all greedy and without end of sequence, from token-id prompts cut out of English text:
  W1  one prompt of 32 tokens, 128 new tokens: decoded tokens/s, less the time of the first token
  W2  64 prompts of 48 to 80 tokens, 64 new tokens each: output tokens/s
  W3  32 prompts of 448 to 576 tokens, 8 new tokens each: input tokens/s
  W4  64 prompts sharing their first 384 tokens, 16 of their own, 16 new tokens each: input + output tokens/s

  W4  64 prompts sharing their first 384 tokens, with 16 of their own, 16 new tokens: input + output tokens/s
machine could do at most: weights read once a token at the measured memory bandwidth (W1), or the products of the linear
layers at the measured peak of the matrix library (the others). Attention and everything else would come on top.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from taco import LLM, SamplingParams, __version__
from taco.entrypoints.demo_model import packaged_model
from taco.kernels.linear import linear, pack_weight

NEW_TOKENS = {"W1": 128, "W2": 64, "W3": 8, "W4": 16}
PEER_BATCH = {"W1": 1, "W2": 64, "W3": 8, "W4": 64}


def english(tokenizer: Any, count: int) -> list[int]:
    """At least `count` token ids of ordinary English: the topics of Python's own help."""
    from pydoc_data.topics import topics

    ids: list[int] = []
    for text in topics.values():
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= count:
            return ids
    raise SystemExit("the text is too short")


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
        self.llm.llm_engine.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        started = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        elapsed = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        return elapsed


class Transformers:
    """`generate` of transformers with the same weights, in left-padded batches."""

    name = "transformers"

    def __init__(self, model: str, dtype: str) -> None:
        from taco.models.loader.checkpoint import open_checkpoint
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

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int, workload: str) -> float:
        size = PEER_BATCH[workload]
        started = time.perf_counter()
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
            assert out.shape == (len(batch), width + new_tokens)
        return time.perf_counter() - started


def rate(workload: str, prompts: list[list[int]], seconds: float, first_token_s: float) -> float:
    """The workload's figure, in tokens/s."""
    output = len(prompts) * NEW_TOKENS[workload]
    if workload == "W1":
        return (output - 1) / (seconds - first_token_s)
    total_input = sum(map(len, prompts))
    return {"W2": output, "W3": total_input, "W4": total_input + output}[workload] / seconds


def median_time(function: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of reading memory, and operations/s of a matrix product of 256 rows in oneDNN's own layout."""
    block = torch.ones(64 << 20, dtype=torch.float32)
    bandwidth = block.numel() * 4 / median_time(lambda: block.sum())
    x, w = torch.randn(256, 576).to(dtype), torch.randn(3072, 576).to(dtype)
    packed = pack_weight(w)
    product = median_time(lambda: linear(x, packed), 50)
    return bandwidth, 2 * 256 * 576 * 3072 / product


def limit(
    workload: str, prompts: list[list[int]], num_params: int, head_params: int, item: int, peaks: tuple[float, float]
) -> float:
    """Tokens/s that no engine can pass: bytes of the weights, or operations of the linear layers that must happen."""
    bandwidth, peak = peaks
    output = len(prompts) * NEW_TOKENS[workload]
    body = num_params - head_params
    if workload == "W1":
        return bandwidth / (num_params * item)
    distinct = sum(map(len, prompts)) if workload != "W4" else 384 + 64 * 16
    operations = 2 * body * (distinct + output - len(prompts)) + 2 * head_params * output
    return rate(workload, prompts, operations / peak, 0)


@contextmanager
def timed_parts(llm: LLM):
    """Seconds spent in each part of taco while the context is open; parts inside parts are subtracted."""
    from taco.kernels import dispatch

    engine = llm.llm_engine
    runner = engine._executor.worker.runner
    spent: dict[str, float] = defaultdict(float)
    stack: list[float] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            stack.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                spent[name] += elapsed - stack.pop()
                if stack:
                    stack[-1] += elapsed

        return timed

    places = [
        (engine.scheduler, "schedule", "schedule"),
        (engine.scheduler, "update", "schedule"),
        (engine.output_processor, "process", "outputs"),
        (runner, "_make_batch", "build batch"),
        (runner, "_apply_changes", "build batch"),
        (runner, "collect", "collect tokens"),
        (runner.model, "forward", "model, rest"),
        (runner.model, "compute_logits", "logits"),
        (runner.sampler, "sample", "sampler"),
    ]
    for owner, attribute, name in places:
        setattr(owner, attribute, wrap(name, getattr(owner, attribute)))
    call = dispatch.Op.__call__
    dispatch.Op.__call__ = lambda op, *args, **kwargs: wrap(f"op {op.name}", call)(op, *args, **kwargs)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        dispatch.Op.__call__ = call  # type: ignore[method-assign]
        for owner, attribute, _ in places:
            delattr(owner, attribute)


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
    net = taco.llm.llm_engine._executor.worker.model
    config = taco.llm.llm_engine.model_config.hf_text_config
    head_params = config.vocab_size * config.hidden_size
    dtype = getattr(torch, args.dtype)
    num_params = sum(entry_size(entry) for entry in net.weight_entries())
    bandwidth, peak = machine_limits(dtype)
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} threads, {date.today()}; taco {__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {Path(model).name} in {args.dtype}\n"
        f"memory {bandwidth / 1e9:.1f} GB/s, products {peak / 1e9:.0f} GFLOP/s; "
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
        bound = limit(workload, rows, num_params, head_params, dtype.itemsize, (bandwidth, peak))
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
        head = {"date": str(date.today()), "taco": __version__, "torch": torch.__version__, "threads": args.threads}
        head |= {"transformers": transformers.__version__, "model": Path(model).name, "dtype": args.dtype}
        head |= {"memory_bytes_per_s": bandwidth, "products_per_s": peak, "load_s": {e.name: e.load_s for e in engines}}
        args.json.write_text(json.dumps(head | {"workloads": results}, indent=1) + "\n")


def entry_size(entry: Any) -> int:
    size = 1
    for length in entry.shape:
        size *= length
    return size


if __name__ == "__main__":
    main()
