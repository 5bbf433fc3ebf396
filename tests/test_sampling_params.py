from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.sampling_params import (
    BeamSearchParams,
    GuidedDecodingParams,
    ParameterTypeError,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
)
from tests.fake_engine import make_config

BEAMS: dict[str, Any] = {"use_beam_search": True, "n": 2, "temperature": 0}


def processor(output_token_ids: list[int], logits: Any) -> Any:
    return logits


def rich_params() -> SamplingParams:
    return SamplingParams(
        n=2,
        best_of=3,
        temperature=0.7,
        stop=["end", "halt"],
        stop_token_ids=[3, 4],
        bad_words=["foo"],
        logits_processors=[processor],
        logit_bias={5: 1.5},
        allowed_token_ids=[1, 2],
        prompt_logprob_token_ids=[[1, 2], [3, -1]],
        prompt_logprob_start=1,
        extra_args={"key": 1},
        repetition_detection=RepetitionDetectionParams(4, 1, 3),
        guided_decoding=GuidedDecodingParams(regex="a+"),
    )


valid_fields = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 20),
        "temperature": st.floats(0.01, 1e6),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 1000),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(1e-6, 1e6),
        "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
        "stop": st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
        "stop_token_ids": st.none() | st.lists(st.integers(0, 9), max_size=5),
        "bad_words": st.none() | st.lists(st.text(min_size=1), max_size=3),
        "max_tokens": st.none() | st.integers(10, 100),
        "min_tokens": st.integers(0, 10),
        "logprobs": st.none() | st.integers(-1, 20) | st.booleans(),
        "prompt_logprobs": st.none() | st.integers(-1, 20) | st.booleans(),
        "ignore_eos": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "logit_bias": st.none() | st.dictionaries(st.integers(0, 9), st.floats(allow_nan=False), max_size=3),
        "allowed_token_ids": st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=5),
        "no_repeat_ngram_size": st.integers(0, 4),
        "output_kind": st.sampled_from(RequestOutputKind),
    },
)


@given(valid_fields)
def test_copies_in_every_way_are_equal(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    rebuilt = SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__})
    for other in (
        rebuilt,
        params.clone(),
        copy.deepcopy(params),
        copy.copy(params),
        pickle.loads(pickle.dumps(params)),
    ):
        assert other == params
        assert repr(other) == repr(params)


@given(valid_fields)
def test_normalising_twice_changes_nothing(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    again = params.clone()
    again.normalise()
    assert again == params


def test_copies_of_params_with_every_kind_of_field_are_equal() -> None:
    params = rich_params()
    rebuilt = SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__})
    for other in (rebuilt, params.clone(), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert other == params
    other = params.clone()
    other.prompt_logprob_token_ids = np.array([[1, 2], [3, 4]])
    assert other != params
    assert params != "params"


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "bad_words", "logits_processors", "allowed_token_ids"])
def test_a_clone_does_not_share_lists(name: str) -> None:
    params = rich_params()
    getattr(params.clone(), name).append("new")
    assert params == rich_params()


def test_a_clone_does_not_share_sets_and_dicts_but_callables_and_unknown_attributes_come_along() -> None:
    params = rich_params()
    params.tag = "mine"  # type: ignore[attr-defined]
    clone = params.clone()
    assert clone.tag == "mine"  # type: ignore[attr-defined]
    assert clone.logits_processors is not None and clone.logits_processors[0] is processor
    assert clone.logit_bias is not None and clone.extra_args is not None
    clone.logit_bias[9] = 1.0
    clone.extra_args["other"] = 2
    clone.all_stop_token_ids.add(77)
    assert params == rich_params()


def test_clones_have_clones_of_the_processors_that_can_be_cloned() -> None:
    class Remembering:
        def clone(self) -> Remembering:
            return Remembering()

        def __call__(self, output_token_ids: list[int], logits: Any) -> Any:
            return logits

    given = Remembering()
    params = SamplingParams(logits_processors=[processor, given])
    for other in (params.clone(), params.with_own_logits_processors()):
        assert other.logits_processors is not None and other.logits_processors[0] is processor
        assert isinstance(other.logits_processors[1], Remembering) and other.logits_processors[1] is not given
    assert params.logits_processors == [processor, given]
    for shared in (SamplingParams(), SamplingParams(logits_processors=[processor])):
        assert shared.with_own_logits_processors() is shared


