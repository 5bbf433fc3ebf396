"""Completes prompts with AlpacaEval; writes a JSON list of texts."""

import json
import sys

from alpaca_eval.decoders import get_fn_completions

if __name__ == "__main__":
    model, output, *prompts = sys.argv[1:]
    complete = get_fn_completions("vllm_local_completions")
    settings = {"temperature": 0.0, "stop": ["\n"], "model_kwargs": {"dtype": "float32", "max_model_len": 512}}
    texts = complete(prompts, model, max_new_tokens=16, batch_size=4, **settings)["completions"]
    with open(output, "w") as file:
        json.dump(texts, file)
