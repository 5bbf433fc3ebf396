from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from taco.plan import Candidates, NewRow

from .oracle import edited, make_sampler, new_row

VOCAB = 50


def beam_row(row: int, num_candidates: int, **fields: Any) -> NewRow:
    new = new_row(row, **{"temperature": 0.0, **fields})
    new.num_candidates = num_candidates
    return new


def random_logits(num_rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(0)) * 3


def check(found: Candidates, logprobs: torch.Tensor, count: int) -> None:
    order = sorted(range(len(logprobs)), key=lambda token_id: (-float(logprobs[token_id]), token_id))[:count]
    assert found.token_ids.tolist() == order and found.token_ids.dtype == np.int32
    assert found.logprobs.tolist() == pytest.approx([float(logprobs[token_id]) for token_id in order], abs=1e-6)
    assert found.logprobs.dtype == np.float32


EDITS = {
    "repetition_penalty": 1.5,
    "logit_bias": {3: 4.0},
    "allowed_token_ids": list(range(0, VOCAB, 2)),
    "output": [4, 5],
    "temperature": 1.7,
}


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logprobs"])
def test_beam_search_scores_what_all_edits_leave(mode: str) -> None:
    rows = [
        beam_row(3, 8, use_beam_search=True, n=4),
        new_row(1, temperature=0.0, logprobs=2),
        beam_row(0, 4, use_beam_search=True, n=2, **(EDITS | {"temperature": 0.0})),
        beam_row(2, VOCAB + 9, use_beam_search=True, n=2),
    ]
    logits = random_logits(len(rows))
    output = make_sampler(VOCAB, rows, logprobs_mode=mode).sample([new.row for new in rows], logits.clone())
    found = output.candidate_rows()
    assert sorted(found) == [0, 2, 3] and sorted(output.logprob_rows()) == [1]
    for place, count in ((0, 8), (2, 4), (3, VOCAB)):
        check(found[place], edited(rows[place], logits[place]).log_softmax(-1), count)


def test_raw_log_probabilities_are_the_models_own_without_the_tokens_that_are_ruled_out() -> None:
    rows = [beam_row(0, 6, **EDITS), beam_row(1, 6)]
    logits = random_logits(2)
    for batch in ([0], [0, 1]):
        sampler = make_sampler(VOCAB, [rows[row] for row in batch], logprobs_mode="raw_logprobs")
        found = sampler.sample(batch, logits[batch].clone()).candidate_rows()
        raw = logits.log_softmax(-1)
        raw[0, 1::2] = -torch.inf
        for row in batch:
            check(found[row], raw[row], 6)


def test_processed_log_probabilities_follow_temperature_and_constraints() -> None:
    rows = [beam_row(0, 6, **EDITS)]
    logits = random_logits(1)
    found = make_sampler(VOCAB, rows).sample([0], logits.clone()).candidate_rows()
    check(found[0], edited(rows[0], logits[0]).log_softmax(-1), 6)


def test_tokens_that_are_ruled_out_come_last_with_no_probability() -> None:
    rows = [beam_row(0, 6, allowed_token_ids=[7, 9])]
    found = make_sampler(VOCAB, rows).sample([0], random_logits(1)).candidate_rows()[0]
    assert set(found.token_ids[:2].tolist()) == {7, 9}
    assert np.isfinite(found.logprobs[:2]).all() and (found.logprobs[2:] == -np.inf).all()


def test_candidates_do_not_depend_on_the_slices_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from taco.worker.sampler import sampler as sampler_module

    rows = [beam_row(row, 4 + row % 2) for row in range(7)]
    logits = random_logits(7)
    whole = make_sampler(VOCAB, rows).sample(range(7), logits.clone()).candidate_rows()
    monkeypatch.setattr(sampler_module, "BLOCK_ENTRIES_CPU", 3 * VOCAB)
    sliced = make_sampler(VOCAB, rows).sample(range(7), logits.clone()).candidate_rows()
    for row in range(7):
        assert whole[row].token_ids.tolist() == sliced[row].token_ids.tolist()
        assert whole[row].logprobs.tolist() == sliced[row].logprobs.tolist()


def test_the_tokens_that_the_host_chose_count_for_penalties() -> None:
    sampler = make_sampler(VOCAB, [beam_row(0, 5, use_beam_search=True, n=2, frequency_penalty=2.0)])
    logits = random_logits(1)
    first = sampler.sample([0], logits.clone()).candidate_rows()[0]
    chosen = int(first.token_ids[1])
    sampler.append([0], [[chosen]])
    second = sampler.sample([0], logits.clone()).candidate_rows()[0]
    penalised = logits[0].clone()
    penalised[chosen] -= 2.0
    check(second, penalised.log_softmax(-1), 5)