def test_skip_clone_shares_containers_but_not_the_object() -> None:
    params = SamplingParams(stop=["end"], skip_clone=True)
    clone = params.clone()
    assert clone is not params and clone.stop is params.stop


def test_the_set_of_stop_ids_given_to_the_constructor_is_not_changed() -> None:
    given_ids = {1}
    assert SamplingParams(stop_token_ids=[2], _all_stop_token_ids=given_ids).all_stop_token_ids == {1, 2}
    assert given_ids == {1}


def test_struct_fields_are_the_annotations_and_survive_subclassing() -> None:
    class Mine(SamplingParams):
        pass

    assert SamplingParams.__struct_fields__ == tuple(SamplingParams.__annotations__)
    assert Mine.__struct_fields__ == SamplingParams.__struct_fields__
    assert Mine(n=2) != Mine(n=3)


def test_normalisation() -> None:
    params = SamplingParams(stop="end", stop_token_ids=(5, 5, 3), seed=-1, logprobs=True, prompt_logprobs=False)
    assert params.stop == ["end"]
    assert params.output_text_buffer_length == 2
    assert params.stop_token_ids == [5, 3]
    assert params.all_stop_token_ids == {3, 5}
    assert params.bad_words == []
    assert params.seed is None
    assert params.logprobs == 1 and type(params.logprobs) is int
    assert params.prompt_logprobs is None
    assert SamplingParams(stop="end", include_stop_str_in_output=True).output_text_buffer_length == 0
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None
    assert SamplingParams(logit_bias={1: 1000, 2: -math.inf, 3: 2}).logit_bias == {1: 100.0, 2: -100.0, 3: 2.0}


def test_rows_of_token_ids_are_padded() -> None:
    array = np.array([[-1, 1], [3, 2], [-1, -1]])[:, ::-1]
    for value in ([[1], [2, 3], []], ((1, -1), [2, 3], (-1, -1)), array.astype(np.int32), array):
        params = SamplingParams(prompt_logprob_token_ids=value)
        assert isinstance(params.prompt_logprob_token_ids, np.ndarray)
        assert params.prompt_logprob_token_ids.tolist() == [[1, -1], [2, 3], [-1, -1]]
        assert params.prompt_logprob_token_ids.dtype == np.int64
        assert params.prompt_logprob_token_ids.flags.c_contiguous
    array[0] = 7
    assert params.prompt_logprob_token_ids[0, 0] == 1


def test_prompt_logprobs_need_the_logits_of_all_positions_and_given_tokens_those_from_their_start() -> None:
    given: dict[str, Any] = {"prompt_logprob_token_ids": [[1]], "prompt_logprob_start": 4}
    assert SamplingParams(logprobs=1).first_scored_position is None
    assert SamplingParams(prompt_logprobs=0).first_scored_position == 0
    assert SamplingParams(**given).first_scored_position == 4
    assert SamplingParams(prompt_logprobs=0, **given).first_scored_position == 0


def test_numpy_values_become_python_values() -> None:
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_k=np.int32(7),
        max_tokens=np.uint8(9),
        ignore_eos=np.bool_(True),
        stop_token_ids=np.array([1, 2]),
        logit_bias={np.int64(4): np.float32(1.0)},
        seed=np.int64(11),
    )
    plain = SamplingParams(
        n=2,
        temperature=0.5,
        top_k=7,
        max_tokens=9,
        ignore_eos=True,
        stop_token_ids=[1, 2],
        logit_bias={4: 1.0},
        seed=11,
    )
    assert params == plain
    assert repr(params) == repr(plain)
    for name in ("n", "top_k", "max_tokens", "seed"):
        assert type(getattr(params, name)) is int
    assert params.ignore_eos is True


def test_best_of_moves_n_aside() -> None:
    params = SamplingParams(n=2, best_of=5)
    assert (params.n, params._real_n, params.best_of) == (5, 2, 5)
    assert SamplingParams(n=2)._real_n is None


def test_greedy_switches_filters_off_only_at_construction() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, -1, 0.0)
    assert params.sampling_type is SamplingType.GREEDY
    params = SamplingParams(n=2, temperature=1.0, top_p=0.5)
    params.temperature = 0
    params.normalise()
    assert params.sampling_type is SamplingType.GREEDY and params.top_p == 0.5


