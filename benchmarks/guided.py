"""What guided decoding costs: throughput under 64 JSON schemas beside that of free text, on one machine, in one run.

    python benchmarks/guided.py [--model MODEL] [--dtype bfloat16] [--rows 64] [--repeats 5] [--backends NAME ...]

Each row has a schema of its own. Its free twin has the same prompt and generates as many tokens, without end of
sequence, so that both runs return the same number of tokens. Guided rows run with schemas that the engine has never
seen (compiling included) and with known ones; "no forcing" draws every token by a step of the model. The speed of
shared machines drifts within seconds: two engines take turns step by step, one with the guided rows and one with their
twins, and the time of each is added up. Then each backend alone: time to compile, and to fill the masks of all rows for
one step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import in_turns, processor

from taco import LLM, SamplingParams, __version__
from taco.entrypoints.demo_model import packaged_model
from taco.guided.protocol import GrammarError
from taco.guided.request import to_spec
from taco.guided.selection import Backends
from taco.guided.vocabulary import make_vocabulary
from taco.sampling_params import GuidedDecodingParams

THINGS = "person city book film recipe song planet animal plant river company game car house job school".split()
FIELDS = "name title place owner colour language kind country author material purpose origin".split()
WORDS = "red green blue small large old new fast slow early late open closed warm cold quiet".split()


def make_schema(number: int, salt: str = "") -> dict[str, Any]:
    """One of many schemas of the kind that data sets are made with: strings, numbers, enums, lists, a nested object."""
    rng = random.Random(number)
    first, second, third = rng.sample(FIELDS, 3)
    properties: dict[str, Any] = {
        first: {"type": "string", "minLength": 3, "maxLength": rng.randint(20, 40)},
        second: {"enum": rng.sample(WORDS, rng.randint(3, 8))},
        "count": {"type": "integer", "minimum": 0, "maximum": rng.choice([9, 120, 5000])},
        "is_known": {"type": "boolean"},
        third: {
            "type": "array",
            "items": {"type": "string", "maxLength": 15},
            "minItems": 1,
            "maxItems": rng.randint(2, 4),
        },
        "details": {
            "type": "object",
            "properties": {
                "score": {"type": "number", "minimum": 0, "maximum": 10},
                "note": {"anyOf": [{"type": "string", "maxLength": 30}, {"type": "null"}]},
            },
            "required": ["score", "note"],
            "additionalProperties": False,
        },
    }
    names = [name for name in properties if name == first or rng.random() < 0.8]
    return {
        "title": f"{number}{salt}",
        "type": "object",
        "properties": {name: properties[name] for name in names},
        "required": names,
        "additionalProperties": False,
    }


def make_plain_schema(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schema that every backend enforces, and an object that matches."""
    rng = random.Random(number)
    first, second = rng.sample(FIELDS, 2)
    words = rng.sample(WORDS, rng.randint(3, 8))
    properties = {first: {"enum": words}, "is_known": {"type": "boolean"}, second: {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return schema, {first: words[0], "is_known": True, second: f"the {words[1]} one of {number} in the {words[2]} town"}


def percentiles(seconds: list[float]) -> str:
    p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
    return f"p50 {p50:8.2f} ms, p99 {p99:8.2f} ms, worst {max(seconds) * 1e3:8.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or GGUF file (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=160, help="limit for each row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backends", nargs="*", default=["llguidance", "xgrammar", "outlines"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = args.model or str(packaged_model("smollm2"))
    llm, other = (LLM(model, dtype=args.dtype, max_model_len=1024, max_num_seqs=args.rows) for _ in range(2))
    tokenizer = llm.get_tokenizer()
    prompts = [
        {
            "prompt_token_ids": tokenizer.apply_chat_template(
                [{"role": "user", "content": f"Describe a {THINGS[i % len(THINGS)]} as JSON."}],
                add_generation_prompt=True,
                return_dict=False,
            )
        }
        for i in range(args.rows)
    ]

    def guided(salt: str) -> list[SamplingParams]:
        return [
            SamplingParams(
                temperature=0.8,
                seed=i,
                max_tokens=args.tokens,
                guided_decoding=GuidedDecodingParams(json=make_schema(i, salt)),
            )
            for i in range(args.rows)
        ]

    outputs = llm.generate(prompts, guided("warm-up"), use_tqdm=False)
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    complete = sum(output.outputs[0].finish_reason == "stop" for output in outputs)
    free = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=count, ignore_eos=True) for i, count in enumerate(counts)
    ]
    other.generate(prompts, free, use_tqdm=False)
    sampler = llm.llm_engine.model_executor.driver_worker.runner.sampler
    shares: dict[str, list[float]] = {"guided, new schemas": [], "guided": [], "guided, no forcing": []}
    seconds: dict[str, list[float]] = {"free": [], **{name: [] for name in shares}}
    for repeat in range(args.repeats):
        for name, ratios in shares.items():
            if name == "guided, no forcing":
                sampler.take_forced = lambda row: []
            params = guided(str(repeat) if "new" in name else "warm-up")
            (guided_s, found), (free_s, free_found) = in_turns(prompts, [(llm, params), (other, free)])
            vars(sampler).pop("take_forced", None)
            for outputs in (found, free_found):
                assert [len(output.outputs[0].token_ids) for output in outputs] == counts
            seconds[name].append(guided_s)
            seconds["free"].append(free_s)
            ratios.append(free_s / guided_s)
    total = sum(counts)
    print(
        f"taco {__version__}, torch {torch.__version__}, {args.threads} threads, {processor()}; "
        f"{Path(model).name} in {args.dtype}"
    )
    print(f"{args.rows} rows with a schema each, {total} tokens, {complete} outputs complete; {args.repeats} repeats")
    for name, values in seconds.items():
        line = f"{name:22} {total / statistics.median(values):8.1f} tok/s"
        if name in shares:
            low, middle, high = np.percentile(shares[name], [25, 50, 75])
            line += f", {middle:6.3f} of free text (half of the runs: {low:.3f} to {high:.3f})"
        print(line)

    vocabulary = make_vocabulary(tokenizer, llm.llm_engine.model_config.vocab_size)
    texts = [output.outputs[0].token_ids for output in outputs]
    specs = [
        to_spec(GuidedDecodingParams(json=make_schema(i, "alone")), llm.llm_engine.config.guided_decoding_config)
        for i in range(args.rows)
    ]
    print("each backend alone, with these schemas:")
    for name in args.backends:
        measure_backend(name, Backends(vocabulary, num_threads=args.threads), specs, texts, vocabulary.size)
    config = llm.llm_engine.config.guided_decoding_config
    plain = [make_plain_schema(i) for i in range(args.rows)]
    specs = [to_spec(GuidedDecodingParams(json=schema), config) for schema, _ in plain]
    texts = [tokenizer.encode(json.dumps(value), add_special_tokens=False) for _, value in plain]
    print("and with schemas that all of them enforce:")
    for name in args.backends:
        measure_backend(name, Backends(vocabulary, num_threads=args.threads), specs, texts, vocabulary.size)


