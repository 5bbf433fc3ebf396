"""The files of sentence-transformers beside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.sentence_transformers import read_sentence_transformers_files
from tests.tiny_pooling_models import write_sentence_transformers_files


def test_folders_without_such_files_have_no_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_sentence_transformers_files(tmp_path) is None


def test_settings_beside_a_model_without_modules_are_read(tmp_path: Path) -> None:
    (tmp_path / "sentence_roberta_config.json").write_text('{"max_seq_length": 100, "do_lower_case": false}')
    files = read_sentence_transformers_files(tmp_path)
    assert files is not None and files.max_seq_length == 100
    assert files.seq_pooling_type is None and not files.lower_case and not files.normalize


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "CLS"),
        ({"pooling_mode_mean_tokens": True}, "MEAN"),
        ({"pooling_mode_lasttoken": True}, "LAST"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, "LAST"),
    ],
)
def test_ways_of_pooling(pooling: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_sentence_transformers_files(tmp_path, pooling=pooling | {"include_prompt": False}, normalize=False)
    files = read_sentence_transformers_files(tmp_path)
    assert files is not None and files.seq_pooling_type == expected
    assert not files.include_prompt and not files.normalize


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "weightedmean"},
        {"word_embedding_dimension": 8},
    ],
)
def test_other_ways_of_pooling_are_refused(pooling: dict[str, Any], tmp_path: Path) -> None:
    write_sentence_transformers_files(tmp_path, pooling=pooling)
    with pytest.raises(UnsupportedFeatureError, match="Pass pooler_config"):
        read_sentence_transformers_files(tmp_path)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ({"path": "1_WordWeights", "type": "sentence_transformers.models.WordWeights"}, "WordWeights"),
        ({"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}, "0_Transformer"),
    ],
)
def test_other_modules_are_refused(module: dict[str, str], error: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(UnsupportedFeatureError, match=error):
        read_sentence_transformers_files(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("modules.json", "{}"), ("config_sentence_transformers.json", "[")])
def test_damaged_files_are_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TacoValidationError, match=name):
        read_sentence_transformers_files(tmp_path)


@pytest.mark.parametrize(("length", "expected"), [(256, 256), (10**30, None)])
def test_length_may_be_left_to_the_tokenizer(length: int, expected: int | None, tmp_path: Path) -> None:
    write_sentence_transformers_files(tmp_path, transformer={"transformer_task": "feature-extraction"})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    files = read_sentence_transformers_files(tmp_path)
    assert files is not None and files.max_seq_length == expected


def test_modules_are_known_by_their_newer_names_too(tmp_path: Path) -> None:
    home = "sentence_transformers.sentence_transformer.modules"
    modules = [{"path": "", "type": f"{home}.transformer.Transformer"}, {"path": "", "type": f"{home}.norm.Normalize"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "config_sentence_transformers.json").write_text('{"activation_fn": "torch.nn.modules.linear.Identity"}')
    files = read_sentence_transformers_files(tmp_path)
    assert files is not None and files.normalize and files.seq_pooling_type is None
    assert files.activation == "torch.nn.modules.linear.Identity"


def test_prompts_without_a_text_are_left_out(tmp_path: Path) -> None:
    write_sentence_transformers_files(tmp_path, settings={"prompts": {"query": "q: ", "passage": None}})
    files = read_sentence_transformers_files(tmp_path)
    assert files is not None and files.prompts == {"query": "q: "}