def test_small_temperatures_are_raised_with_a_warning_that_points_to_the_caller() -> None:
    with pytest.warns(UserWarning, match="raised to 0.01") as record:
        params = SamplingParams(temperature=1e-6)
    assert record[0].filename == __file__
    assert params.temperature == 0.01
    assert params.sampling_type is SamplingType.RANDOM


def test_sampling_type_depends_on_seed() -> None:
    assert SamplingParams(seed=0).sampling_type is SamplingType.RANDOM_SEED
    assert SamplingParams(seed=-1).sampling_type is SamplingType.RANDOM


def test_num_logprobs_counts_the_token_ids_asked_for() -> None:
    assert SamplingParams().num_logprobs is None
    assert SamplingParams(logprobs=0).num_logprobs == 0
    assert SamplingParams(logprob_token_ids=[4, 5]).num_logprobs == 2
    assert SamplingParams(logprob_token_ids=[4, 5], logprobs=2).num_logprobs == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 0},
        {"top_k": -1},
        {"temperature": 5.0},
        {"repetition_penalty": 3.0},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"max_tokens": None, "min_tokens": 1000},
        {"n": 16384},
        {"use_beam_search": True, "best_of": 4, "temperature": 0, "early_stopping": "never", "length_penalty": 2.0},
        {"use_beam_search": True, "n": 4, "temperature": 0, "early_stopping": True},
        {"n": 2, "best_of": 2, "output_kind": RequestOutputKind.DELTA},
    ],
)
def test_what_is_allowed_is_kept(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    for name, value in fields.items():
        if name != "n":
            assert getattr(params, name) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 16385}, "n must be at most 16384"),
        ({"n": 2.0}, "n must be an int, but is of type float"),
        ({"n": True}, "n must be an int, but is of type bool"),
        ({"n": np.bool_(True)}, "n must be an int"),
        ({"n": "2"}, "n must be an int"),
        ({"n": None}, "n must be an int"),
        ({"best_of": 20000}, "best_of must be at most"),
        ({"n": 3, "best_of": 2}, "best_of must be greater than or equal to n, got n=3 and best_of=2."),
        ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\], got 2.1"),
        ({"frequency_penalty": math.nan}, r"frequency_penalty must be in \[-2, 2\], got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number greater than zero"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be a finite number"),
        ({"temperature": -0.1}, "temperature must be non-negative, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a number, but is of type str: hot"),
        ({"temperature": 10**400}, "temperature is larger than any float"),
        ({"repetition_penalty": 10**400}, "repetition_penalty is larger than any float"),
        ({"logit_bias": {1: 10**400}}, "logit_bias is larger than any float"),
        ({"min_tokens": 2**63, "max_tokens": None}, r"min_tokens must be less than 2\*\*63"),
        ({"temperature": None}, "temperature must be a number"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -2}, "top_k must be 0 or -1"),
        ({"top_k": 1.5}, "top_k must be an int"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0"),
        ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17"),
        ({"logprobs": -2}, "logprobs must be non-negative or -1"),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be non-negative or -1"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be at least 1"),
        ({"seed": 2**64}, "seed must be in"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"stop": ""}, "stop cannot contain an empty string."),
        ({"stop": ["a", ""]}, "stop cannot contain an empty string."),
        ({"stop": [1]}, "stop must be a list of strings"),
        ({"stop": b"a"}, "stop must be a list of strings"),
        ({"stop": "a", "detokenize": False}, "stop strings are only supported when detokenize is True"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids must contain only integers"),
        ({"stop_token_ids": [True]}, "stop_token_ids must contain only integers"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids"),
        ({"bad_words": "abc"}, "bad_words must be a list of strings"),
        ({"bad_words": [""]}, "bad_words cannot contain an empty string."),
        ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias contains key"),
        ({"logit_bias": {1: "x"}}, "logit_bias must be a number"),
        ({"logit_bias": {1: math.nan}}, "logit_bias must not contain NaN"),
        ({"logit_bias": [1]}, "logit_bias must be a dict"),
        ({"logits_processors": processor}, "logits_processors must be a list of callables"),
        ({"logits_processors": ["x"]}, "logits_processors must be a list of callables"),
        ({"ignore_eos": "false"}, "ignore_eos must be a bool"),
        ({"output_kind": 2}, "output_kind must be a RequestOutputKind"),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling"),
        ({"best_of": 2, "temperature": 0}, "best_of must be 1 too"),
        (
            {"best_of": 2, "output_kind": RequestOutputKind.DELTA},
            "best_of must equal n to use output_kind=DELTA",
        ),
        ({"stream_interval": 0}, "stream_interval must be at least 1"),
        ({"thinking_token_budget": -2}, "thinking_token_budget must be at least 0"),
        ({"thinking_token_budget": 1.0}, "thinking_token_budget must be an int"),
        ({"extra_args": {"a": [2**64]}}, "extra_args integers must be in"),
        ({"extra_args": []}, "extra_args must be a dict"),
        ({"routed_experts_prompt_start": -1}, "routed_experts_prompt_start must be at least 0"),
        ({"logprob_token_ids": list(range(129))}, "logprob_token_ids must have at most 128 ids"),
        ({"logprob_token_ids": [1, 2], "logprobs": 3}, r"must equal len\(logprob_token_ids\)=2"),
        ({"prompt_logprob_start": 1}, "prompt_logprob_start requires prompt_logprob_token_ids"),
        ({"prompt_logprob_token_ids": [[]]}, "must be a non-empty integer array"),
        ({"prompt_logprob_token_ids": [[1], 2]}, "must be a non-empty integer array"),
        ({"prompt_logprob_token_ids": [1, 2]}, "must be a non-empty integer array"),
        ({"prompt_logprob_token_ids": [[0.5]]}, "must be a non-empty integer array"),
        ({"prompt_logprob_token_ids": [[-2]]}, "must be token ids, or -1"),
        ({"trace_decode_token_ids": []}, "trace_decode_token_ids must not be empty"),
        ({"trace_decode_token_ids": [1], "n": 2}, "n must be 1 with trace_decode_token_ids"),
        ({"trace_decode_token_ids": [1], "best_of": 2}, "n must be 1 with trace_decode_token_ids"),
        ({"trace_decode_token_ids": [1], "bad_words": ["a"]}, "bad_words cannot be used with trace_decode_token_ids"),
        (
            {"trace_decode_token_ids": [1], "thinking_token_budget": 0},
            "thinking_token_budget cannot be used with trace",
        ),
        ({"guided_decoding": {"regex": "a"}}, "guided_decoding must be a GuidedDecodingParams"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0"),
        ({"length_penalty": 2.0}, "length_penalty must be 1.0 when not using beam search"),
        ({"early_stopping": True}, "early_stopping must be False when not using beam search"),
        ({"early_stopping": "sometimes"}, 'early_stopping must be True, False or "never"'),
        ({"use_beam_search": True, "temperature": 0}, "best_of must be greater than 1 when using beam search"),
        ({"use_beam_search": True, "n": 2}, "temperature must be 0 when using beam search"),
        ({"use_beam_search": True, "n": 2, "temperature": 0, "top_p": 0.5}, "top_p must be 1 when using beam search"),
        ({"use_beam_search": True, "n": 2, "temperature": 0, "top_k": 5}, "top_k must be -1 when using beam search"),
        ({"use_beam_search": True, "n": 2, "temperature": 0, "min_p": 0.5}, "min_p must be 0 when using beam search"),
    ],
)
def test_wrong_values_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TacoValidationError, match=message) as caught:
        SamplingParams(**fields)
    assert isinstance(caught.value, ValueError)
    assert caught.value.parameter is not None


