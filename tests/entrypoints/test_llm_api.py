"""`LLM` in front of an engine without a model."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import taco.entrypoints.llm as llm_module
from taco.engine.arg_utils import EngineArgs
from taco.entrypoints.llm import LLM
from taco.errors import BatchValidationError, EngineDeadError, TacoError, TacoValidationError, UnsupportedFeatureError
from taco.guided.request import GuidedDecodingRequest
from taco.guided.spec import GrammarKind, GrammarSpec
from taco.outputs import RequestOutput
from taco.request import Request
from taco.sampling_params import GuidedDecodingParams, SamplingParams, StructuredOutputsParams
from tests.fake_engine import FakeEngine, RowError, Script, make_config
from tests.tiny_tokenizers import byte_level_tokenizer

EOS = 1
QUIET: dict[str, Any] = {"use_tqdm": False}
Make = Callable[..., LLM]


def echo(request: Request) -> int:
    """Repeats the prompt, then ends."""
    done = request.num_output_tokens
    prompt = [token for token in request.prompt_token_ids if token != 0]
    return prompt[done] if done < len(prompt) else EOS


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(script: Script = echo, tokenizer: Any = None, **config: Any) -> LLM:
        if tokenizer is None and not config.get("skip_tokenizer_init"):
            tokenizer = byte_level_tokenizer()
        engine = FakeEngine(make_config(**config), tokenizer, script)
        monkeypatch.setattr(llm_module.LLMEngine, "from_engine_args", lambda engine_args: engine)
        return LLM("fake")

    return make


@pytest.fixture
def llm(make: Make) -> LLM:
    return make()


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# Construction


def test_a_subclass_may_choose_the_class_of_the_engine(llm: LLM) -> None:
    made: list[EngineArgs] = []

    class Engine(llm_module.LLMEngine):
        @classmethod
        def from_engine_args(cls, engine_args: EngineArgs, *args: Any, **kwargs: Any) -> Any:
            made.append(engine_args)
            return llm.llm_engine

    class Mine(LLM):
        @staticmethod
        def get_engine_class() -> type[llm_module.LLMEngine]:
            return Engine

    assert LLM.get_engine_class() is llm_module.LLMEngine
    assert Mine("other").llm_engine is llm.llm_engine and made[0].model == "other"


def given_to_engine(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> EngineArgs:
    seen: list[EngineArgs] = []
    monkeypatch.setattr(llm_module.LLMEngine, "from_engine_args", lambda args: seen.append(args) or fake())

    def fake() -> FakeEngine:
        return FakeEngine(make_config(), byte_level_tokenizer(), echo)

    LLM(*args, **kwargs)
    return seen[0]


def test_positional_arguments_have_the_order_of_06_and_are_deprecated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        DeprecationWarning, match=r"positional arguments \['tokenizer', 'tokenizer_mode'\] are deprecated"
    ):
        args = given_to_engine(monkeypatch, "m", "tok", "slow")
    assert (args.model, args.tokenizer, args.tokenizer_mode) == ("m", "tok", "slow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given_to_engine(monkeypatch, "m", tokenizer="tok")
        given_to_engine(monkeypatch, model="m")


def test_positional_arguments_do_not_warn_where_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "DEPRECATE_INIT_POSARGS", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given_to_engine(monkeypatch, "m", "tok", "slow")


def test_attributes_of_vllms_object(make: Make) -> None:
    llm = make(chat_template="{{ x }}")
    assert llm.engine_class is llm.get_engine_class()
    assert llm.chat_template == "{{ x }}" and llm.input_processor is llm.llm_engine.input_processor
    for name in ("renderer", "pooling_io_processors"):
        assert not hasattr(llm, name)
        with pytest.raises(UnsupportedFeatureError, match=rf"LLM\.{name} is not supported: "):
            getattr(llm, name)


def test_private_methods_of_vllm_add_and_run_requests(make: Make) -> None:
    llm = make(policy="priority")
    first = llm._add_request("hello", SamplingParams(max_tokens=9), None, None, 2)
    second = llm._add_request({"prompt": "hi"}, SamplingParams(max_tokens=9), None, 1)  # as in 0.33
    llm.llm_engine.add_request("own", "the", SamplingParams(max_tokens=9))
    assert [request.priority for request in llm.llm_engine.requests] == [2, 1, 0]
    outputs = llm._run_engine(RequestOutput, **QUIET)
    assert [output.request_id for output in outputs] == [first, second, "own"]
    assert texts(outputs) == ["hello", "hi", "the"]
    with pytest.raises(UnsupportedFeatureError, match="prompt_adapter_request"):
        llm._add_request("a", SamplingParams(), None, object())


def test_keywords_of_the_signature_and_of_the_engine_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    args = given_to_engine(monkeypatch, "m", seed=3, hf_token="t", max_model_len=77, compat_version="0.33")
    assert (args.seed, args.hf_token, args.max_model_len, args.compat_version) == (3, "t", 77, "0.33")


def test_defaults_of_the_signature_are_the_engines() -> None:
    defaults = {field.name: field.default for field in fields(EngineArgs)}
    for name, parameter in inspect.signature(LLM).parameters.items():
        if name not in ("model", "kwargs"):
            assert parameter.default == defaults[name], name


def test_unknown_keywords_are_type_errors_with_a_hint() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_model_length'; did you mean 'max_model_len'"):
        LLM("m", max_model_length=5)
    with pytest.raises(TypeError, match=r"(?s)arguments:.*did you mean 'max_model_len'.*'nonsense'$"):
        LLM("m", max_model_length=5, nonsense=1)


def test_from_engine_args(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineArgs] = []
    engine = FakeEngine(make_config(), byte_level_tokenizer(), echo)
    monkeypatch.setattr(llm_module.LLMEngine, "from_engine_args", lambda args: seen.append(args) or engine)
    given = EngineArgs(model="m", max_num_seqs=3)
    assert LLM.from_engine_args(given).llm_engine is engine
    assert seen == [given]


def test_failed_construction_leaves_an_object_that_can_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: EngineArgs) -> FakeEngine:
        raise TacoValidationError("no such model")

    monkeypatch.setattr(llm_module.LLMEngine, "from_engine_args", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pytest.PytestUnraisableExceptionWarning)
        with pytest.raises(TacoValidationError, match="no such model"):
            LLM("m")
        gc.collect()


# generate: forms of prompts and parameters


def test_outputs_are_in_the_order_of_the_prompts_however_they_finish(llm: LLM) -> None:
    prompts = ["a" * (1 + (7 * i) % 11) for i in range(40)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20), **QUIET)
    assert texts(outputs) == prompts and [output.prompt for output in outputs] == prompts
    assert [output.request_id for output in outputs] == [str(i) for i in range(40)]
    assert all(output.finished and output.outputs[0].finish_reason == "stop" for output in outputs)
    assert llm.generate("b", **QUIET)[0].request_id == "40"


@pytest.mark.parametrize(
    "prompts",
    [
        "hi",
        ["hi"],
        ("hi",),
        {"prompt": "hi"},
        [{"prompt": "hi"}],
        "IDS",
        ["IDS"],
        {"prompt_token_ids": "IDS"},
        "ARRAY",
        ["ARRAY"],
    ],
)
def test_all_forms_of_a_prompt(llm: LLM, prompts: Any) -> None:
    ids = byte_level_tokenizer().encode("hi")

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(element) for key, element in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(fill, value))
        return {"IDS": ids, "ARRAY": np.array(ids)}.get(value, value)

    [output] = llm.generate(fill(prompts), **QUIET)
    assert output.outputs[0].text == "hi" and output.prompt_token_ids == ids


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], **QUIET) == [] == llm.generate(iter([]), **QUIET) == llm.chat([], **QUIET)


def test_params_for_all_or_one_each(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=k) for k in (1, 2)]
    for given in (params, tuple(params)):
        outputs = llm.generate([[5, 6, 7], [5, 6, 7]], given, **QUIET)
        assert [output.outputs[0].token_ids for output in outputs] == [[5], [5, 6]]
    for wrong in (params, tuple(params)):
        with pytest.raises(ValueError, match="The lengths of prompts and params must be the same"):
            llm.generate(["a", "b", "c"], wrong, **QUIET)


def test_missing_params_are_the_models_defaults(make: Make) -> None:
    llm = make(default_sampling_params={"max_tokens": 2, "temperature": 0.5})
    assert len(llm.generate([[5, 6, 7]], **QUIET)[0].outputs[0].token_ids) == 2
    default = llm.get_default_sampling_params()
    assert default == SamplingParams(max_tokens=2, temperature=0.5)
    default.max_tokens = 9
    assert llm.get_default_sampling_params().max_tokens == 2
    assert llm.default_sampling_params == {"max_tokens": 2, "temperature": 0.5}


def test_params_of_the_caller_are_not_changed(llm: LLM) -> None:
    params = SamplingParams(stop="x", bad_words=["cat"], max_tokens=None)
    before = pickle.dumps(params)
    llm.generate(["hi"] * 3, params, **QUIET)
    assert pickle.dumps(params) == before


def test_priorities(make: Make) -> None:
    with pytest.raises(ValueError, match="Priority scheduling is not enabled"):
        make().generate("a", priority=[1], **QUIET)
    llm = make(policy="priority")
    assert texts(llm.generate(["a", "b"], priority=[1, -1], **QUIET)) == ["a", "b"]
    assert texts(llm.generate(["a", "b"], priority=5, **QUIET)) == ["a", "b"]
    with pytest.raises(ValueError, match="The lengths of prompts and priority must be the same"):
        llm.generate(["a"], priority=[1, 2], **QUIET)


def test_tokenization_kwargs(llm: LLM) -> None:
    [output] = llm.generate([list(range(5, 15))], tokenization_kwargs={"truncate_prompt_tokens": 2}, **QUIET)
    assert output.prompt_token_ids == [13, 14]


def test_tokenization_kwargs_that_are_no_dict_are_an_error(llm: LLM) -> None:
    with pytest.raises(TacoValidationError, match="tokenization_kwargs must be a dict or None"):
        llm.generate("a", tokenization_kwargs=[1], **QUIET)


def test_samples_of_a_prompt(llm: LLM) -> None:
    [output] = llm.generate(["hi"], SamplingParams(n=3), **QUIET)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    [output] = llm.generate(["hi"], SamplingParams(n=2, best_of=3), **QUIET)
    assert len(output.outputs) == 2 and output.outputs[0].logprobs is None


# generate: what is old, and what does not exist


def test_legacy_prompt_token_ids(llm: LLM) -> None:
    with pytest.warns(DeprecationWarning, match="prompt_token_ids") as caught:
        assert llm.generate(prompt_token_ids=[5, 6], **QUIET)[0].outputs[0].token_ids[:2] == [5, 6]
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(DeprecationWarning):
        outputs = llm.generate(None, SamplingParams(), [[5], [6]], **QUIET)
        assert [output.prompt_token_ids for output in outputs] == [[5], [6]]
    with pytest.warns(DeprecationWarning):  # the text wins
        assert texts(llm.generate(["a", "b"], prompt_token_ids=[[5], [6]], **QUIET)) == ["a", "b"]
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match="prompts and prompt_token_ids must be the same"),
    ):
        llm.generate(["a"], prompt_token_ids=[[5], [6]], **QUIET)
    with pytest.raises(ValueError, match="Either prompts or prompt_token_ids must be provided"):
        llm.generate(**QUIET)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="please provide at least one prompt"):
        llm.generate(prompt_token_ids=[], **QUIET)


def test_legacy_names_warn_unless_that_is_switched_off(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "DEPRECATE_LEGACY", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.generate(prompt_token_ids=[5, 6], **QUIET)
    with LLM.deprecate_legacy_api(), pytest.warns(DeprecationWarning, match="prompt_token_ids"):
        llm.generate(prompt_token_ids=[5, 6], **QUIET)
    assert not LLM.DEPRECATE_LEGACY


def test_guided_options_are_a_constraint_of_every_prompt(make: Make) -> None:
    seen: list[Request] = []
    llm = make(lambda request: seen.append(request) or echo(request))
    one, other = SamplingParams(max_tokens=9), SamplingParams(max_tokens=8)
    before = copy.deepcopy([one, other])
    for params, lengths in ((None, [16] * 3), (one, [9] * 3), ([one, other, one], [9, 8, 9])):
        seen.clear()
        with pytest.warns(DeprecationWarning, match="guided_options_request is deprecated") as caught:
            llm.generate(["a", "b", "c"], params, guided_options_request={"guided_choice": ["a"]}, **QUIET)
        assert len(caught) == 1
        requests = {request.request_id: request for request in seen}.values()
        assert [request.params.max_tokens for request in requests] == lengths
        assert {request.params.grammar for request in requests} == {GrammarSpec(GrammarKind.CHOICE, '["a"]')}
    assert [one, other] == before
    with pytest.warns(DeprecationWarning):
        llm.generate("a", one, guided_options_request=GuidedDecodingRequest(guided_regex="a"), **QUIET)
    assert seen[-1].params.grammar == GrammarSpec(GrammarKind.REGEX, "a")
    with pytest.warns(DeprecationWarning):
        llm.generate("a", one, guided_options_request={}, **QUIET)
    assert seen[-1].params.grammar is None


def test_wrong_guided_options_are_errors(llm: LLM) -> None:
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="only use one guided decoding"):
        llm.generate("a", guided_options_request={"guided_regex": "a", "guided_json": "{}"}, **QUIET)
    guided = SamplingParams(guided_decoding=GuidedDecodingParams(regex="a"))
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="Cannot set both guided_options_request"):
        llm.generate("a", [guided], guided_options_request={"guided_regex": "a"}, **QUIET)


@pytest.mark.parametrize("name", ["guided_decoding", "structured_outputs"])
def test_a_constraint_needs_a_tokenizer(make: Make, name: str) -> None:
    constraint = {"guided_decoding": GuidedDecodingParams, "structured_outputs": StructuredOutputsParams}[name]
    with pytest.raises(TacoValidationError, match=f"{name} needs a tokenizer, but skip_tokenizer_init"):
        make(skip_tokenizer_init=True).generate([[5]], SamplingParams(**{name: constraint(regex="a")}), **QUIET)


def test_what_does_not_exist_is_refused_by_name(llm: LLM) -> None:
    with pytest.raises(UnsupportedFeatureError, match="prompt_adapter_request"):
        llm.generate("a", prompt_adapter_request=object(), **QUIET)
    with pytest.raises(UnsupportedFeatureError, match="mm_processor_kwargs"):
        llm.generate("a", mm_processor_kwargs={"x": 1}, **QUIET)
    with pytest.raises(UnsupportedFeatureError, match="LoRA is not enabled"):
        llm.generate("a", lora_request=object(), **QUIET)
    with pytest.raises(UnsupportedFeatureError, match="multi_modal_data"):
        llm.generate({"prompt": "a", "multi_modal_data": {"image": 1}}, **QUIET)
    with pytest.raises(TacoValidationError, match="on_error"):
        llm.generate("a", on_error="ignore", **QUIET)


# generate: bad rows

HOSTILE: list[Any] = [
    "ok",
    "",
    [],
    3.5,
    None,
    "\ud800",
    [10**12],
    [-1],
    {"prompt": 1},
    {},
    ["x"],
    b"raw",
    "fine",
    [5] * 99,
]
BAD = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # "" has a start token; the last one is too long, which is a result


def test_all_bad_rows_are_named_before_any_work(make: Make) -> None:
    def never(request: Request) -> int:
        raise AssertionError("a row has run")

    llm = make(never)
    with pytest.raises(BatchValidationError) as caught:
        llm.generate(HOSTILE, **QUIET)
    assert sorted(caught.value.errors) == BAD and isinstance(caught.value, ValueError)
    for index in BAD:
        assert f"row {index}: " in str(caught.value)
    assert not llm.llm_engine.has_unfinished_requests()


def test_bad_rows_can_be_returned_and_do_not_touch_the_others(make: Make) -> None:
    seeds: list[dict[str, int]] = []

    def script(request: Request) -> int:
        seeds[-1][request.request_id] = request.seed
        return echo(request)

    results = []
    for prompts in (HOSTILE, [HOSTILE[i] if i not in BAD else "good" for i in range(len(HOSTILE))]):
        seeds.append({})
        results.append(make(script).generate(prompts, on_error="return", **QUIET))
    for index, (beside, alone) in enumerate(zip(*results, strict=True)):
        assert beside.request_id == str(index)
        if index in BAD:
            [completion] = beside.outputs
            assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [], "error")
            assert beside.finished and beside.error and beside.metrics is not None
        else:
            assert beside.error is None and beside.outputs == alone.outputs
            assert seeds[0].get(str(index)) == seeds[1].get(str(index))
    assert results[0][5].prompt == "\ud800"
    assert results[0][-1].outputs[0].finish_reason == "length"


def test_a_batch_of_one_raises_the_rows_own_error(llm: LLM) -> None:
    with pytest.raises(TypeError, match="inputs must be a string, TextPrompt, or TokensPrompt"):
        llm.generate([3.5], **QUIET)
    with pytest.raises(ValueError, match="Prompt cannot be empty"):
        llm.generate({"prompt_token_ids": []}, **QUIET)


def test_params_that_are_wrong_for_all_are_reported_once(llm: LLM) -> None:
    with pytest.raises(TacoValidationError, match="^Cannot request more than 20 logprobs") as caught:
        llm.generate(["a"] * 100, SamplingParams(logprobs=21), **QUIET)
    assert not isinstance(caught.value, BatchValidationError)
    outputs = llm.generate(["a"] * 3, SamplingParams(logprobs=21), on_error="return", **QUIET)
    assert all("Cannot request" in (output.error or "") for output in outputs)
    with pytest.raises(TypeError, match="sampling_params must be a SamplingParams"):
        llm.generate("a", {"n": 1}, **QUIET)  # type: ignore[arg-type]


def test_a_row_that_fails_while_it_runs(make: Make) -> None:
    def script(request: Request) -> int:
        if request.request_id.endswith("1") and request.num_output_tokens == 1:
            raise RowError("logits are not finite")
        return echo(request)

    llm = make(script)
    with pytest.raises(TacoError, match="Row 1 failed while it ran.*logits are not finite"):
        llm.generate(["aa", "bb", "cc"], **QUIET)
    assert not llm.llm_engine.has_unfinished_requests()
    llm = make(script)
    outputs = llm.generate(["aa", "bb", "cc"], on_error="return", **QUIET)
    assert texts(outputs) == ["aa", "b", "cc"]
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop", "error", "stop"]
    assert outputs[1].error == "logits are not finite"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_call_leaves_a_clean_engine(make: Make, error: type[BaseException]) -> None:
    broken = [True]

    def script(request: Request) -> int:
        if broken[0] and request.num_output_tokens == 2:
            raise error
        return echo(request)

    llm = make(script)
    with pytest.raises(error):
        llm.generate(["aaaa"] * 9, **QUIET)
    assert llm.llm_engine.get_num_unfinished_requests() == 0
    broken[0] = False
    outputs = llm.generate(["abab", "cdcd"], **QUIET)
    assert texts(outputs) == ["abab", "cdcd"]


# generate: large inputs


def test_the_engine_holds_a_bounded_number_of_requests(make: Make) -> None:
    llm = make(max_num_seqs=4)
    outputs = llm.generate([[5]] * 3000, SamplingParams(max_tokens=1), **QUIET)
    assert len(outputs) == 3000
    engine: Any = llm.llm_engine
    assert engine.max_unfinished <= 2 * 4 + 1000


def test_the_bound_counts_samples_and_not_rows(make: Make) -> None:
    llm = make(max_num_seqs=400)
    engine: Any = llm.llm_engine
    for params in (SamplingParams(n=64, max_tokens=1), SamplingParams(n=1, best_of=64, max_tokens=1)):
        engine.max_sequences = 0
        outputs = llm.generate([[5]] * 60, params, **QUIET)
        assert [len(output.outputs) for output in outputs] == [params._real_n or params.n] * 60
        assert 2 * 400 + 1000 <= engine.max_sequences < 2 * 400 + 1000 + 64


def test_rows_that_need_no_run_do_not_hide_those_behind_them(make: Make) -> None:
    prompts: list[Any] = [[]] * 3000 + ["a"] + [[5] * 65] * 3000 + ["b"]
    outputs = make(max_num_seqs=4).generate(prompts, on_error="return", **QUIET)
    assert len(outputs) == len(prompts)
    assert outputs[3000].outputs[0].text == "a" and outputs[-1].outputs[0].text == "b"


def test_urgent_rows_of_a_long_list_run_first(make: Make) -> None:
    order: list[str] = []

    def script(request: Request) -> int:
        order.append(request.request_id)
        return echo(request)

    llm = make(script, policy="priority", max_num_seqs=1)
    num_rows = 3000
    prompts: list[Any] = [[5 + i % 100] for i in range(num_rows)]
    prompts[7] = []
    priorities = [-(i // 10) for i in range(num_rows)]
    params = SamplingParams(max_tokens=1)
    outputs = llm.generate(prompts, params, priority=priorities, on_error="return", **QUIET)
    assert [output.request_id for output in outputs] == [str(i) for i in range(num_rows)]
    assert outputs[7].error is not None and [o.prompt_token_ids for o in outputs] == prompts
    valid = [i for i in range(num_rows) if i != 7]
    assert order == [str(i) for i in sorted(valid, key=priorities.__getitem__)]
    order.clear()
    llm.generate(iter(prompts[:5]), params, priority=2, **QUIET)
    assert order == [str(num_rows + i) for i in range(5)]


def test_an_iterator_is_read_as_the_engine_advances(make: Make) -> None:
    llm = make(max_num_seqs=50)
    engine: Any = llm.llm_engine
    num_read, num_ahead = 0, []

    def prompts() -> Iterator[str]:
        nonlocal num_read
        for i in range(5000):
            num_read += 1
            num_ahead.append(num_read - llm.request_counter.counter)
            yield f"p{i}"

    outputs = llm.generate(prompts(), SamplingParams(max_tokens=3), **QUIET)
    assert [output.prompt for output in outputs] == [f"p{i}" for i in range(5000)]
    assert max(num_ahead) <= 1024 and engine.max_unfinished <= 2 * 50 + 1000


def test_bad_rows_of_an_iterator(make: Make) -> None:
    llm = make()
    prompts = ["a"] * 2000 + [[]] + ["b"]
    with pytest.raises(TacoValidationError, match="Row 2000 is not valid.*Prompt cannot be empty"):
        llm.generate(iter(prompts), SamplingParams(max_tokens=1), **QUIET)
    assert not llm.llm_engine.has_unfinished_requests()
    outputs = llm.generate(iter(prompts), SamplingParams(max_tokens=2), on_error="return", **QUIET)
    assert outputs[2000].outputs[0].finish_reason == "error" and outputs[2001].outputs[0].text == "b"


def test_lists_of_params_need_lists_of_prompts(llm: LLM) -> None:
    with pytest.raises(TacoValidationError, match="needs a list of prompts"):
        llm.generate(iter(["a"]), [SamplingParams()], **QUIET)


def test_an_iterator_that_fails_aborts_what_runs(llm: LLM) -> None:
    def prompts() -> Iterator[str]:
        yield from ["a"] * 3000
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        llm.generate(prompts(), **QUIET)
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_call_from_inside_a_call_is_refused(llm: LLM) -> None:
    def prompts() -> Iterator[str]:
        yield from ["a"] * 1024
        llm.generate("b", **QUIET)

    with pytest.raises(TacoError, match="unfinished requests that this call did not add"):
        llm.generate(prompts(), **QUIET)


def test_calls_from_several_threads_take_turns(make: Make) -> None:
    def slow_echo(request: Request) -> int:
        time.sleep(0.0002)  # lets the other threads run
        return echo(request)

    llm = make(slow_echo)
    results: dict[str, list[str]] = {}

    def work(name: str) -> None:
        results[name] = texts(llm.generate([name * 5] * 20, **QUIET))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [name * 5] * 20 for name in "abc"}


# Progress


class FakeBar:
    made: list[FakeBar] = []

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs
        self.postfix = kwargs["postfix"]
        self.n = 0
        self.format_dict = {"elapsed": 2.0}
        self.is_closed = False
        FakeBar.made.append(self)

    def update(self, n: int) -> None:
        self.n += n

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def test_progress_counts_prompts_and_tokens(llm: LLM) -> None:
    FakeBar.made.clear()
    llm.generate(["hi", [], "ho"], SamplingParams(n=2), use_tqdm=FakeBar, on_error="return")
    [bar] = FakeBar.made
    assert bar.kwargs["total"] == 3 and bar.kwargs["desc"] == "Processed prompts" and bar.kwargs["dynamic_ncols"]
    assert bar.kwargs["postfix"] == "est. speed input: 0.00 toks/s, output: 0.00 toks/s"
    ids = len(byte_level_tokenizer().encode("hi")) + len(byte_level_tokenizer().encode("ho"))
    assert bar.n == 3 and bar.is_closed
    assert bar.postfix == f"est. speed input: {ids / 2:.2f} toks/s, output: {2 * ids / 2:.2f} toks/s"


def test_progress_counts_samples_in_033(make: Make) -> None:
    llm = make(version="0.33")
    for enqueues in (False, True):
        FakeBar.made.clear()
        if enqueues:
            llm.enqueue(["hi", "ho"], SamplingParams(n=2, max_tokens=9))
            llm.wait_for_completion(use_tqdm=FakeBar)
        else:
            llm.generate(["hi", "ho"], [SamplingParams(n=2, max_tokens=9)] * 2, use_tqdm=FakeBar)
        [bar] = FakeBar.made
        assert bar.kwargs["total"] == bar.n == 4
        ids = 2 * len(byte_level_tokenizer().encode("hi")) + 2 * len(byte_level_tokenizer().encode("ho"))
        assert bar.postfix.startswith(f"est. speed input: {ids / 2:.2f} toks/s")


def test_progress_bar_is_tqdms(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["hi"] * 3)
    assert "Processed prompts: 100%" in capsys.readouterr().err
    llm.generate(["hi"] * 3, use_tqdm=False)
    assert capsys.readouterr().err == ""


# chat


def test_chat_renders_one_conversation_or_many(llm: LLM) -> None:
    user = {"role": "user", "content": "hi"}
    [output] = llm.chat([user], **QUIET)
    assert output.prompt == "<s><|user|>hi</s><|assistant|>"
    assert output.prompt_token_ids == byte_level_tokenizer().encode(output.prompt, add_special_tokens=False)
    assert output.prompt_token_ids.count(0) == 1  # the template's start token alone
    [output] = llm.chat([user], chat_template="{{ messages[0].content }}", **QUIET)
    assert 0 not in output.prompt_token_ids
    [output] = llm.chat(
        [user], chat_template="{{ messages[0].content }}", tokenization_kwargs={"add_special_tokens": True}, **QUIET
    )
    assert output.prompt_token_ids[0] == 0
    assert len(llm.chat([[user], [user, user]], **QUIET)) == 2
    assert len(llm.chat(iter([[user]] * 3), **QUIET)) == 3


def test_fifth_positional_argument_of_chat_is_a_template_or_a_priority(make: Make) -> None:
    llm = make(policy="priority")
    messages = [{"role": "user", "content": "hi"}]
    assert llm.chat(messages, None, False, None, "{{ 'T' }}")[0].prompt == "T"
    for priority in (3, [3]):
        assert llm.chat(messages, None, False, None, priority)[0].prompt == "<s><|user|>hi</s><|assistant|>"
    with pytest.raises(ValueError, match="The lengths of prompts and priority"):
        llm.chat(messages, None, False, None, [1, 2])
    with pytest.raises(TacoValidationError, match="chat_template must be a string"):
        llm.chat(messages, chat_template=3, priority=3, **QUIET)
    for priority in (3, None):  # and a sixth argument, as in 0.33
        with pytest.raises(TacoValidationError, match=r"another order of arguments; pass them by name"):
            llm.chat(messages, None, False, None, priority, "{{ 'T' }}")


def test_signatures_have_the_orders_of_06() -> None:
    def positional(function: Callable[..., Any]) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    generate = "prompts sampling_params prompt_token_ids use_tqdm lora_request prompt_adapter_request"
    assert positional(LLM.generate) == [*generate.split(), "guided_options_request", "priority"]
    chat = "messages sampling_params use_tqdm lora_request chat_template chat_template_content_format"
    last = ["add_generation_prompt", "continue_final_message", "tools", "mm_processor_kwargs"]
    assert positional(LLM.chat) == [*chat.split(), *last]


def test_template_of_the_llm_and_of_the_tokenizer(make: Make) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    llm = make(tokenizer=tokenizer)
    llm.get_tokenizer().chat_template = "{{ 'changed' }}"
    assert llm.chat(messages, **QUIET)[0].prompt == "changed"
    assert make(chat_template="{{ 'llm' }}").chat(messages, **QUIET)[0].prompt == "llm"
    assert make(chat_template="{{ 'llm' }}").chat(messages, chat_template="{{ 'x' }}", **QUIET)[0].prompt == "x"


def test_bad_conversations_are_named_by_their_index(llm: LLM) -> None:
    good = [{"role": "user", "content": "hi"}]
    bad = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(BatchValidationError, match=r"(?s)row 1: .*'image_url'.*row 2: "):
        llm.chat([good, bad, [], good], **QUIET)
    outputs = llm.chat([good, bad, [], good], on_error="return", **QUIET)
    assert [output.error is None for output in outputs] == [True, False, False, True]
    with pytest.raises(TacoValidationError, match="template could not be applied.*alternate"):
        llm.chat(good, chat_template="{{ raise_exception('must alternate') }}", **QUIET)


def test_chat_checks_its_options(llm: LLM) -> None:
    good = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="continue_final_message and add_generation_prompt"):
        llm.chat(good, continue_final_message=True, **QUIET)
    with pytest.raises(ValueError, match="chat_template_content_format"):
        llm.chat(good, chat_template_content_format="x", **QUIET)
    with pytest.raises(UnsupportedFeatureError, match="mm_processor_kwargs"):
        llm.chat(good, mm_processor_kwargs={"x": 1}, **QUIET)
    [output] = llm.chat(good, chat_template="{{ color }}", chat_template_kwargs={"color": "blue"}, **QUIET)
    assert output.prompt == "blue"


# Life


def test_tokenizer_can_be_replaced(llm: LLM) -> None:
    other = copy.deepcopy(byte_level_tokenizer())
    llm.set_tokenizer(other)
    assert llm.get_tokenizer() is other


def test_closed_llm_says_so(llm: LLM) -> None:
    assert repr(llm) == "LLM(model='fake', device='cpu', dtype='float32', max_model_len=64)"
    with llm as entered:
        assert entered is llm
    assert repr(llm) == "LLM(closed)"
    for call in (lambda: llm.generate("a"), lambda: llm.chat([]), llm.get_tokenizer, llm.get_default_sampling_params):
        with pytest.raises(EngineDeadError, match="closed"):
            call()
    llm.close()


def test_deleting_it_frees_the_engine_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    monkeypatch.undo()  # the patch holds the engine
    llm.generate(["a", []], on_error="return", **QUIET)
    with pytest.raises(BatchValidationError):
        llm.generate(["a", []], **QUIET)
    llm.chat([[{"role": "user"}], ["bad"]], on_error="return", **QUIET)
    engine: Any = weakref.ref(llm.llm_engine)
    gc.collect()
    gc.disable()
    try:
        del llm
        assert engine() is None
    finally:
        gc.enable()


def test_request_counter_counts_rows(llm: LLM) -> None:
    llm.generate(["a", [], "b"], on_error="return", **QUIET)
    assert llm.request_counter.counter == 3
