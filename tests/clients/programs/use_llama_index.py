"""Completes prompts with llama-index, one after the other; writes a JSON list of texts."""

import json
import sys

from llama_index.llms.vllm import Vllm

model, output, *prompts = sys.argv[1:]
llm = Vllm(
    model=model,
    dtype="float32",
    max_new_tokens=16,
    temperature=0,
    stop=["\n"],
    vllm_kwargs={"max_model_len": 512, "swap_space": 1, "gpu_memory_utilization": 0.5},
)
with open(output, "w") as file:
    json.dump([llm.complete(prompt).text for prompt in prompts], file)
