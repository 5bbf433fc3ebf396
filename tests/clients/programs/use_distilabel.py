"""Answers questions with distilabel, by a pipeline with a process for each step and by the model alone, which is loaded
and unloaded again; writes a JSON list of texts."""

import json
import sys

from distilabel.models import vLLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration


def make_model(name: str) -> vLLM:
    return vLLM(
        model=name,
        dtype="float32",
        disable_cuda_device_placement=True,
        extra_kwargs={"max_model_len": 512},
        generation_kwargs={"temperature": 0.0, "max_new_tokens": 16, "stop": ["\n"]},
    )


if __name__ == "__main__":
    model, output, *questions = sys.argv[1:]
    with Pipeline("questions") as pipeline:
        load = LoadDataFromDicts(data=[{"instruction": question} for question in questions])
        load >> TextGeneration(llm=make_model(model))
    rows = pipeline.run(use_cache=False)["default"]["train"]
    answers = {row["instruction"]: row["generation"] for row in rows}

    llm = make_model(model)
    llm.load()
    conversation = [{"role": "user", "content": questions[0]}]
    [alone] = llm.generate_outputs(inputs=[conversation], logprobs=2, **llm.generation_kwargs)
    assert alone["generations"] == [answers[questions[0]]]
    assert all(len(position) in (2, 3) for position in alone["logprobs"][0])
    engine = llm._model.llm_engine
    llm.unload()
    assert engine.model_executor is None
    with open(output, "w") as file:
        json.dump([answers[question] for question in questions], file)
