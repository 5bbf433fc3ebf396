"""Throughput on one GPU, beside the limit of the machine and transformers, with random weights of real shapes.

    python benchmarks/gpu.py [--out FOLDER] [--models ...] [--workloads ...] [--seconds 240] [--tiny]

It needs neither a model hub nor a tokenizer. Workloads, greedy and without end of sequence, from random token ids:
  one      one prompt of 32 tokens, 128 new tokens: decoded tokens/s, less the time of the first token
  batch    256 prompts of 512 tokens, 128 new tokens each: output tokens/s
  prefill  32 prompts of 2048 tokens, 1 new token each: input tokens/s
  prefix   64 prompts sharing their first 1024 tokens, 32 of their own, 32 new tokens each: input + output tokens/s

The limit is the least time that the workload takes on this machine, at the bandwidth and the rate of products that the
run measures: each step reads the weights and the cached keys and values once, or is bound by the operations of linear
layers and attention. A step's time is given in three ways: all of it, the host's work (all but waiting for the device),
and the device's work (the kernels, from torch's profiler); what the device does not work it idles. Memory is what the
account of the start said beside the peak that torch saw.

transformers attends without cuDNN, which would make a plan for each new number of keys.

The time of the whole run is bounded: where the machine (or taco) is too slow for a workload, it is cut to fewer new
tokens or fewer prompts, which the result says. The file in FOLDER is written after each workload.

--tiny runs everything on the CPU with toy shapes, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # read when torch first attends

import torch
import transformers
from common import num_parameters, run_taco, run_transformers, timed_parts, times_of, versions

from taco import LLM, SamplingParams
from taco.worker import memory, profile

GIB = 1 << 30
DTYPE = torch.bfloat16
NUM_OBSERVED = 8  # steps whose time is taken


@dataclass(frozen=True)
class Shape:
    """A model of random weights.

    Args:
        config: its config.json.
        with_peer: run transformers beside it.
        options: for `LLM`.
    """

    config: dict[str, Any]
    with_peer: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """What is generated.

    Args:
        unit: of the figure: "decoded", "output", "input" or "total" tokens/s.
        shared: how many leading tokens all prompts have in common.
    """

    unit: str
    prompts: list[list[int]]
    new_tokens: int
    shared: int = 0

    @property
    def num_input(self) -> int:
        return sum(map(len, self.prompts))

    def rate(self, seconds: float, first_token_s: float = 0.0) -> float:
        """The figure, in tokens/s."""
        output = len(self.prompts) * self.new_tokens
        if self.unit == "decoded":
            return (output - 1) / (seconds - first_token_s)
        return {"output": output, "input": self.num_input, "total": self.num_input + output}[self.unit] / seconds


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "bfloat16",
}
SHAPES = {
    "smollm2-135m": Shape(
        LLAMA
        | {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
        with_peer=True,
        options={"gpu_memory_utilization": 0.5},  # the peer needs some, too
    ),
    "qwen3-0.6b": Shape(
        LLAMA
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "rms_norm_eps": 1e-6,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        }
    ),
    "llama-3.1-8b": Shape(
        LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        }
    ),
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}
# Workload: unit, number of prompts, their own tokens, tokens in common, new tokens.
SIZES = {
    "one": ("decoded", 1, 32, 0, 128),
    "batch": ("output", 256, 512, 0, 128),
    "prefill": ("input", 32, 2048, 0, 1),
    "prefix": ("total", 64, 32, 1024, 32),
}
TINY_SIZES = {
    "one": ("decoded", 1, 8, 0, 32),
    "batch": ("output", 6, 24, 0, 24),
    "prefill": ("input", 8, 96, 0, 1),
    "prefix": ("total", 4, 8, 32, 24),
}
PEER_WORKLOADS = ("one", "batch")


def say(text: str) -> None:
    print(text, flush=True)


def make_workload(name: str, vocab_size: int, tiny: bool) -> Workload:
    unit, num_prompts, own, shared, new_tokens = (TINY_SIZES if tiny else SIZES)[name]
    rng = random.Random(0)
    prefix = [rng.randrange(vocab_size) for _ in range(shared)]
    prompts = [prefix + [rng.randrange(vocab_size) for _ in range(own)] for _ in range(num_prompts)]
    return Workload(unit, prompts, new_tokens, shared)


# The limits of the machine


@dataclass(frozen=True)
class Machine:
    """What the device does at most.

    Args:
        bandwidth: bytes/s of reading its memory.
        products: operations/s of a large matrix product.
        call_s: seconds in which the host hands over one small operation.
        has_profiler: the times of kernels can be read.
    """

    device: torch.device
    name: str
    bandwidth: float
    products: float
    call_s: float
    has_profiler: bool

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_per_call(self, function: Callable[[], object], calls: int) -> float:
        def run() -> None:
            for _ in range(calls):
                function()
            self.synchronize()

        run()
        return statistics.median(times_of(run, 5)) / calls

    def device_seconds(self, work: Callable[[], object]) -> float:
        """Seconds in which the device computes or copies, of all that `work` hands over; 0 where they are unknown."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            work()
            self.synchronize()
        # A step may be a hundred thousand kernels, of which `found.events()` would make as many objects.
        events = found.profiler.kineto_results.events()
        spans = [(event.start_ns(), event.duration_ns()) for event in events if event.device_type().name == "CUDA"]
        busy = end = 0
        for start, duration in sorted(spans):
            busy += max(0, start + duration - max(start, end))
            end = max(end, start + duration)
        return busy / 1e9