def test_wrong_types_are_type_errors_and_value_errors() -> None:
    for expected in (TypeError, ValueError):
        with pytest.raises(expected, match="top_k"):
            SamplingParams(top_k=1.5)  # type: ignore[arg-type]


def test_unknown_keywords_are_type_errors() -> None:
    with pytest.raises(TypeError, match="'nonsense'$"):
        SamplingParams(nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"SamplingParams\(\) got .* 'temprature'; did you mean 'temperature'\?"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'beam_with'; did you mean 'beam_width'"):
        BeamSearchParams(beam_with=2, max_tokens=3)  # type: ignore[call-arg]


def test_programs_can_read_the_names_of_the_parameters() -> None:
    assert list(inspect.signature(SamplingParams).parameters)[:2] == ["n", "best_of"]
    code = SamplingParams.__init__.__code__
    assert code.co_varnames[: code.co_argcount][:3] == ("self", "n", "best_of")


def test_a_subclass_may_have_parameters_of_its_own() -> None:
    class Noted(SamplingParams):
        def __init__(self, note: str, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.note = note

    params = Noted(note="a", temperature=0.5)
    assert (params.note, params.temperature, copy.deepcopy(params).note) == ("a", 0.5, "a")
    with pytest.raises(TypeError, match="temprature"):
        Noted(note="a", temprature=0.5)


def test_two_forms_of_guided_decoding_exclude_each_other() -> None:
    with pytest.raises(TacoValidationError, match="give only one"):
        SamplingParams(
            guided_decoding=GuidedDecodingParams(regex="a"), structured_outputs=StructuredOutputsParams(regex="a")
        )


def test_assigned_values_are_checked_by_normalise() -> None:
    params = SamplingParams()
    params.stop = "end"
    params.logit_bias = {1: 500.0}
    params.normalise()
    assert params.stop == ["end"] and params.output_text_buffer_length == 2
    assert params.logit_bias == {1: 100.0}
    params.repetition_detection = RepetitionDetectionParams(4, 1, 3)
    params.repetition_detection.min_count = 0
    with pytest.raises(TacoValidationError, match="min_count must be at least 2"):
        params.normalise()
    params.repetition_detection = None
    params.temperature = math.nan
    with pytest.raises(TacoValidationError, match="temperature"):
        params.normalise()


def test_from_optional_takes_none_and_text_keys() -> None:
    missing: dict[str, Any] = dict.fromkeys(
        ("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    )
    assert SamplingParams.from_optional(**missing) == SamplingParams()
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    assert SamplingParams.from_optional(logit_bias={"7": 500.0}).logit_bias == {7: 100.0}


def test_token_ids_of_a_bias_may_come_from_json() -> None:
    assert SamplingParams(logit_bias={"7": 500.0, 8: 1}).logit_bias == {7: 100.0, 8: 1.0}  # type: ignore[dict-item]
    with pytest.raises(TacoValidationError, match="'seven'"):
        SamplingParams(logit_bias={"seven": 1.0})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("config", "eos", "ignore_eos", "expected"),
    [
        ({"eos_token_id": [9, 7, 8]}, 9, False, (9, [5, 7, 8], {5, 7, 8, 9})),
        ({"eos_token_id": 9}, 9, False, (9, [5], {5, 9})),
        ({"eos_token_id": 8}, None, False, (None, [5, 8], {5, 8})),
        ({}, 9, False, (9, [5], {5, 9})),
        ({"eos_token_id": None}, None, False, (None, [5], {5})),
        ({"eos_token_id": [9, 7]}, 9, True, (None, [5], {5, 7, 9})),
    ],
)
def test_end_of_sequence_tokens_of_the_model(
    config: dict[str, Any], eos: int | None, ignore_eos: bool, expected: tuple[Any, ...]
) -> None:
    original = SamplingParams(stop_token_ids=[5], ignore_eos=ignore_eos)
    params = original.clone()
    for _ in range(2):  # a second time changes nothing
        params.update_from_generation_config(config, eos)
        assert (params.eos_token_id, params.stop_token_ids, params.all_stop_token_ids) == expected
    assert original == SamplingParams(stop_token_ids=[5], ignore_eos=ignore_eos)


def test_repr_is_that_of_0_6_plus_what_was_changed() -> None:
    assert repr(SamplingParams()) == (
        "SamplingParams(n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=1.0, "
        "top_p=1.0, top_k=-1, min_p=0.0, seed=None, stop=[], stop_token_ids=[], bad_words=[], "
        "include_stop_str_in_output=False, ignore_eos=False, max_tokens=16, min_tokens=0, logprobs=None, "
        "prompt_logprobs=None, skip_special_tokens=True, spaces_between_special_tokens=True, "
        "truncate_prompt_tokens=None, guided_decoding=None)"
    )
    text = repr(SamplingParams(no_repeat_ngram_size=3, detokenize=False, prompt_logprob_token_ids=[[1]]))
    assert text.endswith(
        "guided_decoding=None, detokenize=False, prompt_logprob_token_ids=array([[1]]), no_repeat_ngram_size=3)"
    )


@pytest.mark.parametrize(
    ("fields", "name", "feature"),
    [
        ({**BEAMS, "logprob_token_ids": [1]}, "logprob_token_ids", "beam search"),
        ({**BEAMS, "repetition_detection": RepetitionDetectionParams(2, 1, 2)}, "repetition_detection", "beam search"),
    ],
)
def test_what_does_not_exist_yet_is_refused_by_name(fields: dict[str, Any], name: str, feature: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"^{name} is not supported: .*{feature}") as caught:
        SamplingParams(**fields).validate_supported()
    assert caught.value.parameter == name


def test_everything_else_is_supported() -> None:
    params = rich_params()
    params.guided_decoding = None
    params.routed_experts_prompt_start = 2
    params.watermarking, params.thinking_token_budget = True, 3
    params.validate_supported()
    SamplingParams().validate_supported()


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 3), (2, 2), (9, 3)])
def test_a_trace_alone_decides_when_the_sequence_ends(max_tokens: int | None, expected: int) -> None:
    params = SamplingParams(
        trace_decode_token_ids=[5, 6, 7], max_tokens=max_tokens, min_tokens=1, stop="end", stop_token_ids=[6]
    )
    params.follow_trace()
    params.normalise()
    params.update_from_generation_config({"eos_token_id": [1, 2]}, 1)
    assert (params.max_tokens, params.min_tokens, params.stop, params.stop_token_ids) == (expected, 0, [], [])
    assert params.eos_token_id is None and params.output_text_buffer_length == 0


