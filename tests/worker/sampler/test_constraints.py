from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .oracle import make_sampler, new_row

VOCAB = 8


def ruled_out(fields: dict, prompt: list[int] | None = None, output: list[int] | None = None) -> set[int]:
    """Tokens at -inf when all logits are 0."""
    new = new_row(0, prompt, output, logprobs=-1, **fields)
    rows = make_sampler(VOCAB, [new]).sample([0], torch.zeros(1, VOCAB)).logprob_rows()[0]
    return set(rows.token_ids[0][np.isneginf(rows.logprobs[0])].tolist())


def test_allowed_tokens_rule_out_all_others() -> None:
    assert ruled_out({"allowed_token_ids": [2, 5, 5]}) == {0, 1, 3, 4, 6, 7}


def test_ids_that_the_model_cannot_generate_are_skipped() -> None:
    assert ruled_out({"allowed_token_ids": [2, VOCAB, 10**6]}) == set(range(VOCAB)) - {2}
    assert ruled_out({"bad_words_token_ids": [[VOCAB], [1], [-1]]}) == {1}
    assert ruled_out({"min_tokens": 1, "stop_token_ids": [3, VOCAB + 3]}) == {3}
    assert ruled_out({"logit_bias": {VOCAB: 1.0, 4: -np.inf}}) == set()
    assert ruled_out({"repetition_penalty": 2.0, "no_repeat_ngram_size": 1}, [1, VOCAB, 10**6], [VOCAB]) == {1}


@pytest.mark.parametrize(
    ("words", "output", "expected"),
    [
        ([[3]], [], {3}),
        ([[3], [4]], [3], {3, 4}),
        ([[1, 2]], [], set()),
        ([[1, 2]], [1], {2}),
        ([[1, 2]], [1, 3], set()),
        ([[1, 2, 3]], [2], set()),
        ([[1, 2, 3]], [1, 2], {3}),
        ([[1, 2, 3], [2, 4], [5]], [0, 1, 2], {3, 4, 5}),
        ([[1, 1, 1]], [1, 1, 1], {1}),
        ([[2, 3, 4]], [3], set()),  # the 2 before it stands in the prompt, which does not count
    ],
)
def test_bad_words_rule_out_their_last_token_after_the_others(
    words: list[list[int]], output: list[int], expected: set[int]
) -> None:
    assert ruled_out({"bad_words_token_ids": words}, [6, 2], output) == expected


def test_bad_words_follow_the_output_forwards_and_backwards() -> None:
    sampler = make_sampler(VOCAB, [new_row(0, temperature=0, bad_words_token_ids=[[1, 2], [3, 4, 5]])])

    def banned_now() -> list[int]:
        found = []
        for token_id in range(VOCAB):
            logits = torch.zeros(1, VOCAB)
            logits[0, token_id] = 1.0
            if sampler.sample([0], logits).token_ids.item() != token_id:
                found.append(token_id)
            sampler.rollback(0, 1)
        return found

    sampler.append([0], [[3, 1]])
    assert banned_now() == [2]
    sampler.append([0], [[3, 4]])
    assert banned_now() == [5]
    sampler.rollback(0, 2)
    assert banned_now() == [2]


@pytest.mark.parametrize("num_outputs", [0, 1, 2, 3])
def test_min_tokens_rules_out_stop_tokens_until_enough_are_generated(num_outputs: int) -> None:
    expected = {1, 6} if num_outputs < 2 else set()
    assert ruled_out({"min_tokens": 2, "stop_token_ids": [1, 6]}, [3, 3, 3], [3] * num_outputs) == expected


def test_min_tokens_without_stop_tokens_is_free() -> None:
    assert ruled_out({"min_tokens": 2}) == set()


def test_min_tokens_of_one_row_leaves_the_others_alone() -> None:
    rows = [
        new_row(0, output=[1], temperature=0, min_tokens=1, stop_token_ids=[2]),
        new_row(1, output=[1], temperature=0, min_tokens=2, stop_token_ids=[2]),
        new_row(2, output=[1], temperature=0, stop_token_ids=[2]),
    ]
    logits = torch.zeros(3, VOCAB)
    logits[:, 2] = 1.0
    assert make_sampler(VOCAB, rows).sample([0, 1, 2], logits).token_ids.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("bias", "added"), [(2.5, 2.5), (100.0, 100.0), (-100.0, -100.0), (1e6, 100.0), (-1e6, -100.0)]
)
def test_logit_bias_is_clamped_and_added(bias: float, added: float) -> None:
    new = new_row(0, temperature=0, logprobs=-1, logit_bias={4: 0.0})
    new.params.logit_bias = {4: bias}  # past the parameters' own clamp
    rows = make_sampler(VOCAB, [new], logprobs_mode="processed_logits").sample([0], torch.ones(1, VOCAB)).logprob_rows()
    values = dict(zip(rows[0].token_ids[0].tolist(), rows[0].logprobs[0].tolist(), strict=True))
    assert values == {token_id: 1.0 + (added if token_id == 4 else 0.0) for token_id in range(VOCAB)}


@settings(deadline=None)
@given(
    size=st.integers(1, 5),
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    output=st.lists(st.integers(0, 3), max_size=12),
)
def test_ngrams_are_those_of_transformers(size: int, prompt: list[int], output: list[int]) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    scores = NoRepeatNGramLogitsProcessor(size)(torch.tensor([prompt + output]), torch.zeros(1, VOCAB))
    expected = set(scores[0].isneginf().nonzero().flatten().tolist())
    assert ruled_out({"no_repeat_ngram_size": size}, prompt, output) == expected


def test_ngrams_grow_token_by_token_without_touching_the_callers_list() -> None:
    new = new_row(0, [1, 2, 3, 1, 2], temperature=0, no_repeat_ngram_size=3)
    sampler = make_sampler(VOCAB, [new])
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4] = 2.0, 1.0
    assert sampler.sample([0], logits.clone()).token_ids.tolist() == [4]  # 1 2 3 was there
    sampler.append([0], [[4]])
    assert sampler.sample([0], logits.clone()).token_ids.tolist() == [3]
    assert new.token_ids == [1, 2, 3, 1, 2]


def test_a_row_without_a_feature_keeps_its_logits_bit_for_bit() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    changed = new_row(
        0, temperature=0.3, allowed_token_ids=[1], logit_bias={1: 5.0}, presence_penalty=1.0, no_repeat_ngram_size=1
    )
    rows = [changed, new_row(1, temperature=0, logprobs=-1)]
    found = make_sampler(VOCAB, rows, logprobs_mode="processed_logits").sample([0, 1], logits.clone()).logprob_rows()[1]
    assert np.array_equal(found.logprobs[0], logits[1].numpy()[found.token_ids[0]])
