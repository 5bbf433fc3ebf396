from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from typing import Any

import pytest

from taco.config import GuidedDecodingConfig, ReasoningConfig
from taco.engine.beam_search import BeamOptions
from taco.engine.input_processor import InputProcessor, ParamsCache, ProcessedRequest
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.random_keys import mix_seed, row_seed
from taco.sampling_params import BeamSearchParams, GuidedDecodingParams, RequestOutputKind, SamplingParams
from taco.watermark import WatermarkConfig
from tests.fake_engine import make_config
from tests.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

BOS, EOS = 0, 1


def make_processor(tokenizer: Any = None, version: str = "0.6", **values: Any) -> InputProcessor:
    return InputProcessor(make_config(version, **values), tokenizer or byte_level_tokenizer())


def process(processor: InputProcessor, prompt: object, **params: Any) -> ProcessedRequest:
    return processor.process("7", prompt, SamplingParams(**params))


def process_rows(
    processor: InputProcessor,
    prompts: list[Any],
    params: list[SamplingParams],
    output_kind: RequestOutputKind | None = None,
) -> list[ProcessedRequest | TacoValidationError]:
    """Rows that are prepared together, as `LLM.generate` has them."""
    cache = ParamsCache()
    columns: dict[str, Any] = {"priorities": [0] * len(prompts), "lora_requests": [None] * len(prompts)}
    options = processor.tokenize_options(None)
    rows = processor.prepare_batch(prompts, params, cache, options, output_kind=output_kind, **columns)
    return [
        row
        if isinstance(row, TacoValidationError)
        else processor.build(str(index), row, params[index], cache, output_kind=output_kind)
        for index, row in enumerate(rows)
    ]


def rejects(processor: InputProcessor, message: str, prompt: object = "hello", **params: Any) -> None:
    with pytest.raises(TacoValidationError, match=message):
        process(processor, prompt, **params)


# Prompts


def test_text_is_tokenized_with_special_tokens_and_token_ids_are_taken_as_they_are() -> None:
    processor = make_processor()
    ids = byte_level_tokenizer().encode("hello", add_special_tokens=False)
    text = process(processor, "hello")
    assert text.prompt_token_ids == [BOS, *ids] and text.prompt == "hello"
    tokens = process(processor, {"prompt_token_ids": ids, "prompt": "hello", "cache_salt": "s"})
    assert tokens.prompt_token_ids == ids and tokens.prompt is None
    assert tokens.children[0].cache_salt == "s"
    without = processor.process("8", "hello", SamplingParams(), tokenization_kwargs={"add_special_tokens": False})
    assert without.prompt_token_ids == ids


