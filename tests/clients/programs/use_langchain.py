"""Completes prompts with langchain-community; writes a JSON list of texts."""

import json
import sys

from langchain_community.llms import VLLM

model, output, *prompts = sys.argv[1:]
llm = VLLM(
    model=model,
    dtype="float32",
    trust_remote_code=False,
    max_new_tokens=16,
    temperature=0,
    vllm_kwargs={"max_model_len": 512, "swap_space": 1, "gpu_memory_utilization": 0.5},
)
result = llm.generate(prompts, stop=["\n"])
with open(output, "w") as file:
    json.dump([generations[0].text for generations in result.generations], file)
