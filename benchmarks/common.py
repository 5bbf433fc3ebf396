"""What the benchmarks share: runs of both engines, parts of a step, and what is written down about them."""

from __future__ import annotations

import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

from taco import LLM, RequestOutput, SamplingParams, __version__

Prompts = Sequence[list[int]]


def english(tokenizer: Any, count: int) -> list[int]:
    """At least `count` token ids of ordinary English: the topics of Python's own help."""
    from pydoc_data.topics import topics

    ids: list[int] = []
    for text in topics.values():
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= count:
            return ids
    raise SystemExit("the text is too short")


def run_taco(llm: LLM, prompts: Prompts, new_tokens: int, **options: Any) -> float:
    """Seconds in which taco generates so many tokens for each prompt, greedily and without end of sequence.

    Args:
        options: further sampling parameters.
    """
    llm.llm_engine.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **options)
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    elapsed = time.perf_counter() - started
    assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
    return elapsed


def in_turns(
    prompts: Sequence[Any], runs: Sequence[tuple[LLM, Sequence[SamplingParams]]]
) -> list[tuple[float, list[RequestOutput]]]:
    """Runs engines in turns, a step each, so that they see the same machine, however its speed drifts.

    Args:
        prompts: of each run.
        runs: engines, and parameters for each prompt.

    Returns:
        For each run its seconds, and the outputs in the order of the prompts.
    """
    seconds = [0.0] * len(runs)
    outputs: list[dict[int, RequestOutput]] = [{} for _ in runs]
    for llm, _ in runs:
        llm.llm_engine.reset_prefix_cache()
    for place, (llm, params) in enumerate(runs):
        started = time.perf_counter()
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            llm.llm_engine.add_request(str(index), prompt, one)
        seconds[place] += time.perf_counter() - started
    while any(llm.llm_engine.has_unfinished_requests() for llm, _ in runs):
        for place, (llm, _) in enumerate(runs):
            started = time.perf_counter()
            if llm.llm_engine.has_unfinished_requests():
                for output in llm.llm_engine.step():
                    outputs[place][int(output.request_id)] = output
            seconds[place] += time.perf_counter() - started
    return [(taken, [found[i] for i in range(len(prompts))]) for taken, found in zip(seconds, outputs, strict=True)]


@torch.inference_mode()
def run_transformers(model: Any, prompts: Prompts, new_tokens: int, batch_size: int) -> float:
    """The same for `generate` of transformers, in left-padded batches; its generation_config has no end of sequence."""
    started = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        assert out.cpu().shape == (len(batch), width + new_tokens)
    return time.perf_counter() - started


def num_parameters(model: Any) -> tuple[int, int]:
    """Parameters of the layers of a `taco.models.base.CausalLM`, and of its head alone, which may be the embedding."""
    total = sum(prod(entry.shape) for entry in model.weight_entries())
    head = model.vocab_size * model.hidden_size
    return total - head * (1 if model.head.tied else 2), head


def times_of(function: Callable[[], object], repeats: int) -> list[float]:
    """The seconds that calls take, the shortest first."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return sorted(times)


def versions() -> dict[str, str]:
    """Date, commit, processor and versions, the head of a result file."""
    found = {"date": str(date.today()), "commit": commit(), "processor": processor()}
    found |= {"taco": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        pass
    return found


def commit() -> str:
    """The commit that runs, with "-dirty" where files differ from it; "unknown" outside of a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        folder = Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Name of the processor with its family and model, as the system gives them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {name.strip(): value.strip() for name, value in found.items()}
    name = found.get("model name", platform.machine())
    return f"{name}, family {found['cpu family']}, model {found['model']}" if "cpu family" in found else name


@contextmanager
def timed_parts(llm: LLM) -> Iterator[dict[str, float]]:
    """Seconds that the host spends in each part of taco while the context is open; parts inside parts are subtracted.

    On a GPU that is the time in which work is handed to the device, and "collect tokens" includes waiting for it.
    """
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