def test_text_beside_token_ids_is_echoed_in_033() -> None:
    prompt = {"prompt_token_ids": [5], "prompt": "hello"}
    assert process(make_processor(version="0.33"), prompt).prompt == "hello"


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), sentencepiece_tokenizer()])
def test_start_token_is_never_doubled(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    processor = make_processor(tokenizer)
    bos = tokenizer.bos_token_id
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ids = process(processor, "<s>hello").prompt_token_ids
            assert ids[0] == bos and ids.count(bos) == 1
    assert sum("left out" in message for message in caplog.messages) == 1
    # Two that the caller wrote are the caller's business.
    assert process(processor, [bos, bos, 5]).prompt_token_ids == [bos, bos, 5]
    without = copy.deepcopy(tokenizer)
    without._tokenizer.post_processor = None
    assert process(make_processor(without), "<s><s>hello").prompt_token_ids[:2] == [bos, bos]


def test_empty_prompts_are_refused_in_both_wordings() -> None:
    processor = make_processor(sentencepiece_tokenizer())
    for wording in ("Prompt cannot be empty", "decoder prompt cannot be empty"):
        rejects(processor, wording, [])
    # Without a start token, an empty text has no tokens.
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer._tokenizer.post_processor = None
    rejects(make_processor(tokenizer), "Prompt cannot be empty", "")


def test_ids_outside_the_vocabulary_are_named_with_their_positions() -> None:
    processor = make_processor(vocab_size=300)
    rejects(processor, r"Token id 300 is out of vocabulary.*300 at position 1, -1 at position 3", [5, 300, 6, -1])
    rejects(processor, "out of vocabulary.*and 4 more", [2**40] * 9)
    rejects(processor, "out of vocabulary", "<tool call>")  # the tokenizer knows more tokens than the model
    assert process(processor, [299]).prompt_token_ids == [299]


@pytest.mark.parametrize(
    ("version", "num_tokens", "max_total"), [("0.6", 63, 65), ("0.6", 64, 65), ("0.33", 62, 64), ("0.33", 63, 64)]
)
def test_prompts_that_leave_room_for_a_token_run_up_to_the_models_limit(
    version: str, num_tokens: int, max_total: int
) -> None:
    processor = make_processor(version=version)
    [child] = process(processor, [5] * num_tokens, max_tokens=None).children
    assert child.max_total_tokens == max_total
    assert child.params.max_tokens == max_total - num_tokens
    [child] = process(processor, [5] * num_tokens, max_tokens=1).children
    assert child.max_total_tokens == num_tokens + 1


def test_overlong_prompts_are_empty_results_in_06(caplog: pytest.LogCaptureFixture) -> None:
    processor = make_processor()
    with caplog.at_level(logging.WARNING):
        processed = process(processor, [5] * 65, n=2, temperature=1.0)
    assert processed.children == [] and processed.finished is not None
    assert processed.finished.finished and processed.finished.prompt_token_ids == [5] * 65
    for index, completion in enumerate(processed.finished.outputs):
        assert (completion.index, completion.text, completion.token_ids) == (index, "", [])
        assert completion.finish_reason == "length"
    assert len(processed.finished.outputs) == 2
    assert "Input prompt (65 tokens) is too long and exceeds limit of 64" in caplog.text
    assert "rows" not in caplog.text  # a single prompt is no row of a batch


def test_the_warning_of_overlong_prompts_names_their_rows(caplog: pytest.LogCaptureFixture) -> None:
    processor = make_processor()

    def warning_of(lengths: list[int]) -> str:
        caplog.clear()
        params = SamplingParams(max_tokens=None)
        with caplog.at_level(logging.WARNING):
            process_rows(processor, [[5] * length for length in lengths], [params] * len(lengths))
        return caplog.text

    assert "Input prompt (66 tokens)" in warning_of([3, 66, 64, 70]) and "Such rows: 1, 3." in caplog.text
    assert "Such rows: 1, 2, 3, 4, 5, ... (7 in all)." in warning_of([3, *[65] * 7])


def test_overlong_prompts_are_errors_in_033() -> None:
    processor = make_processor(version="0.33")
    rejects(processor, "maximum context length is 64 tokens.*contains 65 input tokens", [5] * 65)
    rejects(processor, "is longer than the maximum model length of 64", [5] * 64)


def test_min_tokens_must_fit_what_the_prompt_leaves() -> None:
    processor = make_processor(version="0.33")
    assert process(processor, [5] * 60, max_tokens=None, min_tokens=4).children
    rejects(processor, "min_tokens must be less than or equal to max_tokens=4", [5] * 60, max_tokens=None, min_tokens=5)
    assert process(make_processor(), [5] * 60, max_tokens=None, min_tokens=9).children  # 0.6 looks at max_tokens alone


# Truncation and other tokenization options


def test_truncation_keeps_the_asked_side() -> None:
    processor = make_processor()
    ids = list(range(10, 90))

    def kept(**options: Any) -> list[int]:
        return processor.process("1", ids, SamplingParams(), tokenization_kwargs=options).prompt_token_ids

    assert kept(truncate_prompt_tokens=3) == ids[-3:]
    assert kept(truncate_prompt_tokens=3, truncation_side="right") == ids[:3]
    assert kept(truncate_prompt_tokens=-1) == ids[-64:]
    assert kept(max_length=4, truncation=True) == ids[-4:]
    assert kept(truncation=True) == ids[-64:]
    assert process(processor, ids, truncate_prompt_tokens=2).prompt_token_ids == ids[-2:]
    in_033 = make_processor(version="0.33").process(
        "1", ids, SamplingParams(), tokenization_kwargs={"truncate_prompt_tokens": -1}
    )
    assert in_033.prompt_token_ids == ids[-63:]


def test_max_length_without_truncation_is_a_limit() -> None:
    processor = make_processor()
    with pytest.raises(TacoValidationError, match="5 tokens, more than max_length=4"):
        processor.process("1", [9] * 5, SamplingParams(), tokenization_kwargs={"max_length": 4})


def test_tokenization_kwargs_are_checked() -> None:
    processor = make_processor()
    for options, message in [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be"),
        ({"truncate_prompt_tokens": -2}, "-1 for the model's limit"),
        ({"truncate_prompt_tokens": True}, "truncate_prompt_tokens"),
        ({"max_length": -1}, "max_length"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"padding": "max_length"}, "padding"),
    ]:
        with pytest.raises(TacoValidationError, match=message):
            processor.process("1", "hello", SamplingParams(), tokenization_kwargs=options)
    with pytest.warns(UserWarning, match="'frobnicate'"):
        processor.process("1", "hello", SamplingParams(), tokenization_kwargs={"frobnicate": 1})
    without = processor.process("1", "hello", SamplingParams(), tokenization_kwargs={"add_special_tokens": False})
    assert BOS not in without.prompt_token_ids


