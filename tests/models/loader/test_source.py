from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import AutoConfig, Gemma3Config, LlamaConfig, PretrainedConfig

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.models.loader.source import (
    ModelSource,
    load_generation_config,
    load_hf_config,
    resolve_model,
    select_weight_files,
)
from tests.models.loader.tiny_gguf import BASE

HUB_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer.model.v3",
    "merges.txt",
    "README.md",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/params.json",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "tf_model.h5",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    AutoConfig.for_model("llama", **BASE).save_pretrained(tmp_path)
    return tmp_path


class FakeHub:
    """Stands in for huggingface_hub: what is asked of it, and what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str] | Exception) -> None:
        self.downloads: list[dict[str, Any]] = []
        self.cached: Path | None = None
        self.files, self.folder = files, folder
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: SimpleNamespace(model_info=self.info))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def info(self, model: str, revision: str | None) -> SimpleNamespace:
        if isinstance(self.files, Exception):
            raise self.files
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def download(self, model: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only and self.cached is None:
            raise LocalEntryNotFoundError("not cached")
        self.downloads.append({"local_files_only": local_files_only, **options})
        return str(self.folder)


def test_a_folder_and_a_gguf_file_are_found(folder: Path) -> None:
    assert resolve_model(str(folder)) == ModelSource("hf", str(folder))
    file = folder / "model.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file)) == ModelSource("gguf", str(file))
    assert resolve_model(str(file), load_format="dummy") == ModelSource("gguf", str(file))
    assert resolve_model(str(folder)).kind == "hf"
    assert resolve_model(str(folder), load_format="gguf") == ModelSource("gguf", str(file))


def changed(folder: Path, **fields: Any) -> ModelSource:
    """A model whose config.json has other fields; those of `rope_parameters` are added to what is there."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = fields.pop("rope_parameters", None)
    config |= fields
    if rope is not None:
        config["rope_parameters"] |= rope
    file.write_text(json.dumps(config))
    return ModelSource("hf", str(folder))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"vocab_size": -1},
        {"hidden_size": 2**63},
        {"num_key_value_heads": -1},
        {"max_position_embeddings": 0},
        {"intermediate_size": True},
        {"architectures": ["LlamaForCausalLM", 1]},
        {"rope_parameters": {"rope_theta": 0.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": -2.0}},
    ],
)
def test_numbers_that_no_model_can_have_are_named(folder: Path, fields: dict[str, Any]) -> None:
    name = next(iter(fields["rope_parameters"])) if "rope_parameters" in fields else next(iter(fields))
    name = "factor" if name == "rope_type" else name
    with pytest.raises(TacoValidationError, match=rf"cannot be used.*{name}"):
        load_hf_config(changed(folder, **fields))