def test_guided_decoding_takes_at_most_one_constraint_and_structured_outputs_exactly_one() -> None:
    with pytest.raises(TacoValidationError, match="You can only use one kind of guided decoding but multiple"):
        GuidedDecodingParams(regex="a", json_object=True)
    GuidedDecodingParams(backend="outlines")
    with pytest.raises(TacoValidationError, match="only use one kind of structured outputs constraint but multiple"):
        StructuredOutputsParams(choice=["a"], structural_tag="{}")
    with pytest.raises(TacoValidationError, match="You must use one kind of structured outputs constraint but none"):
        StructuredOutputsParams()


def test_optional_values_make_guided_decoding_params_where_there_is_a_constraint() -> None:
    assert GuidedDecodingParams.from_optional() is None
    assert GuidedDecodingParams.from_optional(backend="outlines", whitespace_pattern=" ") is None
    for kind, value in (("json", {}), ("regex", ""), ("choice", []), ("grammar", ""), ("json_object", False)):
        made = GuidedDecodingParams.from_optional(**{kind: value}, backend="outlines", whitespace_pattern=" ")
        assert made == GuidedDecodingParams(**{kind: value}, backend="outlines", whitespace_pattern=" ")
        assert made is not None and made.constraint_kind == kind


def test_structured_outputs_tell_which_constraints_are_left() -> None:
    params = StructuredOutputsParams(structural_tag="{}")
    assert not params.all_constraints_none() and params.all_non_structural_tag_constraints_none()
    params.structural_tag = None
    assert params.all_constraints_none() and params.all_non_structural_tag_constraints_none()
    params.json_object = False
    assert not params.all_constraints_none() and not params.all_non_structural_tag_constraints_none()


