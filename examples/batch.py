"""A batch of prompts with parameters of their own, and one bad row that costs the others nothing.

    python examples/batch.py [MODEL]

MODEL is a folder, a hub id or a GGUF file; by default the packaged SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import sys

from taco import LLM, SamplingParams
from taco.entrypoints.demo_model import packaged_model


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(packaged_model("smollm2"))
    prompts = ["The capital of France is", "", "Once upon a time", {"prompt_token_ids": [504, 3575, 282]}]
    params = [
        SamplingParams(temperature=0, max_tokens=8),
        SamplingParams(max_tokens=8),
        SamplingParams(temperature=0.8, top_p=0.95, seed=7, n=2, max_tokens=16, stop=["."]),
        SamplingParams(temperature=0, max_tokens=4, logprobs=2),
    ]
    with LLM(model, max_num_seqs=16, max_model_len=512, kv_cache_memory_bytes=256 << 20) as llm:
        outputs = llm.generate(prompts, params, on_error="return")
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.error is not None:
            print(f"{prompt!r}: error: {output.error}")
            continue
        for completion in output.outputs:
            print(f"{prompt!r}: {completion.text!r} ({completion.finish_reason})")
        if output.outputs[0].logprobs is not None:
            for position in output.outputs[0].logprobs:
                print("   ", {entry.decoded_token: round(entry.logprob, 2) for entry in position.values()})


if __name__ == "__main__":
    main()
