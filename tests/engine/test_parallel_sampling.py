from __future__ import annotations

from taco.engine.parallel_sampling import best, child_ids, child_seeds, without_prompt_logprobs
from taco.sampling_params import SamplingParams


def test_one_sample_has_the_requests_own_id() -> None:
    assert child_ids("r", 1) == ["r"]
    assert child_ids("r", 3) == ["0_r", "1_r", "2_r"]


def test_samples_have_different_seeds_that_do_not_depend_on_their_number() -> None:
    assert len(set(child_seeds(3, 100))) == 100
    assert child_seeds(3, 2) == child_seeds(3, 5)[:2]
    assert set(child_seeds(3, 5)).isdisjoint(child_seeds(4, 5))


def test_best_samples_come_first_and_earlier_ones_win_ties() -> None:
    scores = [-3.0, -1.0, -2.0, -1.0]
    assert best(range(4), 2, scores.__getitem__) == [1, 3]
    assert best(range(4), 3, scores.__getitem__) == [1, 3, 2]
    assert best(range(4), 4, scores.__getitem__) == [0, 1, 2, 3]  # nothing to choose, nothing to reorder


def test_only_params_with_prompt_logprobs_are_copied() -> None:
    plain = SamplingParams()
    assert without_prompt_logprobs(plain) is plain
    scored = SamplingParams(prompt_logprobs=0, temperature=0.5)
    copied = without_prompt_logprobs(scored)
    assert copied.prompt_logprobs is None and scored.prompt_logprobs == 0 and copied.temperature == 0.5
