from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from taco import LLM
from taco.errors import UnsupportedFeatureError
from taco.models.loader import checkpoint as checkpoint_module
from taco.models.loader import gguf_checkpoint, gguf_file
from taco.models.loader.apply import load_weights
from taco.models.loader.checkpoint import TensorInfo, WeightEntry
from taco.models.loader.gguf_checkpoint import GGUFCheckpoint
from taco.models.loader.opening import open_checkpoint
from taco.models.loader.source import ModelSource, gguf_header, headers_kept, load_hf_config
from tests.models.loader.tiny_gguf import MODELS, finish, state_dict, tiny_model, write_model

LLAMA = SimpleNamespace(model_type="llama", num_attention_heads=4, num_key_value_heads=2)
NAME = "model.layers.0.mlp.up_proj.weight"
UNQUANTISED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def dequantisable(type_: GGMLQuantizationType) -> bool:
    if type_.name in ("F16", "F32", "F64", "BF16"):
        return False
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), dtype=np.uint8), type_)
    except NotImplementedError:
        return False
    return True


DEQUANTISABLE = [type_ for type_ in GGMLQuantizationType if dequantisable(type_)]
assert len(DEQUANTISABLE) >= 20


def write_tensor(path: Path, data: np.ndarray, type_: GGMLQuantizationType) -> GGUFCheckpoint:
    """A file with one tensor, `data` being its bytes in rows."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=type_)
    finish(writer)
    return GGUFCheckpoint(str(path), LLAMA)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_converted_model_has_its_original_names_shapes_and_values(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    path = tmp_path / "model.gguf"
    finish(write_model(path, model))
    source = ModelSource("gguf", str(path))
    checkpoint = open_checkpoint(source, load_format="auto", hf_config=load_hf_config(source))
    expected = state_dict(model)
    assert checkpoint.infos() == {name: TensorInfo(tuple(t.shape), "float32") for name, t in expected.items()}
    for name, tensor in expected.items():
        # 1 + w is rounded when the file is written
        exact = model_type != "gemma3_text" or not name.endswith("norm.weight")
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0 if exact else 2e-7)
    checkpoint.close()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_converted_model_fills_a_model(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    path = tmp_path / "model.gguf"
    finish(write_model(path, model))
    source = ModelSource("gguf", str(path))
    config = load_hf_config(source)
    with torch.device("meta"):
        loaded = type(model)(config)
    entries = [WeightEntry(name, tuple(t.shape), name) for name, t in state_dict(model).items()]
    load_weights(
        loaded,
        entries,
        open_checkpoint(source, load_format="gguf", hf_config=config),
        device="cpu",
        dtype=torch.float32,
    )
    for name, tensor in state_dict(model).items():
        assert torch.equal(loaded.get_parameter(name), tensor), name


@pytest.mark.parametrize("type_", DEQUANTISABLE, ids=lambda type_: type_.name)
def test_every_type_that_gguf_dequantises_is_read(tmp_path: Path, type_: GGMLQuantizationType) -> None:
    block_size, block_bytes = GGML_QUANT_SIZES[type_]
    rows, columns = 48, 768
    rng = np.random.default_rng(0)
    try:
        data = quants.quantize(rng.standard_normal((rows, columns), dtype=np.float32), type_)
    except NotImplementedError:
        data = rng.integers(0, 60, (rows, columns // block_size * block_bytes), dtype=np.uint8)
    checkpoint = write_tensor(tmp_path / "model.gguf", data, type_)
    assert checkpoint.infos() == {NAME: TensorInfo((rows, columns), type_.name)}
    tensor = checkpoint.read(NAME)
    assert tensor.dtype == torch.float32 and tensor.shape == (rows, columns)
    np.testing.assert_array_equal(tensor.numpy(), quants.dequantize(data, type_))
    checkpoint.close()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64]
)
def test_unquantised_tensors_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    type_ = GGMLQuantizationType[UNQUANTISED.get(dtype, f"I{dtype.itemsize * 8}")]
    tensor = (torch.randn(6, 32) * 10).to(dtype)
    raw = tensor.view(torch.uint8).numpy() if dtype == torch.bfloat16 else tensor.numpy()
    checkpoint = write_tensor(tmp_path / "model.gguf", raw, type_)
    assert checkpoint.infos() == {NAME: TensorInfo((6, 32), str(dtype).removeprefix("torch."))}
    assert torch.equal(checkpoint.read(NAME), tensor)
    checkpoint.close()


@pytest.mark.parametrize("columns", [64, 256, 96])
def test_blocks_make_up_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(checkpoint_module, "BLOCK_BYTES", 40 * columns * 4)
    monkeypatch.setattr(gguf_checkpoint, "_PIECE", 12 * columns)
    data = quants.quantize(np.random.default_rng(0).standard_normal((130, columns)), GGMLQuantizationType.Q4_0)
    checkpoint = write_tensor(tmp_path / "model.gguf", data, GGMLQuantizationType.Q4_0)
    blocks = list(checkpoint.read_blocks(NAME))
    assert [start for start, _ in blocks] == [0, 40, 80, 120]
    assert torch.equal(torch.cat([block for _, block in blocks]), checkpoint.read(NAME))
    np.testing.assert_array_equal(checkpoint.read(NAME).numpy(), quants.dequantize(data, GGMLQuantizationType.Q4_0))
    checkpoint.close()


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="Q8_K"):
        write_tensor(tmp_path / "model.gguf", np.zeros((4, 292), dtype=np.uint8), GGMLQuantizationType.Q8_K)


def test_a_model_type_without_names_is_refused(tmp_path: Path) -> None:
    finish(gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama"))
    with pytest.raises(UnsupportedFeatureError, match="opt.*gemma3_text, gpt2, llama"):
        GGUFCheckpoint(str(tmp_path / "model.gguf"), SimpleNamespace(model_type="opt"))


def test_tensors_that_the_architecture_does_not_have_keep_their_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    finish(write_model(path, tiny_model("llama"), blk__0__attn_q_norm__weight=np.ones(16, dtype=np.float32)))
    checkpoint = GGUFCheckpoint(str(path), LLAMA)
    assert "blk.0.attn_q_norm.weight" in checkpoint.infos()
    checkpoint.close()


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma3_path"])
def test_real_weights_are_those_of_transformers(request: pytest.FixtureRequest, fixture: str) -> None:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("accelerate", reason="transformers needs accelerate to load GGUF files")
    path: Path = request.getfixturevalue(fixture)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    source = ModelSource("gguf", str(path))
    checkpoint = open_checkpoint(source, load_format="auto", hf_config=load_hf_config(source))
    expected = state_dict(model)
    assert checkpoint.infos().keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    checkpoint.close()


def test_loading_a_model_reads_its_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    finish(write_model(path, tiny_model("llama")))
    reads = []
    read = gguf_file.read_gguf_header
    monkeypatch.setattr(gguf_file, "read_gguf_header", lambda path: reads.append(path) or read(path))
    LLM(str(path), device="cpu", dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 20).close()
    assert reads == [str(path)]
    # Nothing is kept: the file may have been replaced by another model.
    finish(write_model(path, tiny_model("llama", num_hidden_layers=1)))
    config = load_hf_config(ModelSource("gguf", str(path)))
    assert config.num_hidden_layers == 1 and len(reads) == 2
    with headers_kept():
        assert gguf_header(str(path)) is gguf_header(str(path))
        finish(write_model(path, tiny_model("llama", num_hidden_layers=3)))
        assert gguf_header(str(path)).get("block_count") == 3