@pytest.mark.parametrize("name", ["guided_decoding", "structured_outputs"])
def test_a_constraint_goes_with_every_way_of_sampling_but_a_trace(name: str) -> None:
    constraint = {"guided_decoding": GuidedDecodingParams, "structured_outputs": StructuredOutputsParams}[name]
    given: dict[str, Any] = {name: constraint(regex="a")}
    for others in ({"n": 2, "seed": 1}, {"min_tokens": 4, "stop": ["a"], "logprobs": 2}, BEAMS, {"best_of": 3}):
        SamplingParams(**given, **others).validate_supported()
    with pytest.raises(TacoValidationError, match=f"{name} cannot be used with trace_decode_token_ids"):
        SamplingParams(**given, trace_decode_token_ids=[1])


@pytest.mark.parametrize("sizes", [(-1, 0, 2), (2, 3, 2), (2, 1, 1), (2, -1, 2), (2.0, 1, 2)])
def test_repetition_detection_refuses_bad_sizes(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(TacoValidationError, match="max_pattern_size|min_pattern_size|min_count"):
        RepetitionDetectionParams(*sizes)


def test_repetition_detection_may_be_off() -> None:
    assert RepetitionDetectionParams() == RepetitionDetectionParams(0, 0, 0)
    RepetitionDetectionParams(max_pattern_size=3, min_count=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 0},
        {"beam_width": 16385},
        {"beam_width": True},
        {"max_tokens": 0},
        {"temperature": -1},
        {"length_penalty": math.nan},
        {"allowed_token_ids": ["a"]},
    ],
)
def test_beam_search_params_refuse_wrong_values_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(TacoValidationError, match=next(iter(fields))):
        BeamSearchParams(**{"beam_width": 4, "max_tokens": 8, **fields})