# Parameters


def test_params_of_the_caller_are_never_changed() -> None:
    processor = make_processor(generation_config={"eos_token_id": [1, 9]})
    params = SamplingParams(
        n=2, best_of=3, stop="x", bad_words=["cat"], logit_bias={5: 1.0}, max_tokens=None, prompt_logprobs=1
    )
    params.skip_clone = True
    before = pickle.dumps(params)
    processed = processor.process("1", "hello", params)
    assert pickle.dumps(params) == before
    processed.params._all_stop_token_ids.add(77)
    assert pickle.dumps(params) == before


def test_one_object_in_a_batch_is_normalised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = make_processor()
    calls = []
    normalise = SamplingParams.normalise
    shared, other = SamplingParams(bad_words=["cat"]), SamplingParams()
    monkeypatch.setattr(SamplingParams, "normalise", lambda self: (calls.append(1), normalise(self))[1])
    rows = process_rows(processor, ["x"] * 4, [shared, other, shared, shared])
    assert len(calls) == 2
    assert rows[0].children[0].params is rows[3].children[0].params  # type: ignore[union-attr]


def test_missing_params_are_the_models_defaults() -> None:
    processor = make_processor(default_sampling_params={"temperature": 0.5, "max_tokens": 3})
    processed = processor.process("1", "hello", None)
    assert (processed.params.temperature, processed.params.max_tokens) == (0.5, 3)


def test_stop_tokens_of_the_model_are_entered() -> None:
    processor = make_processor(generation_config={"eos_token_id": [EOS, 9]})
    [child] = process(processor, "hello", stop_token_ids=[7]).children
    assert child.eos_token_id == EOS and child.stop_token_ids == {7, 9}
    assert child.params.all_stop_token_ids == {EOS, 7, 9}
    [child] = process(processor, "hello", stop_token_ids=[7], ignore_eos=True).children
    assert child.eos_token_id is None and child.stop_token_ids == {7}
    # Ids that the model cannot produce are not masked either.
    [child] = process(make_processor(generation_config={"eos_token_id": [EOS, 4000]}), "hello").children
    assert child.params.all_stop_token_ids == {EOS}


def test_too_many_logprobs_are_refused_in_both_wordings() -> None:
    processor = make_processor(max_logprobs=5)
    for name, what in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
        rejects(processor, "Cannot request more than 5 logprobs", **{name: 6})
        rejects(processor, f"Requested {what} logprobs of 6, which is greater than max allowed: 5", **{name: 6})
        rejects(processor, "of 400, which is greater", **{name: -1})
        assert process(processor, "hello", **{name: 5}).children
    assert process(make_processor(max_logprobs=400), "hello", logprobs=-1).children
    wide: dict[str, Any] = {"prompt": [1, 2], "prompt_logprob_token_ids": [[3] * 6]}
    rejects(processor, "Cannot request more than 5 logprobs. Requested prompt_logprob_token_ids of 6, which is", **wide)
    assert process(processor, [1, 2], prompt_logprob_token_ids=[[3] * 5]).children


