"""`taco demo`: a small real model answers eight questions."""

from __future__ import annotations

import argparse
import sys
import time

from taco.entrypoints.demo_model import packaged_model
from taco.version import __version__

HELP = "fetch a small model once and let it answer eight questions"

QUESTIONS = [
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Name three animals that live in the sea.",
    "Write a haiku about autumn leaves.",
    "What is the difference between a list and a tuple in Python?",
    "Give me a short recipe for guacamole.",
    "Rewrite this more politely: Send me the report now.",
    "Why do people sleep?",
]
MAX_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo has no arguments; `taco generate` and `taco chat` have."""


def run(args: argparse.Namespace) -> int:
    """Print each question with its answer, then the speed."""
    model = packaged_model("smollm2")
    print(f"taco {__version__} loads {model.name}", flush=True)
    start = time.perf_counter()
    from taco import LLM, SamplingParams

    with LLM(model=str(model), served_model_name=model.stem) as llm:
        load_seconds = time.perf_counter() - start
        conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        start = time.perf_counter()
        outputs = llm.chat(conversations, params, use_tqdm=sys.stderr.isatty())
        seconds = time.perf_counter() - start
        config = llm.llm_engine.model_config
        device = str(llm.llm_engine.device_config.device)

    for question, output in zip(QUESTIONS, outputs, strict=True):
        answer = output.outputs[0]
        ending = " ..." if answer.finish_reason == "length" else ""
        print(f"\nPrompt: {question}\nText:   {answer.text.strip()}{ending}")
    num_input = sum(len(output.prompt_token_ids or ()) for output in outputs)
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(
        f"\n{num_input} input and {num_output} output tokens in {seconds:.2f} s: "
        f"{num_input / seconds:.0f} input and {num_output / seconds:.0f} output tokens/s "
        f"({config.served_model_name}, {config.dtype_name}, {device}; imports and loading took {load_seconds:.1f} s)"
    )
    return 0
