"""Embeddings of a real model, all-MiniLM-L6-v2, against what sentence-transformers computes by definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from taco import LLM
from tests.conftest import fetch

pytestmark = pytest.mark.real_model

TEXTS = [
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "",
    "Ünïcödé, 漢字 and emoji 🎉.",
    "word " * 700,
]


@pytest.fixture(scope="module")
def minilm_path() -> Path:
    return fetch("minilm")


@pytest.fixture(scope="module")
def expected(minilm_path: Path) -> np.ndarray:
    """Mean of the hidden states over the mask, normalised; texts are truncated to max_seq_length."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    model = AutoModel.from_pretrained(minilm_path, dtype=torch.float32).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()


def test_vectors_equal_those_of_sentence_transformers(minilm_path: Path, expected: np.ndarray) -> None:
    with LLM(str(minilm_path), dtype="float32") as llm:
        assert llm.model_config.task == "embed" and llm.model_config.max_model_len == 256
        vectors = llm.embed(TEXTS, output="numpy", truncate_prompt_tokens=-1, use_tqdm=False)
        scores = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS[1:3], use_tqdm=False)]
    np.testing.assert_allclose(vectors, expected, atol=1e-5, rtol=0)
    assert scores[0] > 0.6 > 0.2 > scores[1]


def test_bfloat16_keeps_the_order_of_similarities(minilm_path: Path, expected: np.ndarray) -> None:
    with LLM(str(minilm_path), dtype="bfloat16") as llm:
        vectors = llm.embed(TEXTS, output="numpy", truncate_prompt_tokens=-1, use_tqdm=False)
    assert (vectors * expected).sum(1).min() > 0.999
