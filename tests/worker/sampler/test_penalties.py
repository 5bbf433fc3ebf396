from __future__ import annotations

import numpy as np
import pytest
import torch

from .oracle import make_sampler, new_row


def processed(new_fields: dict, prompt: list[int], output: list[int], logits: list[float]) -> list[float]:
    new = new_row(0, prompt, output, temperature=0, logprobs=-1, **new_fields)
    sampler = make_sampler(len(logits), [new], logprobs_mode="processed_logits")
    rows = sampler.sample([0], torch.tensor([logits])).logprob_rows()[0]
    return rows.logprobs[0, 1:][np.argsort(rows.token_ids[0, 1:])].tolist()


def test_repetition_penalty_counts_prompt_and_output_and_minds_the_sign() -> None:
    found = processed({"repetition_penalty": 2.0}, [0, 1, 1], [2, 2], [4.0, -4.0, 1.0, 3.0, -3.0])
    assert found == [2.0, -8.0, 0.5, 3.0, -3.0]


def test_frequency_penalty_counts_the_output_alone() -> None:
    assert processed({"frequency_penalty": 0.5}, [0, 0, 1], [1, 1, 2], [1.0, 1.0, 1.0, 1.0]) == [1.0, 0.0, 0.5, 1.0]


def test_presence_penalty_is_taken_once() -> None:
    assert processed({"presence_penalty": 0.5}, [0, 0, 1], [1, 1, 2], [1.0, 1.0, 1.0, 1.0]) == [1.0, 0.5, 0.5, 1.0]


def test_negative_penalties_favour_repetition() -> None:
    fields = {"presence_penalty": -0.5, "frequency_penalty": -1.0, "repetition_penalty": 0.5}
    assert processed(fields, [0], [1, 1], [1.0, 1.0, 1.0]) == [2.0, 4.5, 1.0]


@pytest.mark.parametrize("token_id", [0, 3])
def test_a_token_that_is_taken_back_counts_no_more(token_id: int) -> None:
    """0 stands in the prompt too, 3 in the output alone."""
    fields = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 2.0}
    sampler = make_sampler(
        5, [new_row(0, [0, 1], temperature=0, logprobs=-1, **fields)], logprobs_mode="processed_logits"
    )

    def logits_now() -> list[float]:
        rows = sampler.sample([0], torch.full((1, 5), 8.0)).logprob_rows()[0]
        sampler.rollback(0, 1)  # the token just drawn
        return rows.logprobs[0, 1:][np.argsort(rows.token_ids[0, 1:])].tolist()

    before = logits_now()
    assert before == [4.0, 4.0, 8.0, 8.0, 8.0]
    sampler.append([0], [[token_id, 4, token_id]])
    grown = logits_now()
    assert grown[token_id] == 2.0 and grown[4] == 2.5
    sampler.rollback(0, 1)
    assert logits_now()[token_id] == 2.5
    sampler.rollback(0, 2)
    assert logits_now() == before


@pytest.mark.parametrize(("more", "back", "left"), [([4, 4], 1, [4]), ([1], 1, []), ([1, 4], 2, [])])
def test_taking_back_one_of_several_occurrences_leaves_the_others(more: list[int], back: int, left: list[int]) -> None:
    """The 4 is the last token to have been seen first; the 1 stands in the prompt, whose penalty stays."""
    fields = {"repetition_penalty": 2.0, "frequency_penalty": 0.5}
    sampler = make_sampler(
        5, [new_row(0, [0, 1], temperature=0, logprobs=-1, **fields)], logprobs_mode="processed_logits"
    )
    sampler.append([0], [more])
    sampler.rollback(0, back)
    rows = sampler.sample([0], torch.full((1, 5), 8.0)).logprob_rows()[0]
    found = rows.logprobs[0, 1:][np.argsort(rows.token_ids[0, 1:])].tolist()
    assert found == processed(fields, [0, 1], left, [8.0] * 5)


def test_penalties_of_many_rows_with_long_histories() -> None:
    vocab, num_rows = 3000, 40
    generator = np.random.default_rng(0)
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(0))
    histories = [generator.integers(0, vocab, generator.integers(0, 2000)).tolist() for _ in range(num_rows)]
    rows = [
        new_row(i, [1], history, temperature=0, logprobs=0, repetition_penalty=1.2, frequency_penalty=0.1)
        for i, history in enumerate(histories)
    ]
    output = make_sampler(vocab, rows).sample(range(num_rows), logits.clone())
    for row, history in enumerate(histories):
        counts = torch.bincount(torch.tensor(history, dtype=torch.int64), minlength=vocab)
        seen = counts > 0
        seen[1] = True
        values = torch.where(seen, torch.where(logits[row] > 0, logits[row] / 1.2, logits[row] * 1.2), logits[row])
        assert output.token_ids[row] == (values - 0.1 * counts).argmax()
