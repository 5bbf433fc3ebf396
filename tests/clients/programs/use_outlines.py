"""Answers questions with outlines, as a batch; writes a JSON list of texts."""

import json
import sys

import outlines
from vllm import LLM, SamplingParams

model, output, *questions = sys.argv[1:]
generator = outlines.from_vllm_offline(LLM(model, dtype="float32", max_model_len=512))
params = SamplingParams(temperature=0, max_tokens=16, stop=["\n"])
answers = [samples[0] for samples in generator.batch(questions, sampling_params=params)]
assert generator(questions[0], sampling_params=params) == answers[0]
with open(output, "w") as file:
    json.dump(answers, file)