@pytest.mark.parametrize("eos", ["x", [1, "a"], 1.5, {}, [[1]], True])
def test_ends_of_sequences_must_be_token_ids(folder: Path, eos: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(TacoValidationError, match=r"generation_config\.json: eos_token_id is"):
        load_generation_config(ModelSource("hf", str(folder)))


def test_a_broken_link_to_a_file_that_is_not_needed_is_no_problem(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to(folder / "nowhere")
    (folder / "tokenizer.model").mkdir()
    assert resolve_model(str(folder)).kind == "hf"


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TacoValidationError, match="holds an adapter"):
        load_hf_config(ModelSource("hf", str(tmp_path)))


def test_what_git_left_in_place_of_a_tokenizer_is_reported(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(TacoValidationError, match=r"tokenizer\.json only names the file that Git LFS has"):
        resolve_model(str(folder))


def test_a_folder_with_nothing_but_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert resolve_model(str(tmp_path)) == ModelSource("gguf", str(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(TacoValidationError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "some/model.gguf", "a/b/c"]
)
def test_a_path_that_does_not_exist_never_asks_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    FakeHub(monkeypatch, tmp_path, AssertionError("asked"))
    with pytest.raises(TacoValidationError, match=r"no folder and no \.gguf file"):
        resolve_model(model)


def test_unusable_files_and_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TacoValidationError, match="pass the folder"):
        resolve_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(UnsupportedFeatureError, match="load_format='tensorizer'.*auto, safetensors, pt, gguf, dummy"):
        resolve_model(str(tmp_path), load_format="tensorizer")
    with pytest.raises(TacoValidationError, match=r"no \.gguf file"):
        resolve_model(str(tmp_path), load_format="gguf")


@pytest.mark.parametrize(
    ("load_format", "weights"),
    [
        ("auto", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("safetensors", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("pt", ["pytorch_model.bin"]),
        ("dummy", []),
    ],
)
def test_only_the_needed_files_of_a_hub_model_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, load_format: str, weights: list[str]
) -> None:
    hub = FakeHub(monkeypatch, folder, HUB_FILES)
    source = resolve_model("owner/name", load_format=load_format, revision="v1", hf_token="t", download_dir="/cache")
    assert source == ModelSource("hf", str(folder))
    (download,) = hub.downloads
    small = ["config.json", "tokenizer.json", "tokenizer.model.v3", "merges.txt", "model.safetensors.index.json"]
    assert sorted(download.pop("allow_patterns")) == sorted(small + weights)
    assert download == {"local_files_only": False, "revision": "v1", "cache_dir": "/cache", "token": "t"}


def test_ignore_patterns_exclude_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub = FakeHub(monkeypatch, folder, HUB_FILES)
    resolve_model("owner/name", ignore_patterns="*.safetensors")
    assert "pytorch_model.bin" in hub.downloads[0]["allow_patterns"]


def test_without_network_the_cache_is_used_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = FakeHub(monkeypatch, folder, ConnectionError("no route to host"))
    with pytest.raises(TacoValidationError, match="cannot be downloaded: no route to host. Check the name .*`taco"):
        resolve_model("owner/name")
    hub.cached = folder
    assert resolve_model("owner/name") == ModelSource("hf", str(folder))
    assert "cannot be asked (ConnectionError): owner/name is what the cache has" in caplog.text
    caplog.clear()
    FakeHub(monkeypatch, folder, OfflineModeIsEnabled("HF_HUB_OFFLINE")).cached = folder
    assert resolve_model("owner/name") == ModelSource("hf", str(folder))
    assert not caplog.text, "that was asked for"


def test_a_hub_model_that_does_not_exist_or_has_no_weights_is_reported(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    response = SimpleNamespace(headers={}, request=None)  # the class differs between versions of huggingface_hub
    hub = FakeHub(monkeypatch, folder, RepositoryNotFoundError("404 Client Error", response=response))
    with pytest.raises(TacoValidationError, match=r"'owner/name' is no local folder.*does not exist"):
        resolve_model("owner/name")
    hub.files = ["config.json", "model.Q4.gguf"]
    with pytest.raises(TacoValidationError, match=r"has no weights.*model\.Q4\.gguf"):
        resolve_model("owner/name")


def test_the_plain_weight_file_wins_over_copies_and_training_state() -> None:
    names = ["model.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "pytorch_model.bin"]
    assert select_weight_files(names, "auto") == ["model.safetensors"]
    assert select_weight_files(["training_args.bin", "pytorch_model.bin", "optimizer.bin"], "auto") == [
        "pytorch_model.bin"
    ]
    assert select_weight_files(["consolidated.safetensors", "sub/model.safetensors"], "auto") == []


def test_overrides_replace_fields(folder: Path) -> None:
    config = load_hf_config(ModelSource("hf", str(folder)), hf_overrides={"num_hidden_layers": 1, "new": "x"})
    assert config.num_hidden_layers == 1 and config.new == "x" and config.hidden_size == 64
    assert config.name_or_path == str(folder)


def test_an_override_function_gets_the_configuration(folder: Path) -> None:
    def override(config: PretrainedConfig) -> PretrainedConfig:
        config.num_hidden_layers = 5
        return config

    assert load_hf_config(ModelSource("hf", str(folder)), hf_overrides=override).num_hidden_layers == 5


@pytest.mark.parametrize("old_format", [False, True])
def test_rope_overrides_go_where_the_model_keeps_its_rope(folder: Path, old_format: bool) -> None:
    fields = json.loads((folder / "config.json").read_text())
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 64
    if old_format:
        del fields["rope_parameters"]
        fields |= {"rope_theta": 500000.0, "rope_scaling": llama3}
    else:
        fields["rope_parameters"] = llama3 | {"rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(fields))
    source = ModelSource("hf", str(folder))
    assert load_hf_config(source).rope_parameters == llama3 | {"rope_theta": 500000.0}
    config = load_hf_config(source, hf_overrides={"rope_theta": 7.0})
    assert config.rope_parameters == llama3 | {"rope_theta": 7.0}
    config = load_hf_config(source, hf_overrides={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}


def test_rope_overrides_of_gemma_change_its_global_layers(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3_text", **BASE, head_dim=16).save_pretrained(tmp_path)
    source = ModelSource("hf", str(tmp_path))
    config = load_hf_config(source, hf_overrides={"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}


def test_unusable_configurations_are_reported(folder: Path) -> None:
    source = ModelSource("hf", str(folder))
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(TacoValidationError, match="cannot be used.*unheard-of"):
        load_hf_config(source)
    (folder / "config.json").unlink()
    with pytest.raises(TacoValidationError, match=r"no config\.json"):
        load_hf_config(source)


def test_generation_config_is_a_plain_dictionary(folder: Path) -> None:
    assert load_generation_config(ModelSource("hf", str(folder))) == {}
    file = folder / "generation_config.json"
    file.write_text('{"temperature": 0.6, "eos_token_id": [2, 3]}')
    assert load_generation_config(folder) == {"temperature": 0.6, "eos_token_id": [2, 3]}
    for text, message in (("{", "not valid JSON"), ("[]", "not hold a JSON object")):
        file.write_text(text)
        with pytest.raises(TacoValidationError, match=message):
            load_generation_config(str(folder))


def test_end_of_sequence_of_the_config_stands_in_for_a_missing_generation_config(folder: Path) -> None:
    source = ModelSource("hf", str(folder))
    nested = Gemma3Config(text_config={"eos_token_id": 5}, eos_token_id=None)
    assert load_generation_config(source, LlamaConfig(eos_token_id=[2, 3])) == {"eos_token_id": [2, 3]}
    assert load_generation_config(source, nested) == {"eos_token_id": 5}
    assert load_generation_config(source, LlamaConfig(eos_token_id=None)) == {}
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    assert load_generation_config(source, LlamaConfig(eos_token_id=2)) == {"top_k": 3}


def test_finding_a_model_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, taco.models.loader.source, taco.models.loader.checkpoint, taco.models.loader.gguf_config\n"
    code += "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
