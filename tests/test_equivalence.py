"""Whatever the engine does to be fast, greedy float32 tokens are those of transformers."""

from __future__ import annotations

import pytest

from taco import LLM, SamplingParams
from tests.reference import Reference, english_prompts

pytestmark = pytest.mark.real_model

EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65]
NUM_TOKENS = 12  # most sequences then begin another block


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return Reference(smollm2_path)


def make_llm(path, **options):
    options = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 256 << 20} | options
    return LLM(str(path), **options)


def check(reference, llm, prompts, max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == max_tokens
        reference.check_greedy(prompt, list(output.outputs[0].token_ids))
    return outputs


VARIANTS = {
    "one at a time": {"max_num_seqs": 1},
    "seven at a time": {"max_num_seqs": 7},
    "small chunks": {"max_num_batched_tokens": 32},
    "no prefix caching": {"enable_prefix_caching": False},
    "planned ahead": {"async_scheduling": True},
    "swapping": {"num_gpu_blocks_override": 34, "preemption_mode": "swap", "swap_space": 1},
    "recomputing": {"num_gpu_blocks_override": 34, "swap_space": 0},
    "blocks of 8": {"block_size": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_smollm2_greedy_tokens_and_prompt_logprobs(variant, smollm2_path, smollm2):
    with make_llm(smollm2_path, **VARIANTS[variant]) as llm:
        prompts = english_prompts(llm.get_tokenizer(), EDGES)
        prompts += [prompts[-1][:48] + prompts[3], prompts[-1][:41]]  # share a prefix
        check(smollm2, llm, prompts, NUM_TOKENS)
        if variant in ("swapping", "recomputing"):
            assert llm.llm_engine.scheduler.num_preemptions > 0, "the pool is too large to test this"
        check(smollm2, llm, prompts, NUM_TOKENS)  # again, with whatever is cached
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        for prompt in (prompts[0], prompts[5], prompts[10]):
            (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            got = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
            assert got == pytest.approx(smollm2.prompt_logprobs(prompt), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("max_num_batched_tokens", [32, 512, 8192])
@pytest.mark.parametrize("max_num_seqs", [1, 7, 64])
@pytest.mark.parametrize("caching", [True, False])
def test_smollm2_64_prompts_of_64_tokens(max_num_seqs, max_num_batched_tokens, caching, smollm2_path, smollm2):
    options = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    with make_llm(smollm2_path, enable_prefix_caching=caching, **options) as llm:
        lengths = [*EDGES, *range(5, 111, 2)]
        check(smollm2, llm, english_prompts(llm.get_tokenizer(), lengths), 64)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 32}, {"num_gpu_blocks_override": 66}], ids=str)
def test_gemma3_64_prompts_of_64_tokens(options, gemma3_path):
    reference = Reference(gemma3_path)
    with make_llm(gemma3_path, max_model_len=1024, **options) as llm:
        lengths = [*EDGES, *range(5, 101, 2), *(500, 511, 512, 513, 700)]  # the sliding window is 512
        prompts = english_prompts(llm.get_tokenizer(), lengths)
        check(reference, llm, prompts, 64)
        (output,) = llm.generate(
            {"prompt_token_ids": prompts[-1]}, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        got = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompts[-1][1:], strict=True)]
        assert got == pytest.approx(reference.prompt_logprobs(prompts[-1]), abs=1e-3)