def test_beam_search_params_keep_what_is_allowed() -> None:
    params = BeamSearchParams(np.int64(4), 8, temperature=0, length_penalty=-1)
    assert (params.beam_width, params.max_tokens, params.temperature, params.length_penalty) == (4, 8, 0.0, -1.0)
    assert BeamSearchParams.__struct_fields__[:2] == ("beam_width", "max_tokens")


def test_ordinary_parameters_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplingParams(temperature=0.01)
        SamplingParams(temperature=0)


def test_eos_token_under_either_name() -> None:
    older, newer = SamplingParams(), SamplingParams()
    older.update_from_generation_config({"eos_token_id": [1, 2]}, model_eos_token_id=1)
    newer.update_from_generation_config({"eos_token_id": [1, 2]}, eos_token_id=1)
    assert older == newer and newer.eos_token_id == 1
    with pytest.raises(TacoValidationError, match="two names"):
        newer.update_from_generation_config({}, 1, eos_token_id=1)


def test_bad_words_get_their_token_ids_from_the_tokenizer() -> None:
    def tokenizer(texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [{"a": [1], " a": [2], "bc": [3, 4], " bc": [5]}[text] for text in texts]}

    params = SamplingParams(bad_words=["a", " bc"])
    params.update_from_tokenizer(tokenizer)
    assert params.bad_words_token_ids == [[1], [2], [3, 4]]
    SamplingParams().update_from_tokenizer(None)


def test_verifying_compares_with_the_model() -> None:
    model = make_config().model_config
    SamplingParams(allowed_token_ids=[model.vocab_size - 1], logprobs=model.max_logprobs).verify(
        model, None, None, None
    )
    for wrong in (
        SamplingParams(allowed_token_ids=[model.vocab_size]),
        SamplingParams(logprobs=model.max_logprobs + 1),
        SamplingParams(stop="a"),
    ):
        with pytest.raises(TacoValidationError):
            wrong.verify(model, None, None, None)
    SamplingParams(stop="a").verify(model, None, None, object())
    with pytest.raises(TacoValidationError, match="speculative_config"):
        SamplingParams().verify(model, object(), None, None)


def test_optional_parameters_have_the_positions_of_0_6() -> None:
    params = SamplingParams.from_optional(2, None, 0.5, None, 1.1, 0.7, stop="x")
    assert params == SamplingParams(n=2, presence_penalty=0.5, repetition_penalty=1.1, temperature=0.7, stop="x")
    with pytest.raises(ParameterTypeError, match="multiple values for ..temperature.."):
        SamplingParams.from_optional(1, None, 0, 0, 1, 0.7, temperature=1)


def test_warm_up_parameters_are_valid_and_use_much_of_the_sampler() -> None:
    params = SamplingParams.for_sampler_warmup()
    params.normalise()
    params.validate_supported()
    plain = SamplingParams()
    assert sum(getattr(params, name) != getattr(plain, name) for name in params.__struct_fields__) > 9


@pytest.mark.parametrize(("beam_width", "expected"), [(3, 6), (300, 400)])
def test_a_search_considers_twice_its_width_of_tokens(beam_width: int, expected: int) -> None:
    params = SamplingParams(temperature=0)
    BeamSearchParams(beam_width, 5).configure_logprobs(params, make_config(vocab_size=400))
    assert params.logprobs == expected
