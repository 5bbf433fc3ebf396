"""Several samples of one prompt: each is a request of its own, the scheduler knows nothing of their kinship.

They share the prompt's blocks through the prefix cache. `best_of` runs more samples than it returns and keeps those
with the highest summed log-probability.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

from taco.random_keys import mix_seed
from taco.sampling_params import SamplingParams

T = TypeVar("T")


def child_ids(request_id: str, num_samples: int) -> list[str]:
    """Ids of the sequences of a request; its own if there is only one."""
    if num_samples == 1:
        return [request_id]
    return [f"{index}_{request_id}" for index in range(num_samples)]


def child_seeds(seed: int, num_samples: int) -> list[int]:
    """Keys of the random numbers of each sample, see `taco.random_keys.mix_seed`."""
    return [mix_seed(seed, index) for index in range(num_samples)]


def without_prompt_logprobs(params: SamplingParams) -> SamplingParams:
    """Parameters of the samples after the first, which need not compute the prompt's log-probabilities again.

    Returns:
        `params` itself if it asks for none.
    """
    if params.first_scored_position is None:
        return params
    params = copy.copy(params)
    params.prompt_logprobs = params.prompt_logprob_token_ids = params.prompt_logprob_start = None
    return params


def best(samples: Sequence[T], num_returned: int, cumulative_logprob: Callable[[T], float]) -> list[T]:
    """The `num_returned` best samples, best first; earlier ones win ties. All of them stay in order."""
    if num_returned >= len(samples):
        return list(samples)
    return sorted(samples, key=cumulative_logprob, reverse=True)[:num_returned]
