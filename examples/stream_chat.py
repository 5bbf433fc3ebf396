"""A conversation whose answer is printed as it comes, with the engine driven step by step.

python examples/stream_chat.py [MODEL]
"""

from __future__ import annotations

import sys

from taco import LLM, SamplingParams
from taco.entrypoints.demo_model import packaged_model
from taco.sampling_params import RequestOutputKind


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(packaged_model("smollm2"))
    with LLM(model, max_model_len=1024, kv_cache_memory_bytes=256 << 20) as llm:
        conversation = [{"role": "user", "content": "Name three colours."}]
        prompt = llm.get_tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        engine = llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=48, output_kind=RequestOutputKind.DELTA)
        engine.add_request("colours", prompt, params, tokenization_kwargs={"add_special_tokens": False})
        while engine.has_unfinished_requests():
            for output in engine.step():
                print(output.outputs[0].text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
