"""PoolingParams and PoolerConfig: what they accept."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from taco.config import PoolerSettings
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.param_checks import ParameterTypeError
from taco.pooling_params import LateChunkingParams, LateInteractionParams, PoolerConfig, PoolingParams
from taco.sampling_params import RequestOutputKind
from tests.fake_engine import make_config


def test_canonical_form_and_copies() -> None:
    params = PoolingParams(returned_token_ids=(3, 4), dimensions=8, task="embed")
    params.normalise()
    assert params.returned_token_ids == [3, 4]
    clone = params.clone()
    clone.returned_token_ids.append(5)
    assert params.returned_token_ids == [3, 4]
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert PoolingParams(**{name: getattr(params, name) for name in params.__struct_fields__}) == params


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"dimensions": 0}, TacoValidationError),
        ({"dimensions": True}, ParameterTypeError),
        ({"dimensions": 2.0}, ParameterTypeError),
        ({"use_activation": "yes"}, ParameterTypeError),
        ({"step_tag_id": -1}, TacoValidationError),
        ({"returned_token_ids": []}, TacoValidationError),
        ({"returned_token_ids": [None]}, TacoValidationError),
        ({"returned_token_ids": "12"}, ParameterTypeError),
        ({"skip_reading_prefix_cache": "no"}, ParameterTypeError),
        ({"output_kind": RequestOutputKind.DELTA}, TacoValidationError),
        ({"task": "reward"}, TacoValidationError),
        ({"task": "dream"}, TacoValidationError),
        ({"extra_kwargs": {"a": 1}}, UnsupportedFeatureError),
        ({"late_interaction_params": LateInteractionParams("score_doc", "q")}, UnsupportedFeatureError),
        ({"late_chunking_params": LateChunkingParams(8)}, UnsupportedFeatureError),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], error: type[Exception]) -> None:
    params = PoolingParams(**values)
    with pytest.raises(error, match=next(iter(values))) as caught:
        params.normalise()
    assert isinstance(caught.value, ValueError)


def test_pooling_type_is_of_one_of_two_kinds() -> None:
    config = PoolerConfig("mean")
    assert (config.pooling_type, config.seq_pooling_type, config.tok_pooling_type) == ("MEAN", "MEAN", None)
    assert PoolerConfig(pooling_type="STEP").tok_pooling_type == "STEP"
    with pytest.raises(TacoValidationError, match="contradict"):
        PoolerConfig(pooling_type="MEAN", seq_pooling_type="CLS")


def test_names_of_both_versions_say_whether_results_are_activated() -> None:
    config = PoolerConfig(normalize=False, softmax=True)
    assert config.activates("embed") is False and config.activates("token_classify") is True
    assert PoolerConfig().activates("classify") is None
    assert PoolerConfig(use_activation=False, softmax=True).activates("classify") is False


@pytest.mark.parametrize(
    "values",
    [
        {"pooling_type": "MAX"},
        {"seq_pooling_type": "ALL"},
        {"normalize": "yes"},
        {"dimensions": 0},
        {"logit_sigma": 0.0},
        {"logit_mean": "low"},
        {"task": "encode"},
        {"enable_chunked_processing": True},
        {"max_embed_len": 100},
    ],
)
def test_wrong_configs_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TacoValidationError):
        PoolerConfig(**values)


def test_config_from_other_forms() -> None:
    expected = PoolerConfig(pooling_type="CLS", normalize=True)
    assert PoolerConfig.from_json('{"pooling_type": "CLS", "normalize": true}') == expected
    assert PoolerConfig.from_mapping(SimpleNamespace(pooling_type="CLS", normalize=True)) == expected
    with pytest.raises(TacoValidationError, match="has no pool"):
        PoolerConfig.from_mapping({"pool": 1})


def test_types_of_pooling_that_are_left_to_the_model() -> None:
    config = PoolerConfig(pooling_type="cls")
    assert config.get_seq_pooling_type() == "CLS"
    with pytest.raises(TacoValidationError, match="tok_pooling_type is not given"):
        config.get_tok_pooling_type()


def test_equal_configs_have_equal_hashes() -> None:
    config = PoolerConfig(pooling_type="CLS", returned_token_ids=[1, 2])
    assert config.compute_hash() == PoolerConfig(pooling_type="cls", returned_token_ids=[1, 2]).compute_hash()
    assert config.compute_hash() != PoolerConfig(pooling_type="CLS", returned_token_ids=[1]).compute_hash()


def test_verifying_fills_in_what_the_model_decides() -> None:
    settings = PoolerSettings(tasks=("embed",), seq_pooling_type="LAST", use_activation=False, dimensions=4)
    model = dataclasses.replace(make_config().model_config, pooler_config=settings)
    params = PoolingParams()
    params.verify(model)
    assert (params.task, params.use_activation, params.dimensions) == ("embed", False, 4)
    for wrong in (PoolingParams(task="classify"), PoolingParams(dimensions=2), PoolingParams(step_tag_id=1)):
        with pytest.raises(TacoValidationError):
            wrong.verify(model)
    with pytest.raises(TacoValidationError, match="generates text"):
        PoolingParams().verify(make_config().model_config)


@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        (LateInteractionParams("cache_query", "k"), None),
        (LateInteractionParams("score_doc", "k", 3), None),
        (LateInteractionParams("other", "k"), "mode"),
        (LateInteractionParams("score_doc", ""), "query_key"),
        (LateInteractionParams("score_doc", "k", 0), "query_uses"),
        (LateChunkingParams(5), None),
        (LateChunkingParams(0), "chunk_size"),
        (LateChunkingParams(None), "chunk_size"),  # type: ignore[arg-type]
    ],
)
def test_parameters_of_missing_features_are_checked(params: Any, wrong: str | None) -> None:
    if wrong is None:
        params.verify()
        return
    with pytest.raises(TacoValidationError, match=wrong):
        params.verify()


def test_fields_that_a_config_does_not_have_are_refused() -> None:
    data = {"pooling_type": "CLS", "softmax": True}
    assert PoolerConfig.reject_removed_parameters(data) is data
    assert PoolerConfig.reject_removed_parameters("text") == "text"
    with pytest.raises(TacoValidationError, match="PoolerConfig has no logit_bias"):
        PoolerConfig.reject_removed_parameters({**data, "logit_bias": 1.0})
