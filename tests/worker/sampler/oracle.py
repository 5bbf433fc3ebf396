"""Sampling of one row, written down plainly, and helpers to build rows and samplers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch

from taco.plan import NewRow
from taco.sampling_params import SamplingParams, SamplingType
from taco.worker.sampler import Sampler
from taco.worker.sampler.random import uniform

CPU = torch.device("cpu")


def new_row(
    row: int,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    *,
    seed: int = 1,
    bad_words_token_ids: list[list[int]] | None = None,
    **fields: Any,
) -> NewRow:
    prompt = [1, 2, 3] if prompt is None else prompt
    params = SamplingParams(**{"max_tokens": None, **fields})
    params._bad_words_token_ids = bad_words_token_ids
    return NewRow(row, f"request {row}", prompt + (output or []), len(prompt), 0, [], params, seed)


def make_sampler(vocab_size: int, rows: list[NewRow], **options: Any) -> Sampler:
    sampler = Sampler(vocab_size=vocab_size, max_num_rows=64, device=CPU, **options)
    for new in rows:
        sampler.add(new)
    return sampler


def edited(new: NewRow, logits: torch.Tensor) -> torch.Tensor:
    """Logits [vocab] after all edits and the temperature."""
    params = new.params
    prompt, output = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
    logits = logits.clone()
    for processor in params.logits_processors or ():
        logits = processor(tuple(output), logits)
    values = logits.numpy()
    vocab = range(len(values))
    if params.allowed_token_ids:
        for token_id in set(vocab) - set(params.allowed_token_ids):
            values[token_id] = -np.inf
    for word in params.bad_words_token_ids or ():
        tail = output[len(output) - len(word) + 1 :] if len(output) >= len(word) - 1 else None
        if tail == word[:-1] and word[-1] in vocab:
            values[word[-1]] = -np.inf
    size = params.no_repeat_ngram_size
    if size:
        for token_id in vocab:
            ngrams = [tuple(new.token_ids[i : i + size]) for i in range(len(new.token_ids) - size + 1)]
            if (*new.token_ids[len(new.token_ids) - size + 1 :], token_id) in ngrams:
                values[token_id] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        values[token_id] += np.float32(bias)
    if len(output) < params.min_tokens:
        for token_id in params.all_stop_token_ids:
            values[token_id] = -np.inf
    counts = Counter(output)
    for token_id in vocab:
        value = values[token_id]
        if token_id in prompt or token_id in counts:
            penalty = np.float32(params.repetition_penalty)
            value = value / penalty if value > 0 else value * penalty
        value = value - np.float32(params.frequency_penalty) * np.float32(counts[token_id])
        values[token_id] = value - np.float32(params.presence_penalty) * np.float32(token_id in counts)
    if params.sampling_type is not SamplingType.GREEDY:
        values /= np.float32(params.temperature)
    return torch.from_numpy(values)


def kept_by_filters(params: SamplingParams, logits: torch.Tensor) -> tuple[set[int], float]:
    """What top-k, top-p and min-p leave of [vocab], and how close, in probability, the closest decision was."""
    values = logits.double().numpy()
    order = sorted(range(len(values)), key=lambda token_id: (-values[token_id], token_id))
    margin = math.inf
    if 0 < params.top_k < len(values):
        order = [token_id for token_id in order if values[token_id] >= values[order[params.top_k - 1]]]
    weights = np.exp(values - values.max())
    if params.top_p < 1:
        total = weights[order].sum()
        before = np.cumsum(weights[order]) - weights[order]
        margin = np.abs(before / total - params.top_p).min()
        order = [token_id for token_id, mass in zip(order, before, strict=True) if mass < params.top_p * total]
    if params.min_p:
        margin = min(margin, *(abs(weights[token_id] - params.min_p) for token_id in order))
        order = [token_id for token_id in order if weights[token_id] >= params.min_p]
    return set(order), margin


def could_be_drawn(new: NewRow, kept: set[int], logits: torch.Tensor, token_id: int) -> bool:
    """Whether the row's random number falls, within 1e-6, on this token in the running sum of what is left."""
    weights = np.exp(logits.double().numpy() - logits.max().item())
    weights[[other for other in range(len(weights)) if other not in kept]] = 0
    upto = np.cumsum(weights) / weights.sum()
    number = uniform(np.array([new.seed], np.uint64), np.array([len(new.token_ids)]))[0]
    start = upto[token_id - 1] if token_id else 0.0
    return weights[token_id] > 0 and start - 1e-6 <= number <= upto[token_id] + 1e-6


def log_probabilities(kept: set[int], logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy().copy()
    values[[other for other in range(len(values)) if other not in kept]] = -np.inf
    values -= values.max()
    return values - np.log(np.exp(values).sum())
