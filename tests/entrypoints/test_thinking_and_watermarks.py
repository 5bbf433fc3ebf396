"""`LLM` with budgets of reasoning and with watermarks, on a tiny random Llama."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taco import LLM, SamplingParams
from taco.errors import TacoValidationError
from taco.reasoning import extract_reasoning
from taco.sampling_params import BeamSearchParams, GuidedDecodingParams
from taco.watermark import WatermarkConfig, detect
from tests.tiny_tokenizers import byte_level_tokenizer

QUIET: dict[str, Any] = {"use_tqdm": False}
MARKS = {"reasoning_start_str": "<tool call>", "reasoning_end_str": "the hat<é>"}
KEY = {"key": 42}
Make = Callable[..., LLM]
PROMPTS = [[5 + (7 * i * n + n) % 250 for i in range(n)] for n in (1, 2, 15, 16, 17, 33)]
# What must not make a difference: chunks, preemption, planning ahead.
LIMITS: list[dict[str, Any]] = [
    {},
    {"max_num_seqs": 3, "max_num_batched_tokens": 8, "async_scheduling": True},
    {"num_gpu_blocks_override": 9, "preemption_mode": "recompute"},
    {"num_gpu_blocks_override": 9, "preemption_mode": "swap"},
]


@pytest.fixture(scope="module")
def make(tiny_llama_path: Path) -> Make:
    def make(**kwargs: Any) -> LLM:
        defaults = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 8, "swap_space": 0.01}
        return LLM(str(tiny_llama_path), **{**defaults, **kwargs})

    return make


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def plain(make: Make) -> list[list[list[int]]]:
    """Outputs without either."""
    with make() as llm:
        return tokens(llm.generate(PROMPTS, params(), **QUIET))


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 3, "max_tokens": 20, "ignore_eos": True, **fields})


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_reasoning_ends_at_its_budget_and_other_rows_do_not_change(
    make: Make, plain: list[list[list[int]]], limits: dict[str, Any]
) -> None:
    start, *forced = byte_level_tokenizer()("<tool call>the hat<é>", add_special_tokens=False)["input_ids"]
    budgets = [0, 1, 7, 12, 19, 50]
    asked = params(n=2, logit_bias=dict.fromkeys([start, *forced], -100))  # so that marks are forced or absent
    with make(reasoning_config=MARKS, **limits) as llm:
        prompts = [[*prompt, start] for prompt in PROMPTS] + PROMPTS
        each = [params(n=2, logit_bias=asked.logit_bias, thinking_token_budget=budget) for budget in budgets]
        outputs = tokens(llm.generate(prompts, each + [params()] * len(PROMPTS), **QUIET))
        free = tokens(llm.generate(prompts[: len(PROMPTS)], asked, **QUIET))
    assert outputs[len(PROMPTS) :] == plain
    for budget, samples, without in zip(budgets, outputs, free, strict=False):
        assert len(samples) == 2
        for sample, unforced in zip(samples, without, strict=True):
            assert sample[:budget] == unforced[:budget]
            assert sample[budget : budget + len(forced)] == forced[: max(0, 20 - budget)]
            assert not {start, *forced} & {*unforced, *sample[:budget], *sample[budget + len(forced) :]}


def test_the_thoughts_of_a_chat_can_be_cut_off_its_text(make: Make) -> None:
    with make(reasoning_config=MARKS) as llm:
        fields: dict[str, Any] = {"thinking_token_budget": 4, "skip_special_tokens": False}
        [output] = llm.generate("hello <tool call>", params(**fields), **QUIET)
        thoughts, answer = extract_reasoning(output.outputs[0].text, llm.llm_engine.config.reasoning_config)
        assert thoughts is not None and thoughts.endswith("the hat") and answer
        with pytest.raises(TacoValidationError, match="thinking_token_budget must be at least 0"):
            llm.generate("a", SamplingParams(thinking_token_budget=-2), **QUIET)
        # Beams end their reasoning too.
        start, *forced = byte_level_tokenizer()("<tool call>the hat<é>", add_special_tokens=False)["input_ids"]
        searching = SamplingParams(
            use_beam_search=True, best_of=3, n=3, temperature=0, max_tokens=8, thinking_token_budget=2, ignore_eos=True
        )
        [output] = llm.generate([[5, 6, start]], searching, **QUIET)
        assert [completion.token_ids[2:5] for completion in output.outputs] == [forced] * 3
    with make() as llm, pytest.raises(TacoValidationError, match="needs the marks"):
        llm.generate("a", params(thinking_token_budget=1), **QUIET)


@pytest.fixture(scope="module")
def marked(make: Make) -> list[list[list[int]]]:
    with make(watermark_config=KEY) as llm:
        return tokens(llm.generate(PROMPTS, params(max_tokens=60, top_p=0.95), **QUIET))


@pytest.mark.parametrize("limits", LIMITS[1:], ids=str)
def test_marks_do_not_depend_on_what_shares_the_batch(
    make: Make, plain: list[list[list[int]]], marked: list[list[list[int]]], limits: dict[str, Any]
) -> None:
    with make(watermark_config=WatermarkConfig(**KEY), **limits) as llm:
        asked = [params(max_tokens=60, top_p=0.95)] * len(PROMPTS) + [params(watermarking=False)] * len(PROMPTS)
        outputs = tokens(llm.generate(PROMPTS * 2, asked, **QUIET))
    assert outputs == marked + plain


def test_marked_texts_are_told_from_others(make: Make, marked: list[list[list[int]]]) -> None:
    with make(watermark_config=KEY) as llm:
        outputs = llm.generate(PROMPTS, params(max_tokens=60, top_p=0.95, watermarking=False), **QUIET)
    for [ours], [theirs] in zip(marked, tokens(outputs), strict=True):
        assert detect(ours, KEY).p_value < 1e-6
        assert detect(ours, {"key": 43}).p_value > 1e-3
        assert detect(theirs, KEY).p_value > 1e-3


def test_outputs_say_whether_they_are_marked(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    asked = [params(), params(watermarking=False), params(temperature=0), params(n=2, watermarking=True)]
    with make(watermark_config={**KEY, "algorithm": "dual_key_gumbel"}) as llm:
        outputs = llm.generate([[5]] * 4, asked, **QUIET)
        found = [(output.metrics.is_watermarked, output.metrics.is_watermark_skipped) for output in outputs]
        assert found == [(True, False), (False, False), (False, True), (True, False)]
        llm.beam_search([[5]], BeamSearchParams(2, 3, watermarking=True))
    assert [record.args for record in caplog.records if "without a watermark" in record.message] == [
        ("greedy sampling does not draw tokens; pass a temperature above 0",),
        ("beam search does not draw tokens",),
    ]


def test_marked_texts_stay_within_their_grammar(make: Make) -> None:
    asked = params(max_tokens=60, guided_decoding=GuidedDecodingParams(regex="[a-h ]{50}"), ignore_eos=False)
    with make(watermark_config=KEY) as llm:
        for output in llm.generate(PROMPTS, asked, **QUIET):
            assert re.fullmatch("[a-h ]{50}", output.outputs[0].text)
            assert detect(output.outputs[0].token_ids, KEY).p_value < 1e-4
