"""Beam search with the real engine and a tiny random Llama, against transformers and against a plain search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from taco import LLM, SamplingParams
from taco.errors import TacoError, TacoValidationError
from taco.outputs import BeamSearchOutput, BeamSearchSequence
from taco.sampling_params import BeamSearchParams, StructuredOutputsParams
from tests.engine.beam_reference import search_everything, search_with_early_stopping
from tests.entrypoints.conftest import NUM_POSITIONS
from tests.tiny_tokenizers import byte_level_tokenizer

EOS, PAD = 1, 2
WIDTH = 4
QUIET: dict[str, Any] = {"use_tqdm": False}
BEAMS: dict[str, Any] = {"use_beam_search": True, "temperature": 0}
# Around the edges of blocks; the tokens are arbitrary.
PROMPTS = [[5 + (7 * i * n + n) % 250 for i in range(n)] for n in (1, 2, 5, 15, 16, 17, 31, 32, 48)]
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def model_path(tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, with an end of sequence that is often likely."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama_path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2.5
    folder = tmp_path_factory.mktemp("ending-llama")
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(model_path: Path) -> Make:
    def make(**kwargs: Any) -> LLM:
        defaults = {"dtype": "float32", "kv_cache_memory_bytes": 2 << 20, "max_num_seqs": 16, "swap_space": 0.01}
        return LLM(str(model_path), **{**defaults, **kwargs})

    return make


@pytest.fixture(scope="module", params=["0.6", "0.33"])
def preset(request: pytest.FixtureRequest, make: Make) -> Iterator[tuple[str, LLM]]:
    with make(compat_version=request.param) as llm:
        yield request.param, llm


@pytest.fixture(scope="module")
def llm(make: Make) -> Iterator[LLM]:
    with make() as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(model_path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def next_logits(reference: LlamaForCausalLM) -> Callable[[list[int]], torch.Tensor]:
    @cache
    def cached(tokens: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            return reference(torch.tensor([tokens])).logits[0, -1]

    return lambda tokens: cached(tuple(tokens))


def of_transformers(reference: LlamaForCausalLM, prompt: list[int], max_tokens: int, **options: Any) -> list[list[int]]:
    """What transformers generates, best first, each up to its end of sequence."""
    with torch.inference_mode():
        found = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=WIDTH,
            num_return_sequences=WIDTH,
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=PAD,
            **{"eos_token_id": EOS, **options},
        ).tolist()
    outputs = [row[len(prompt) :] for row in found]
    if "eos_token_id" in options:
        return outputs
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in outputs]


def generated(prompts: list[list[int]], outputs: list[BeamSearchOutput]) -> list[list[list[int]]]:
    rows = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert all(sequence.tokens[: len(prompt)] == prompt for sequence in output.sequences)
        rows.append([sequence.tokens[len(prompt) :] for sequence in output.sequences])
    return rows


@pytest.fixture(scope="module")
def unending(reference: LlamaForCausalLM) -> list[list[list[int]]]:
    return [of_transformers(reference, prompt, 12, eos_token_id=None) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 2},
        {"max_num_seqs": 2, "enable_prefix_caching": False, "swap_space": 0},
        {"max_num_seqs": 6, "max_num_batched_tokens": 8},
        {"enable_prefix_caching": False},
        {"async_scheduling": True},
        {"num_gpu_blocks_override": 12, "preemption_mode": "recompute"},
        {"num_gpu_blocks_override": 12, "preemption_mode": "swap", "async_scheduling": True},
    ],
    ids=str,
)
def test_sequences_equal_transformers_whatever_shares_the_batch(
    make: Make, unending: list[list[list[int]]], limits: dict[str, Any]
) -> None:
    with make(**limits) as llm:
        for _ in range(2):  # the second time prompts are found in the prefix cache
            outputs = llm.beam_search(PROMPTS, BeamSearchParams(WIDTH, 12, ignore_eos=True))
            assert generated(PROMPTS, outputs) == unending
            llm.llm_engine.scheduler.check_integrity()
        scheduler = llm.llm_engine.scheduler
        assert (scheduler.num_preemptions > 0) == (
            "num_gpu_blocks_override" in limits or limits.get("max_num_seqs") == 2
        )


# Where an end of sequence is likely, transformers and early vLLM agree under these settings.
@pytest.mark.parametrize(("early_stopping", "length_penalty"), [(False, 1.0), (False, 2.0), ("never", 1.0)])
def test_sequences_end_as_in_transformers(
    make: Make, reference: LlamaForCausalLM, early_stopping: Any, length_penalty: float
) -> None:
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    expected = [of_transformers(reference, prompt, 12, **options) for prompt in PROMPTS]
    assert any(row[-1] == EOS for rows in expected for row in rows)
    with make(compat_version="0.33") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(n=WIDTH, max_tokens=12, **BEAMS, **options), **QUIET)
        assert [[completion.token_ids for completion in output.outputs] for output in outputs] == expected
        if early_stopping == "never":
            outputs = llm.beam_search(PROMPTS, BeamSearchParams(WIDTH, 12, length_penalty=length_penalty))
            assert generated(PROMPTS, outputs) == expected


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("early_stopping", ["everything", True, False])
def test_sequences_and_their_order_equal_those_of_a_plain_search(
    preset: tuple[str, LLM], next_logits: Any, early_stopping: Any, length_penalty: float
) -> None:
    version, llm = preset
    prompts = PROMPTS[:4]
    scoring = {"length_penalty": length_penalty, "score_includes_prompt": version == "0.6", "eos": EOS}

    def model(tokens: list[int]) -> list[float]:
        return next_logits(tokens).log_softmax(-1).tolist()

    if early_stopping == "everything":
        expected = [search_everything(prompt, model, 3, 6, {EOS}, **scoring) for prompt in prompts]
        found = generated(prompts, llm.beam_search(prompts, BeamSearchParams(3, 6, length_penalty=length_penalty)))
    else:
        expected = [
            search_with_early_stopping(prompt, model, 3, 6, {EOS}, early_stopping, **scoring) for prompt in prompts
        ]
        options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
        outputs = llm.generate(prompts, SamplingParams(n=3, max_tokens=6, **BEAMS, **options), **QUIET)
        found = [[completion.token_ids for completion in output.outputs] for output in outputs]
    assert found == [[output for output, _ in rows] for rows in expected]
    lengths = {len(output) for rows in found for output in rows}
    assert len(lengths) > 1, "no sequence ends early, so this tests little"


def test_what_a_sequence_tells(preset: tuple[str, LLM], next_logits: Any) -> None:
    version, llm = preset
    tokenizer = byte_level_tokenizer()
    prompt = {"prompt": "hello there"}
    [output] = llm.beam_search([prompt], BeamSearchParams(2, 6))
    assert type(output) is BeamSearchOutput and len(output.sequences) == 2
    for sequence in output.sequences:
        assert type(sequence) is BeamSearchSequence
        num_prompt = len(tokenizer("hello there").input_ids)
        assert sequence.tokens[:num_prompt] == tokenizer("hello there").input_ids
        new = sequence.tokens[num_prompt:]
        assert type(sequence.logprobs) is list and len(sequence.logprobs) == len(new) <= 6
        total = 0.0
        for position, (token, entries) in enumerate(zip(new, sequence.logprobs, strict=True)):
            logprobs = next_logits(sequence.tokens[: num_prompt + position]).log_softmax(-1)
            assert set(entries) == set(logprobs.topk(4).indices.tolist())
            for rank, other in enumerate(logprobs.topk(4).indices.tolist(), start=1):
                assert entries[other].rank == rank
                assert entries[other].logprob == pytest.approx(float(logprobs[other]), abs=1e-4)
                assert (entries[other].decoded_token is None) == (version == "0.33")
            total += entries[token].logprob
        assert sequence.cum_logprob == pytest.approx(total)
        assert sequence.text == tokenizer.decode(sequence.tokens, skip_special_tokens=version == "0.33")
        assert "hello there" in (sequence.text or "")
        assert (sequence.finish_reason, sequence.stop_reason, sequence.lora_request) == (None, None, None)
        assert sequence.orig_prompt == prompt
    [shown] = llm.beam_search("hello there", BeamSearchParams(2, 6, skip_special_tokens=False))
    assert (shown.sequences[0].text or "").startswith("<s>")


def test_one_beam_is_greedy_until_the_end_of_sequence(llm: LLM) -> None:
    greedy = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), **QUIET)
    found = generated(PROMPTS, llm.beam_search(PROMPTS, BeamSearchParams(1, 8, ignore_eos=True)))
    assert found == [[output.outputs[0].token_ids] for output in greedy]


def test_temperature_divides_the_logits_where_log_probabilities_are_processed(
    preset: tuple[str, LLM], next_logits: Any
) -> None:
    version, llm = preset
    temperature = 2.5 if version == "0.6" else 1.0

    def model(tokens: list[int]) -> list[float]:
        return (next_logits(tokens) / temperature).log_softmax(-1).tolist()

    scoring = {"length_penalty": 1.0, "score_includes_prompt": version == "0.6", "eos": EOS}
    expected = [search_everything(prompt, model, 3, 5, {EOS}, **scoring) for prompt in PROMPTS[:3]]
    found = generated(PROMPTS[:3], llm.beam_search(PROMPTS[:3], BeamSearchParams(3, 5, temperature=2.5)))
    assert found == [[output for output, _ in rows] for rows in expected]


def test_allowed_tokens_leave_fewer_beams(preset: tuple[str, LLM], next_logits: Any) -> None:
    version, llm = preset
    allowed = [7, 8]
    for num_allowed in (1, 2):
        [output] = llm.beam_search([PROMPTS[2]], BeamSearchParams(4, 2, allowed_token_ids=allowed[:num_allowed]))
        [found] = generated([PROMPTS[2]], [output])
        assert len(found) == num_allowed**2
        assert {token for row in found for token in row} == set(allowed[:num_allowed])
        for sequence, row in zip(output.sequences, found, strict=True):
            total = 0.0
            for position, token in enumerate(row):
                logits = next_logits(PROMPTS[2] + row[:position])
                if version == "0.6":  # of what is left
                    logits = logits[allowed[:num_allowed]]
                    token = allowed.index(token)
                total += float(logits.log_softmax(-1)[token])
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-4)


def test_beam_search_inside_sampling_returns_the_best_n_of_the_beams(llm: LLM) -> None:
    every = llm.generate(PROMPTS, SamplingParams(n=4, max_tokens=8, **BEAMS), **QUIET)
    some = llm.generate(PROMPTS, SamplingParams(n=2, best_of=4, max_tokens=8, logprobs=1, **BEAMS), **QUIET)
    for four, two in zip(every, some, strict=True):
        assert [c.token_ids for c in two.outputs] == [c.token_ids for c in four.outputs[:2]]
        assert [c.index for c in four.outputs] == [0, 1, 2, 3]
        for completion in four.outputs:
            assert completion.logprobs is None and completion.cumulative_logprob is None
            ended = completion.token_ids[-1] == EOS
            assert (completion.finish_reason, completion.stop_reason) == ("stop" if ended else "length", None)
            assert ended or len(completion.token_ids) == 8
        for completion in two.outputs:
            own = [row[token] for row, token in zip(completion.logprobs or (), completion.token_ids, strict=True)]
            assert completion.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in own))
            assert all(
                len(row) == (1 if entry.rank == 1 else 2) for row, entry in zip(completion.logprobs, own, strict=True)
            )
        assert two.finished and two.prompt_token_ids == four.prompt_token_ids
        assert two.metrics.num_generation_tokens == sum(len(c.token_ids) for c in two.outputs)


def test_searches_and_samples_share_a_batch(make: Make, llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    search = SamplingParams(n=3, max_tokens=24, ignore_eos=True, prompt_logprobs=1, **BEAMS)
    params = [search if i % 2 else plain for i in range(len(PROMPTS))]
    alone = [llm.generate(prompt, one, **QUIET)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    with make(num_gpu_blocks_override=14, max_num_batched_tokens=16) as small:
        together = small.generate(PROMPTS, params, **QUIET)
        assert small.llm_engine.scheduler.num_preemptions > 0
    assert [[c.token_ids for c in o.outputs] for o in together] == [[c.token_ids for c in o.outputs] for o in alone]
    assert [[c.text for c in o.outputs] for o in together] == [[c.text for c in o.outputs] for o in alone]
    for output, prompt, one in zip(together, PROMPTS, params, strict=True):
        assert output.prompt_token_ids == prompt
        if one is search:
            assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)


def test_a_stop_text_ends_a_sequence_and_is_cut_off(llm: LLM) -> None:
    params: dict[str, Any] = {"n": 4, "max_tokens": 10, "ignore_eos": True, **BEAMS}
    [plain] = llm.generate([PROMPTS[3]], SamplingParams(**params), **QUIET)
    text = plain.outputs[0].text
    stop = next(char for char in text[1:] if char.isascii() and char.isalnum())
    [output] = llm.generate([PROMPTS[3]], SamplingParams(stop=[stop], **params), **QUIET)
    [kept] = llm.generate([PROMPTS[3]], SamplingParams(stop=[stop], include_stop_str_in_output=True, **params), **QUIET)
    stopped = [completion for completion in output.outputs if completion.finish_reason == "stop"]
    assert stopped
    for completion in output.outputs:
        assert stop not in completion.text
        assert completion.stop_reason == (stop if completion.finish_reason == "stop" else None)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 10
    assert [c.token_ids for c in kept.outputs] == [c.token_ids for c in output.outputs]
    assert all(c.text.endswith(stop) for c in kept.outputs if c.finish_reason == "stop")
    [later] = llm.generate([PROMPTS[3]], SamplingParams(stop=[stop], min_tokens=10, **params), **QUIET)
    assert all(len(completion.token_ids) == 10 for completion in later.outputs)


def test_stop_tokens_and_min_tokens(llm: LLM, next_logits: Any) -> None:
    first = int(next_logits(PROMPTS[2]).argmax())
    params: dict[str, Any] = {"n": 3, "max_tokens": 5, "stop_token_ids": [first], **BEAMS}
    [output] = llm.generate([PROMPTS[2]], SamplingParams(**params), **QUIET)
    assert any(c.token_ids == [first] and c.stop_reason == first for c in output.outputs)
    [output] = llm.generate([PROMPTS[2]], SamplingParams(min_tokens=3, **params), **QUIET)
    assert all(len(c.token_ids) > 3 or c.token_ids[-1] not in (first, EOS) for c in output.outputs)
    assert all(first not in c.token_ids[:3] and EOS not in c.token_ids[:3] for c in output.outputs)


def test_constraints_follow_each_beams_own_output(llm: LLM, next_logits: Any) -> None:
    def model(tokens: list[int]) -> list[float]:
        logits = next_logits(tokens).clone()
        seen = {(tokens[i], tokens[i + 1]) for i in range(len(tokens) - 1)}
        for token in range(len(logits)):
            if (tokens[-1], token) in seen:
                logits[token] = -torch.inf
            count = tokens[len(PROMPTS[0]) :].count(token)
            logits[token] -= 1.5 * count
        return logits.log_softmax(-1).tolist()

    scoring = {"length_penalty": 1.0, "score_includes_prompt": True, "eos": None}
    expected = search_with_early_stopping(PROMPTS[0], model, 3, 8, set(), False, **scoring)
    params = SamplingParams(n=3, max_tokens=8, ignore_eos=True, no_repeat_ngram_size=2, frequency_penalty=1.5, **BEAMS)
    [output] = llm.generate([PROMPTS[0]], params, **QUIET)
    assert [c.token_ids for c in output.outputs] == [tokens for tokens, _ in expected]


def test_the_context_ends_sequences(preset: tuple[str, LLM]) -> None:
    version, llm = preset
    sizes = [NUM_POSITIONS - 3, NUM_POSITIONS - 1]
    prompts = [[5 + i % 250 for i in range(size)] for size in sizes]
    limit = NUM_POSITIONS + (version == "0.6")
    for prompt, output in zip(prompts, llm.beam_search(prompts, BeamSearchParams(2, 20, ignore_eos=True)), strict=True):
        assert [len(sequence.tokens) for sequence in output.sequences] == [limit, limit]
        assert output.sequences[0].tokens[: len(prompt)] == prompt


def test_a_prompt_that_does_not_fit(preset: tuple[str, LLM]) -> None:
    version, llm = preset
    prompts = [[7] * (NUM_POSITIONS + 1), [8]]
    if version == "0.33":
        with pytest.raises(TacoValidationError, match="maximum context length"):
            llm.beam_search(prompts, BeamSearchParams(2, 3))
    else:
        assert [len(output.sequences) for output in llm.beam_search(prompts, BeamSearchParams(2, 3))] == [0, 2]


def test_values_assigned_later_are_checked(preset: tuple[str, LLM]) -> None:
    params = BeamSearchParams(2, 4)
    params.beam_width = 0
    with pytest.raises(TacoValidationError, match="beam_width must be at least 1"):
        preset[1].beam_search([[5]], params)


@pytest.mark.parametrize(
    ("prompts", "params", "options", "message"),
    [
        ([[5]], BeamSearchParams(11, 4), {}, "Cannot request more than 20 logprobs"),
        ([[5]], SamplingParams(), {}, "params must be a BeamSearchParams"),
        ([[5], []], BeamSearchParams(2, 4), {}, "row 1: .*cannot be empty"),
        ([[5]], BeamSearchParams(2, 4), {"concurrency_limit": 0}, "concurrency_limit must be an integer of at least 1"),
        ([[5]], BeamSearchParams(2, 4), {"concurrency_limit": 2.0}, "concurrency_limit must be"),
        ([[5]], BeamSearchParams(2, 4), {"lora_request": [None, None]}, "lengths of prompts and lora_request"),
        ([[5]], BeamSearchParams(2, 4), {"priority": [1, 2]}, "lengths of prompts and priority"),
        ([[5]], BeamSearchParams(2, 4), {"priority": 1}, "Priority scheduling is not enabled"),
        ([[5]], BeamSearchParams(2, 4, structured_outputs=StructuredOutputsParams(choice=[])), {}, "structured_out"),
        ([[5]], BeamSearchParams(2, 4, allowed_token_ids=[10**6]), {}, "allowed_token_ids"),
        ([{"prompt": "a", "multi_modal_data": {"image": 1}}], BeamSearchParams(2, 4), {}, "multi_modal_data"),
        ([{"prompt_embeds": 1}], BeamSearchParams(2, 4), {}, "prompt_embeds"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    llm: LLM, prompts: Any, params: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TacoValidationError, match=message):
        llm.beam_search(prompts, params, **options)
    assert not llm.llm_engine.has_unfinished_requests()


def test_wide_beams_need_max_logprobs_for_the_result_alone(make: Make, llm: LLM) -> None:
    with make(max_logprobs=24) as wide:
        [output] = wide.beam_search([[5]], BeamSearchParams(12, 4))
        assert len(output.sequences) == 12
    with make(max_logprobs=-1) as wider_than_half_the_vocabulary:
        [output] = wider_than_half_the_vocabulary.beam_search([[5]], BeamSearchParams(200, 3))
        assert len({tuple(sequence.tokens) for sequence in output.sequences}) == 200
    [found] = llm.generate([[5]], SamplingParams(n=12, max_tokens=4, **BEAMS), **QUIET)
    assert len(found.outputs) == 12


def test_without_a_tokenizer_there_are_no_texts(make: Make) -> None:
    with make(skip_tokenizer_init=True) as llm:
        [output] = llm.beam_search([PROMPTS[1]], BeamSearchParams(2, 4))
        assert [sequence.text for sequence in output.sequences] == [None, None]


def test_a_row_that_fails_costs_itself_alone_and_the_next_call_is_clean(llm: LLM) -> None:
    def fail(output_token_ids: Any, logits: Any) -> Any:
        if len(output_token_ids) == 2:
            raise RuntimeError("boom")
        return logits

    search = SamplingParams(n=3, max_tokens=6, **BEAMS)
    expected = llm.generate(PROMPTS, search, **QUIET)
    params = [search] * len(PROMPTS)
    params[1] = SamplingParams(n=3, max_tokens=6, logits_processors=[fail], **BEAMS)
    outputs = llm.generate(PROMPTS, params, on_error="return", **QUIET)
    assert outputs[1].outputs[0].finish_reason == "error" and "boom" in (outputs[1].error or "")
    for index, (output, alone) in enumerate(zip(outputs, expected, strict=True)):
        if index != 1:
            assert [c.token_ids for c in output.outputs] == [c.token_ids for c in alone.outputs]
    with pytest.raises(TacoError, match="Row 1 failed while it ran.*boom"):
        llm.generate(PROMPTS, params, **QUIET)
    assert not llm.llm_engine.has_unfinished_requests()
    llm.llm_engine.scheduler.check_integrity()


def test_an_interrupt_leaves_a_clean_engine(llm: LLM, unending: list[list[list[int]]]) -> None:
    def interrupt(output_token_ids: Any, logits: Any) -> Any:
        if output_token_ids:
            raise KeyboardInterrupt
        return logits

    bad = SamplingParams(n=3, max_tokens=6, logits_processors=[interrupt], **BEAMS)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:2], bad, **QUIET)
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(WIDTH, 12, ignore_eos=True))
    assert generated(PROMPTS, outputs) == unending


def test_requests_can_be_aborted_step_by_step(llm: LLM) -> None:
    engine = llm.llm_engine
    for name in ("a", "b", "c"):
        engine.add_request(name, {"prompt_token_ids": PROMPTS[4]}, SamplingParams(n=8, max_tokens=6, **BEAMS))
    engine.step()
    engine.abort_request(["a", "c"])  # one runs, the other waits for rows
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["b"] and len(outputs[0].outputs) == 8
    assert engine.scheduler.num_unfinished == 0


def test_at_most_as_many_prompts_at_once_as_the_limit_says(llm: LLM, unending: list[list[list[int]]]) -> None:
    engine = llm.llm_engine
    seen = []
    step = engine.step

    def watched() -> Any:
        seen.append(engine.get_num_unfinished_requests())
        return step()

    engine.step = watched  # type: ignore[method-assign]
    try:
        params = BeamSearchParams(WIDTH, 12, ignore_eos=True)
        assert generated(PROMPTS, llm.beam_search(PROMPTS, params, concurrency_limit=2)) == unending
    finally:
        del engine.step  # type: ignore[method-assign]
    assert max(seen) == 2


def test_the_progress_bar_counts_steps_in_tokens(llm: LLM) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options = options
            self.count = 0
            self.closed = False
            bars.append(self)

        def update(self, number: int) -> None:
            self.count += number

        def refresh(self) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    llm.beam_search(PROMPTS, BeamSearchParams(2, 5, ignore_eos=True), use_tqdm=Bar)
    llm.beam_search(PROMPTS, BeamSearchParams(2, 5, ignore_eos=True))
    [bar] = bars
    assert bar.options["desc"] == "Beam search" and bar.options["unit"] == "token"
    assert bar.options["total"] == bar.count == 5 * len(PROMPTS) and bar.closed


def test_beam_search_of_nothing(llm: LLM) -> None:
    assert llm.beam_search([], BeamSearchParams(2, 4)) == []
