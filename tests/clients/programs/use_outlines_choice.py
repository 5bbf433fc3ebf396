"""Lets outlines restrict an answer to two words; writes it as a JSON list of one text."""

import json
import sys
from typing import Literal

import outlines
from vllm import LLM, SamplingParams

model, output = sys.argv[1:]
generator = outlines.from_vllm_offline(LLM(model, dtype="float32", max_model_len=512))
answer = generator("Is snow white?", Literal["Yes", "No"], sampling_params=SamplingParams(temperature=0, max_tokens=8))
with open(output, "w") as file:
    json.dump([answer], file)
