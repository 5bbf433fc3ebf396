"""Beam search of a real model in float32 finds what transformers finds."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from taco import LLM
from taco.sampling_params import BeamSearchParams
from tests.reference import TIE, build, english_prompts

pytestmark = pytest.mark.real_model

WIDTH = 4


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    """A function from prompts of one length (so that they need no padding) to what transformers finds for each: tokens
    and sums of log-probabilities, best first."""
    model = build(smollm2_path)

    @cache
    @torch.inference_mode()
    def search(prompts, max_tokens):
        found = model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
            num_beams=WIDTH,
            num_return_sequences=WIDTH,
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        rows = list(zip(found.sequences.tolist(), (found.sequences_scores * max_tokens).tolist(), strict=True))
        return [rows[start : start + WIDTH] for start in range(0, len(rows), WIDTH)]

    return search


def check(path, reference, lengths, prompts_a_length, max_tokens, **options):
    """Compares all sequences of all prompts; those whose scores tie may come in either order."""
    limits = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}
    with LLM(str(path), **limits, **options) as llm:
        prompts = english_prompts(llm.get_tokenizer(), [length for length in lengths for _ in range(prompts_a_length)])
        outputs = llm.beam_search(prompts, BeamSearchParams(WIDTH, max_tokens, ignore_eos=True))
        llm.llm_engine.scheduler.check_integrity()
    expected = []
    for start in range(0, len(prompts), prompts_a_length):
        expected += reference(tuple(map(tuple, prompts[start : start + prompts_a_length])), max_tokens)
    for output, rows in zip(outputs, expected, strict=True):
        for sequence, (tokens, logprob) in zip(output.sequences, rows, strict=True):
            assert sequence.cum_logprob == pytest.approx(logprob, abs=1e-3)
            assert sequence.tokens == tokens or abs(sequence.cum_logprob - logprob) < TIE


def test_smollm2_beams(smollm2_path, smollm2):
    check(smollm2_path, smollm2, [15, 33], 1, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"enable_prefix_caching": False}, {"num_gpu_blocks_override": 90}, {"max_num_seqs": 7}], ids=str
)
def test_smollm2_20_prompts_of_64_tokens(options, smollm2_path, smollm2):
    check(smollm2_path, smollm2, [15, 16, 33, 50], 5, 64, **options)