@pytest.mark.parametrize(
    ("num_tokens", "start", "num_rows", "is_right"),
    [
        (5, None, 4, True),
        (5, 0, 4, True),
        (5, 3, 1, True),
        (5, 1, 4, False),
        (5, 1, 2, False),
        (5, 4, 1, False),
        (5, 9, 1, False),
        (1, None, 1, False),
    ],
)
def test_given_tokens_need_a_row_for_each_scored_position(
    num_tokens: int, start: int | None, num_rows: int, is_right: bool
) -> None:
    fields: dict[str, Any] = {"prompt_logprob_token_ids": [[3, -1]] * num_rows, "prompt_logprob_start": start}
    if is_right:
        [child] = process(make_processor(), [7] * num_tokens, **fields).children
        assert child.params.first_scored_position == (start or 0)
    else:
        scored = max(0, num_tokens - 1 - (start or 0))
        message = f"prompt_logprob_token_ids has {num_rows} rows, but the prompt has {scored} scored rows"
        rejects(make_processor(), message, [7] * num_tokens, **fields)
    # Truncation comes first.
    [child] = process(make_processor(), [7] * 9, prompt_logprob_token_ids=[[3]] * 2, truncate_prompt_tokens=3).children
    assert child.num_prompt_tokens == 3


def test_given_tokens_must_be_in_the_vocabulary() -> None:
    message = "token_id 400 in prompt_logprob_token_ids contains out-of-vocab token id"
    rejects(make_processor(), message, [1, 2, 3], prompt_logprob_token_ids=[[3, -1], [2, 400]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {400: 1.0}),
        ("allowed_token_ids", [3, 400]),
        ("stop_token_ids", [-1]),
        ("logprob_token_ids", [400]),
        ("trace_decode_token_ids", [3, 400]),
    ],
)
def test_token_ids_in_params_must_be_in_the_vocabulary(name: str, value: object) -> None:
    rejects(make_processor(version="0.33"), f"in {name} contains out-of-vocab token id", **{name: value})
    if name != "stop_token_ids":
        rejects(make_processor(), f"in {name} contains out-of-vocab token id", **{name: value})


def test_stop_tokens_that_do_not_exist_have_no_effect_in_06() -> None:
    [child] = process(make_processor(), "hello", stop_token_ids=[400, -1, 7], min_tokens=2).children
    assert 7 in child.stop_token_ids
    assert child.params.all_stop_token_ids == {EOS, 7}


def test_assigned_fields_are_checked_too() -> None:
    params = SamplingParams()
    params.allowed_token_ids = []
    with pytest.raises(TacoValidationError, match="allowed_token_ids"):
        make_processor().process("1", "hello", params)


def test_bad_words_become_ids_with_and_without_a_space() -> None:
    tokenizer = byte_level_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    [child] = process(make_processor(), "hello", bad_words=[" the", "é"]).children
    found = child.params.bad_words_token_ids
    assert found is not None and ids("the") in found and ids("é") in found
    for text in ("the", "é"):
        spaced = ids(" " + text)
        assert (spaced in found) == (len(spaced) == len(ids(text)))
    assert len(ids(" the")) == len(ids("the"))  # so the rule above has a case
    rejects(make_processor(), "no tokens", bad_words=["  "])
    rejects(make_processor(), "tokenizer failed on .* of bad_words", bad_words=["a\ud800"])


def test_what_does_not_exist_is_refused_by_name() -> None:
    processor = make_processor()
    with pytest.raises(UnsupportedFeatureError, match="Got lora_request x but LoRA is not enabled!"):
        processor.process("1", "hello", SamplingParams(), lora_request="x")
    with pytest.raises(TypeError, match="sampling_params must be a SamplingParams, but is of type dict"):
        processor.process("1", "hello", {"n": 1})  # type: ignore[arg-type]


def with_configs(tokenizer: Any = None, skip_tokenizer_init: bool = False, **configs: Any) -> InputProcessor:
    config = dataclasses.replace(make_config(skip_tokenizer_init=skip_tokenizer_init), **configs)
    return InputProcessor(config, None if skip_tokenizer_init else tokenizer or byte_level_tokenizer())