def measure_machine(tiny: bool) -> Machine:
    device = torch.device("cpu" if tiny else "cuda")
    machine = Machine(device, platform.machine(), 1.0, 1.0, 1.0, has_profiler=False)
    size, calls = (256, 1) if tiny else (8192, 10)
    x, y = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    small = torch.zeros(1, device=device)
    machine = replace(
        machine,
        bandwidth=measure_bandwidth(machine, (1 << 22) if tiny else (1 << 30), calls),
        products=2 * size**3 / machine.seconds_per_call(lambda: x @ y, calls),
        call_s=machine.seconds_per_call(lambda: small.add_(1), 1000),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
        machine = replace(machine, name=torch.cuda.get_device_name(device))
        try:
            machine = replace(machine, has_profiler=machine.device_seconds(lambda: x @ y) > 0)
        except RuntimeError as error:
            say(f"no times of kernels: {error}")
    return machine


def measure_bandwidth(machine: Machine, size: int, calls: int) -> float:
    """Bytes/s of summing, or of copying, so many float32 numbers: whichever is more."""
    source = torch.ones(size, device=machine.device)
    target = torch.empty_like(source)
    reading = machine.seconds_per_call(source.sum, calls)
    copying = machine.seconds_per_call(lambda: target.copy_(source), calls)
    return max(source.nbytes / reading, 2 * source.nbytes / copying)


def least_seconds(workload: Workload, llm: LLM, machine: Machine) -> tuple[float, float]:
    """Seconds that computing the prompts and the first tokens, and then the other tokens, take at least."""
    engine = llm.llm_engine
    model = engine._executor.worker.model
    body, head = num_parameters(model)
    weight_bytes = (body + head) * DTYPE.itemsize
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE.itemsize
    operations_a_pair = 4 * model.num_layers * engine.model_config.hf_text_config.num_attention_heads * model.head_dim
    rows, shared = len(workload.prompts), workload.shared

    def seconds(num_operations: float, num_bytes: float) -> float:
        return max(num_operations / machine.products, num_bytes / machine.bandwidth)

    distinct = workload.num_input - (rows - 1) * shared
    pairs = (shared**2 + sum(len(ids) ** 2 - shared**2 for ids in workload.prompts)) / 2
    prompts_s = seconds(2 * body * distinct + 2 * head * rows + operations_a_pair * pairs, weight_bytes)
    decode_s = 0.0
    for step in range(1, workload.new_tokens):
        keys = workload.num_input + rows * step
        distinct_keys = keys - (rows - 1) * shared
        decode_s += seconds(
            2 * (body + head) * rows + operations_a_pair * keys, weight_bytes + distinct_keys * kv_bytes
        )
    return prompts_s, decode_s


# What a step is made of


@dataclass
class Observed:
    """Steps of one kind: of decoding, or of computing prompts where the workload is about that.

    Args:
        prompts_s: seconds until all prompts were computed; 0 where the steps are about that.
        step_s, host_s, device_s: of a step: all of it, the host's work, the device's work (None if it is unknown).
        parts_s: what the host's time of a step goes to.
    """

    prompts_s: float
    step_s: float
    host_s: float
    device_s: float | None
    parts_s: dict[str, float]


def observe(llm: LLM, workload: Workload, machine: Machine, seconds: float) -> Observed | None:
    """Runs the beginning of a workload, which is also its warm-up; None if the time ends before anything is known."""
    engine = llm.llm_engine
    scheduler = engine.scheduler
    decodes = workload.unit != "input"
    until = time.perf_counter() + seconds
    names = [f"observed {index}" for index in range(len(workload.prompts))]
    max_tokens = max(workload.new_tokens, 2 * NUM_OBSERVED)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)

    def computes_prompts() -> bool:
        return bool(len(scheduler.waiting)) or any(
            request.num_computed_tokens < request.num_prompt_tokens for request in scheduler.running
        )

    def run(count: int) -> int:
        """Steps, at most `count`, and as long as they are of the kind."""
        done = 0
        while done < count and engine.has_unfinished_requests() and (decodes or computes_prompts()):
            engine.step()
            done += 1
            if time.perf_counter() > until:
                break
        machine.synchronize()
        return done

    engine.reset_prefix_cache()
    for name, ids in zip(names, workload.prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, params)
    try:
        started = time.perf_counter()
        while decodes and computes_prompts():
            engine.step()
            if time.perf_counter() > until:
                return None
        prompts_s = time.perf_counter() - started if decodes else 0.0
        run(2 if decodes else 1)
        with timed_waits(llm) as waited:
            started = time.perf_counter()
            count = run(NUM_OBSERVED if decodes else 3)
            step_s = (time.perf_counter() - started) / max(1, count)
        if not count:
            return None
        host_s = step_s - waited[0] / count
        device_s = None
        if machine.has_profiler and time.perf_counter() < until:
            counts: list[int] = []
            busy = machine.device_seconds(lambda: counts.append(run(1 if step_s > 0.1 else 4)))
            device_s = busy / counts[0] if counts[0] else None
        parts_s: dict[str, float] = {}
        with timed_parts(llm) as spent:
            if (count := run(2)) > 0:
                parts_s = {name: part / count for name, part in sorted(spent.items(), key=lambda item: -item[1])}
        return Observed(prompts_s, step_s, host_s, device_s, parts_s)
    finally:
        engine.abort_request(names)