def measure_backend(name: str, backends: Any, specs: list[Any], texts: list[list[int]], vocab_size: int) -> None:
    """Prints what compiling the constraints takes, and filling the masks of all of them along given outputs."""
    import dataclasses

    grammars, refused, seconds = [], "", []
    for spec, text in zip(specs, texts, strict=True):
        try:
            backend, _ = backends.choose(dataclasses.replace(spec, backend=name))
            if backend.name != name:
                refused = f"handed to {backend.name}"
                break
            started = time.perf_counter()
            grammars.append((backend, backend.compile(spec), text))
            seconds.append(time.perf_counter() - started)
        except GrammarError as error:
            refused = str(error)
            break
        if sum(seconds) > 60:
            break
    if not grammars:
        print(f"  {name:11} {refused}")
        return
    print(f"  {name:11} compile ({len(seconds):2} schemas) {percentiles(seconds)} {refused}")
    matchers = [(grammar.start(), text) for _, grammar, text in grammars]
    masks = np.zeros((len(matchers), -(-vocab_size // 32)), np.int32)
    fill, accept = [], []
    for step in range(max(map(len, texts))):
        live = [matcher for matcher, text in matchers if step < len(text) and not matcher.must_stop()]
        if not live:
            break
        started = time.perf_counter()
        problems = backend.fill_masks(live, masks[: len(live)])
        fill.append(time.perf_counter() - started)
        assert not any(problems), problems
        started = time.perf_counter()
        matchers = [
            (matcher, text)
            for matcher, text in matchers
            if step < len(text) and not matcher.must_stop() and matcher.accept([text[step]])
        ]
        accept.append(time.perf_counter() - started)
    print(f"  {'':11} masks of a step       {percentiles(fill)}")
    print(f"  {'':11} accepting a step      {percentiles(accept)}")


if __name__ == "__main__":
    main()