def test_a_budget_of_reasoning_needs_marks_a_tokenizer_and_no_grammar() -> None:
    marks = ReasoningConfig(reasoning_start_str="<tool call>", reasoning_end_str="the hat<é>")
    processor = with_configs(reasoning_config=marks)
    given = SamplingParams(n=2, thinking_token_budget=0)
    children = processor.process("1", "hello", given).children
    ids = byte_level_tokenizer()("<tool call><é>", add_special_tokens=False)["input_ids"]
    for child in children:
        assert child.params.reasoning_markers is not None
        assert child.params.reasoning_markers[:2] == ((ids[0],), (ids[1],))
    assert given.reasoning_markers is None and process(processor, "a").children[0].params.reasoning_markers is None

    budget: dict[str, Any] = {"thinking_token_budget": 3}
    rejects(make_processor(), 'thinking_token_budget needs the marks .* pass reasoning_parser="qwen3"', **budget)
    no_tokenizer = with_configs(reasoning_config=marks, skip_tokenizer_init=True)
    rejects(no_tokenizer, "thinking_token_budget needs a tokenizer", prompt=[5], **budget)
    guided = SamplingParams(**budget, guided_decoding=GuidedDecodingParams(regex="a"))
    assert processor.process("1", "hello", guided).children[0].params.reasoning_markers is not None
    at_once = with_configs(
        reasoning_config=marks, guided_decoding_config=GuidedDecodingConfig(enable_in_reasoning=True)
    )
    with pytest.raises(UnsupportedFeatureError, match="thinking_token_budget cannot be used with guided decoding"):
        at_once.process("1", "hello", guided)
    absent = with_configs(reasoning_config=dataclasses.replace(marks, reasoning_start_str=""))
    rejects(absent, "reasoning_start_str='' has no tokens", **budget)