@contextmanager
def timed_waits(llm: LLM) -> Iterator[list[float]]:
    """Seconds in which the host waits for steps to end on the device, summed up in the first element."""
    runner = llm.llm_engine._executor.worker.runner
    collect = runner.collect
    waited = [0.0]

    def timed(pending: Any) -> Any:
        if pending.result is None and pending.ready is not None:
            started = time.perf_counter()
            pending.ready.synchronize()
            waited[0] += time.perf_counter() - started
        return collect(pending)

    runner.collect = timed
    try:
        yield waited
    finally:
        del runner.collect


def cut(workload: Workload, observed: Observed, seconds: float, tokens_a_step: int) -> Workload:
    """As much of the workload as fits into the time."""
    if workload.unit != "input":
        steps = int((seconds - observed.prompts_s) / observed.step_s)
        return replace(workload, new_tokens=max(4, min(workload.new_tokens, steps)))
    num_prompts = int(seconds / observed.step_s * tokens_a_step / len(workload.prompts[0]))
    return replace(workload, prompts=workload.prompts[: max(1, num_prompts)])


# Memory


@contextmanager
def recorded_account() -> Iterator[list[int]]:
    """What `taco.worker.profile` found that a step needs; empty where nobody asked (on a CPU)."""
    found: list[int] = []
    worst_case_bytes = profile.worst_case_bytes

    def recording(*args: Any) -> int:
        found.append(worst_case_bytes(*args))
        return found[-1]

    profile.worst_case_bytes = recording
    try:
        yield found
    finally:
        profile.worst_case_bytes = worst_case_bytes