@pytest.mark.parametrize(
    ("is_configured", "fields", "is_marked", "is_skipped"),
    [
        (True, {}, True, False),
        (True, {"watermarking": True}, True, False),
        (True, {"watermarking": False}, False, False),
        (True, {"watermarking": False, "temperature": 0}, False, False),
        (True, {"temperature": 0}, False, True),
        (True, {"trace_decode_token_ids": [5]}, False, True),
        (True, {"use_beam_search": True, "best_of": 2, "temperature": 0}, False, True),
        (True, {"_beam_search_params": BeamSearchParams(2, 3)}, False, True),
        (False, {}, False, False),
        (False, {"watermarking": False}, False, False),
        (False, {"watermarking": True}, False, True),
    ],
    ids=str,
)
def test_which_texts_are_marked(
    is_configured: bool,
    fields: dict[str, Any],
    is_marked: bool,
    is_skipped: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    processor = with_configs(watermark_config=WatermarkConfig(key=1) if is_configured else None)
    given = SamplingParams(**fields)
    asked = given.watermarking
    for _ in range(2):
        params = processor.process("1", "hello", given).params
        assert (params.watermarking, params._watermarking_skipped) == (is_marked, is_skipped)
    assert given.watermarking is asked and not given._watermarking_skipped
    assert len([record for record in caplog.records if "without a watermark" in record.message]) == is_skipped


def test_a_traced_request_ends_with_its_trace() -> None:
    processor = make_processor(generation_config={"eos_token_id": [EOS, 9]})
    params = SamplingParams(trace_decode_token_ids=[9, EOS, 7], stop_token_ids=[7], stop="x", max_tokens=50)
    before = pickle.dumps(params)
    [child] = processor.process("1", "hello", params).children
    assert pickle.dumps(params) == before
    assert child.max_total_tokens == child.num_prompt_tokens + 3
    assert child.eos_token_id is None and not child.stop_token_ids


def test_priority_needs_its_policy_in_06_only() -> None:
    with pytest.raises(TacoValidationError, match="Got priority 1 but Priority scheduling is not enabled"):
        make_processor().process("1", "hello", SamplingParams(), priority=1)
    for processor in (make_processor(policy="priority"), make_processor(version="0.33")):
        assert processor.process("1", "hello", SamplingParams(), priority=1).children[0].priority == 1
    with pytest.raises(TypeError, match="priority must be an int"):
        make_processor().process("1", "hello", SamplingParams(), priority="high")  # type: ignore[arg-type]


def test_without_a_tokenizer_only_token_ids_run() -> None:
    processor = InputProcessor(make_config(), None)
    rejects(processor, "`skip_tokenizer_init` is True")
    rejects(processor, "stop needs a tokenizer", [5], stop="x")
    rejects(processor, "bad_words needs a tokenizer", [5], bad_words=["x"])
    [child] = process(processor, [5]).children
    assert not child.params.detokenize and child.eos_token_id is None


# Samples and seeds


def test_samples_share_the_prompt_and_differ_in_seed() -> None:
    processed = process(make_processor(), "hello", n=3, seed=11, prompt_logprobs=2)
    assert [child.request_id for child in processed.children] == ["0_7", "1_7", "2_7"]
    assert [child.seed for child in processed.children] == [mix_seed(11, i) for i in range(3)]
    assert len({id(child.prompt_token_ids) for child in processed.children}) == 1
    # One of them computes the prompt's log-probabilities.
    assert [child.params.prompt_logprobs for child in processed.children] == [2, None, None]
    fields: dict[str, Any] = {"prompt_logprob_token_ids": [[3]], "prompt_logprob_start": 0}
    children = process(make_processor(), [1, 2], n=2, **fields).children
    assert [child.params.first_scored_position for child in children] == [0, None]
    children[1].params.normalise()
    assert process(make_processor(), "hello").children[0].request_id == "7"


def test_best_of_runs_more_and_scores_them() -> None:
    processed = process(make_processor(), "hello", n=2, best_of=4)
    assert len(processed.children) == 4 and processed.num_returned == 2
    assert processed.hides_logprobs and processed.children[0].params.logprobs == 0
    asked = process(make_processor(), "hello", n=2, best_of=4, logprobs=1)
    assert not asked.hides_logprobs and asked.children[0].params.logprobs == 1
    assert not process(make_processor(), "hello", n=2, best_of=2).hides_logprobs


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_best_of_is_refused_where_there_are_no_log_probabilities_to_rank_by(mode: str) -> None:
    processor = make_processor(logprobs_mode=mode)
    with pytest.raises(UnsupportedFeatureError, match=f"best_of=4 ranks samples .*logprobs_mode='{mode}'"):
        process(processor, "hello", n=2, best_of=4)
    assert process(processor, "hello", n=2, best_of=2, logprobs=1).children
    assert process(make_processor(logprobs_mode="raw_logprobs"), "hello", n=2, best_of=4).children


BEAMS: dict[str, Any] = {"use_beam_search": True, "temperature": 0}


def test_a_beam_search_starts_with_one_request_that_asks_for_candidates() -> None:
    processed = process(make_processor(), "hello", n=2, best_of=4, length_penalty=0.5, early_stopping="never", **BEAMS)
    [root] = processed.children
    assert root.num_candidates == 8 and root.request_id == processed.request_id
    assert processed.beam_options == BeamOptions(
        width=4,
        num_returned=2,
        length_penalty=0.5,
        score_includes_prompt=True,
        early_stopping="never",
        ends_anywhere=False,
        num_candidates=8,
        keeps_candidates=False,
    )
    assert process(make_processor(), "hello", n=2, **BEAMS).children[0].num_candidates == 4


@pytest.mark.parametrize(("logprobs", "num_candidates"), [(0, 4), (3, 4), (7, 7), (-1, 400)])
def test_as_many_candidates_as_log_probabilities_are_asked_for(logprobs: int, num_candidates: int) -> None:
    processed = process(make_processor(max_logprobs=400), "hello", n=2, logprobs=logprobs, **BEAMS)
    assert processed.children[0].num_candidates == num_candidates
    assert processed.beam_options is not None and processed.beam_options.keeps_candidates
    assert not processed.hides_logprobs


def test_beam_search_is_refused_where_there_are_no_log_probabilities_to_rank_by() -> None:
    with pytest.raises(UnsupportedFeatureError, match="Beam search ranks sequences .*logprobs_mode='raw_logits'"):
        process(make_processor(logprobs_mode="raw_logits"), "hello", n=2, **BEAMS)


def test_rows_without_a_seed_differ_and_repeat_in_a_new_engine() -> None:
    first, second = make_processor(), make_processor()
    seeds = [process(first, "hello").children[0].seed for _ in range(3)]
    assert len(set(seeds)) == 3
    assert [process(second, "hello").children[0].seed for _ in range(3)] == seeds
    assert process(make_processor(seed=5), "hello").children[0].seed not in seeds
    assert process(first, "hello", seed=9).children[0].seed == process(second, "hello", seed=9).children[0].seed


def test_another_tokenizer_does_not_bring_random_numbers_back() -> None:
    kept, replaced = make_processor(), make_processor()
    for processor in (kept, replaced):
        process(processor, "hello")
    replaced.set_tokenizer(sentencepiece_tokenizer())
    assert replaced.tokenizer is not kept.tokenizer
    assert process(replaced, [5]).children[0].seed == process(kept, [5]).children[0].seed
    assert process(replaced, "hello").prompt_token_ids == sentencepiece_tokenizer().encode("hello")
    assert process(replaced, "<s>hello").prompt_token_ids.count(sentencepiece_tokenizer().bos_token_id) == 1


def test_seeds_of_rows_do_not_depend_on_bad_rows() -> None:
    def seeds(prompts: list[object]) -> list[int | None]:
        rows = process_rows(make_processor(), prompts, [SamplingParams()] * 3)
        return [None if isinstance(row, TacoValidationError) else row.children[0].seed for row in rows]

    alone = seeds(["x", "y", "z"])
    for bad in ([], 3.5):
        beside = seeds(["x", bad, "z"])
        assert (alone[0], alone[2]) == (beside[0], beside[2]) and beside[1] is None


def test_keys_are_spread() -> None:
    keys = {mix_seed(seed, index) for seed in range(-50, 50) for index in range(20)}
    keys |= {mix_seed(row_seed(0, number), 0) for number in range(1000)}
    assert len(keys) == 3000 and all(0 <= key < 2**64 for key in keys)
    # About half of the bits differ between neighbours.
    assert 20 < bin(mix_seed(1, 0) ^ mix_seed(1, 1)).count("1") < 44
    assert mix_seed(-1, 0) == mix_seed(2**64 - 1, 0)


# Batches


def test_a_batch_reports_each_bad_row_and_keeps_the_others() -> None:
    prompts: list[object] = ["hello", [], 3.5, "\ud800", [5000], {"prompt": "ok"}, None, [1, "x"]]
    rows = process_rows(make_processor(), prompts, [SamplingParams()] * 8)
    bad = [index for index, row in enumerate(rows) if isinstance(row, TacoValidationError)]
    assert bad == [1, 2, 3, 4, 6, 7]
    alone = make_processor().process("0", "hello", SamplingParams())
    assert rows[0].prompt_token_ids == alone.prompt_token_ids  # type: ignore[union-attr]
    assert all(rows[i].__traceback__ is None for i in bad)  # type: ignore[union-attr]


def test_a_tokenizer_that_fails_on_one_text_fails_that_row_alone() -> None:
    good = byte_level_tokenizer()

    class Fragile:
        bos_token_id, bos_token, eos_token_id = None, None, None

        def __call__(self, texts: list[str], **kwargs: Any) -> Any:
            if "bad" in texts:
                raise RuntimeError("boom")
            return good(texts, **kwargs)

    rows = process_rows(make_processor(Fragile()), ["x", "bad", "y"], [SamplingParams()] * 3)
    assert isinstance(rows[1], TacoValidationError) and "RuntimeError: boom" in str(rows[1])
    assert rows[0].children and rows[2].children  # type: ignore[union-attr]


def test_output_kind_can_be_set_for_a_batch() -> None:
    [row] = process_rows(make_processor(), ["x"], [SamplingParams()], RequestOutputKind.FINAL_ONLY)
    assert row.params.output_kind is RequestOutputKind.FINAL_ONLY  # type: ignore[union-attr]