def memory_account(llm: LLM, step_bytes: list[int]) -> dict[str, int]:
    """Bytes that the engine has taken and may take."""
    worker = llm.llm_engine._executor.worker
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in worker.model.parameters()}
    account = {
        "weights": sum(weights.values()),
        "kv_cache": sum(tensor.nbytes for layer in worker.runner.kv_cache.layers for tensor in layer),
        "step": step_bytes[0] if step_bytes else memory.cpu_step_bytes(worker.config, worker.model),
    }
    return account | {"sum": sum(account.values())}


class PeakMemory:
    """Bytes that torch has handed out at most since `start`, less those that were there before the engine."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) - self.before if self.device.type == "cuda" else None


# Runs


def load_peer(folder: Path, device: torch.device) -> Any:
    """transformers' model of a folder, with random weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config).to(device, DTYPE).eval()
    model.generation_config.eos_token_id = None
    return model


def measure(
    name: str, workload: Workload, llm: LLM, peer: Any | None, machine: Machine, peak: PeakMemory, seconds: float
) -> dict[str, Any]:
    """Runs one workload for about so many seconds; returns what the result file says of it."""
    until = time.perf_counter() + seconds
    peak.start()
    observed = observe(llm, workload, machine, seconds / 2)
    if observed is None:
        say(f"  {name}: too slow for the time that is left")
        return {"skipped": "too slow"}
    left = (until - time.perf_counter()) / (2 if peer is not None else 1)
    whole = workload
    workload = cut(workload, observed, left, llm.llm_engine.scheduler_config.max_num_batched_tokens)
    engines: dict[str, Callable[[int], float]] = {
        "taco": lambda new_tokens: run_taco(llm, workload.prompts, new_tokens, detokenize=False)
    }
    if peer is not None:
        size = len(workload.prompts)
        engines["transformers"] = lambda new_tokens: run_transformers(peer, workload.prompts, new_tokens, size)
        engines["transformers"](4)  # its warm-up
    figures: dict[str, list[float]] = {engine: [] for engine in engines}
    first_tokens: dict[str, list[float]] = {engine: [] for engine in engines}
    peaks: list[int] = []
    for repeat in range(3):
        started = time.perf_counter()
        for engine, run in engines.items():
            peak.start()
            first_s = run(1) if workload.unit == "decoded" else 0.0
            figures[engine].append(workload.rate(run(workload.new_tokens), first_s))
            if workload.unit == "decoded":
                first_tokens[engine].append(first_s)
            if engine == "taco" and (found := peak.read()) is not None:
                peaks.append(found)
        if repeat < 2 and 2 * time.perf_counter() - started > until:
            break

    prompts_s, decode_s = least_seconds(workload, llm, machine)
    limit = workload.rate(prompts_s + decode_s, prompts_s)
    medians = {engine: statistics.median(values) for engine, values in figures.items()}
    line = f"  {name}: limit {limit:.0f} {workload.unit} tokens/s"
    for engine, values in figures.items():
        line += f" | {engine} {medians[engine]:.1f} ({min(values):.1f} to {max(values):.1f})"
    line += f", {100 * medians['taco'] / limit:.1f} % of the limit"
    if peer is not None:
        line += f", ratio {medians['taco'] / medians['transformers']:.2f}"
    if workload != whole:
        line += f" | cut to {len(workload.prompts)} prompts, {workload.new_tokens} new tokens"
    say(line)
    line = f"    a step: {1e3 * observed.step_s:.2f} ms, host {1e3 * observed.host_s:.2f} ms"
    if observed.device_s is not None:
        line += f", device {1e3 * observed.device_s:.2f} ms"
    if peaks:
        line += f" | peak {max(peaks) / GIB:.2f} GiB"
    parts = [f"{part} {1e3 * part_s:.2f}" for part, part_s in list(observed.parts_s.items())[:8]]
    say(f"{line}\n    host, ms: {', '.join(parts)}")
    result = {
        "prompts": len(workload.prompts),
        "input_tokens": workload.num_input,
        "new_tokens": workload.new_tokens,
        "is_cut": workload != whole,
        "unit": f"{workload.unit} tokens/s",
        "limit": limit,
        "figures": figures,
        "step_ms": 1e3 * observed.step_s,
        "host_ms": 1e3 * observed.host_s,
        "device_ms": None if observed.device_s is None else 1e3 * observed.device_s,
        "parts_ms": {part: 1e3 * part_s for part, part_s in observed.parts_s.items()},
        "peak_bytes": max(peaks, default=None),
    }
    return result | ({"first_token_s": first_tokens} if workload.unit == "decoded" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--workloads", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--seconds", type=float, default=240, help="for the whole run, about")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    until = time.perf_counter() + args.seconds
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --tiny runs on the CPU")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    machine = measure_machine(args.tiny)
    result = versions() | {"cuda": torch.version.cuda, "python": platform.python_version(), "device": machine.name}
    result |= {"dtype": str(DTYPE).removeprefix("torch."), "memory_bytes_per_s": machine.bandwidth}
    result |= {"products_per_s": machine.products, "small_operation_s": machine.call_s, "models": {}}
    say(", ".join(f"{name} {value}" for name, value in result.items() if isinstance(value, str)))
    say(
        f"memory {machine.bandwidth / 1e9:.0f} GB/s, products {machine.products / 1e12:.1f} TFLOP/s, "
        f"{1e6 * machine.call_s:.1f} us for a small operation"
    )

    def write() -> None:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            name = "-".join([result["date"], *machine.name.lower().replace("_", " ").split(), result["dtype"]])
            (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    num_left = len(args.models) * len(args.workloads)
    for model_name in args.models:
        shape = SHAPES[model_name]
        config = shape.config | (TINY if args.tiny else {})
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            peer = load_peer(Path(folder), machine.device) if shape.with_peer else None
            peak = PeakMemory(machine.device)
            started = time.perf_counter()
            with recorded_account() as step_bytes:
                llm = LLM(
                    folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    dtype=result["dtype"],
                    device=machine.device.type,
                    max_model_len=256 if args.tiny else 4096,
                    **({"kv_cache_memory_bytes": 1 << 24, "max_num_batched_tokens": 128} if args.tiny else {}),
                    **shape.options,
                )
        load_s = time.perf_counter() - started
        account = memory_account(llm, step_bytes)
        say(
            f"{model_name}: loaded in {load_s:.1f} s; account in GiB: "
            + ", ".join(f"{name} {value / GIB:.2f}" for name, value in account.items())
        )
        workloads: dict[str, Any] = {}
        result["models"][model_name] = {"load_s": load_s, "account_bytes": account, "workloads": workloads}
        for name in args.workloads:
            left = until - time.perf_counter()
            if left < 2:
                say(f"  {name}: no time left")
                workloads[name] = {"skipped": "no time left"}
            else:
                workload = make_workload(name, config["vocab_size"], args.tiny)
                own_peer = peer if name in PEER_WORKLOADS else None
                workloads[name] = measure(name, workload, llm, own_peer, machine, peak, left / num_left)
            num_left -= 1
            write()
        llm.close()
        del llm, peer
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
