from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.engine.beam_search import Beam, BeamOptions, BeamSearch, logprob_rows
from taco.plan import Candidates
from tests.engine.beam_reference import search_everything, search_with_early_stopping
from tests.engine.simulated_worker import VOCAB, next_logprobs

EOS = 3


def candidates_of(logprobs, count):
    logprobs = np.array(logprobs, np.float32)
    best = np.argsort(-logprobs, kind="stable")[:count]
    return Candidates(best.astype(np.int32), logprobs[best])


def options(width=2, **changes):
    defaults = {
        "num_returned": width,
        "length_penalty": 1.0,
        "score_includes_prompt": False,
        "early_stopping": False,
        "ends_anywhere": False,
        "num_candidates": 2 * width,
        "keeps_candidates": False,
    }
    return BeamOptions(width=width, **(defaults | changes))


def run(prompt, search, num_candidates, model=next_logprobs):
    """The outputs and scores found, and the number of steps."""
    outputs = [[]]
    while search.beams:
        survivors = search.advance([candidates_of(model(prompt + output), num_candidates) for output in outputs])
        outputs = [[*outputs[index], token] for index, token in survivors]
        assert outputs == [[beam.token_id for beam in beam.path()] for beam in search.beams]
    found = []
    for hypothesis in search.best():
        output = [beam.token_id for beam in hypothesis.beam.path()]
        sums = itertools.accumulate(model(prompt + output[:i])[token] for i, token in enumerate(output))
        assert [beam.cumulative_logprob for beam in hypothesis.beam.path()] == pytest.approx(list(sums))
        found.append((output, hypothesis.score))
    return found


def check(found, expected):
    assert [output for output, _ in found] == [output for output, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected])


@st.composite
def searches(draw):
    has_eos = draw(st.booleans())
    return {
        "prompt": draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)),
        "width": draw(st.integers(1, 5)),
        "max_tokens": draw(st.integers(1, 9)),
        "eos": EOS if has_eos else None,
        "ends": ({EOS} if has_eos else set()) | draw(st.sampled_from([set(), {5}])),
        "length_penalty": draw(st.sampled_from([0.0, 0.6, 1.0, 2.0, -1.0])),
        "score_includes_prompt": draw(st.booleans()),
    }


def make_search(spec, width, max_tokens, **changes):
    settings = {name: spec[name] for name in ("length_penalty", "score_includes_prompt")}
    return BeamSearch(
        options(width, **settings, **changes),
        num_prompt_tokens=len(spec["prompt"]),
        max_tokens=max_tokens,
        eos_token_id=spec["eos"],
        stop_token_ids=frozenset(spec["ends"] - {spec["eos"]}),
    )


@given(searches())
def test_finds_what_an_exhaustive_bookkeeping_of_all_ends_finds(spec):
    search = make_search(spec, spec["width"], spec["max_tokens"], ends_anywhere=True, early_stopping="never")
    check(run(spec["prompt"], search, 2 * spec["width"]), search_everything(next_logprobs=next_logprobs, **spec))


@given(searches(), st.sampled_from([True, False, "never"]))
def test_finds_what_a_plain_search_with_early_stopping_finds(spec, early_stopping):
    search = make_search(spec, spec["width"], spec["max_tokens"], early_stopping=early_stopping)
    expected = search_with_early_stopping(next_logprobs=next_logprobs, early_stopping=early_stopping, **spec)
    check(run(spec["prompt"], search, 2 * spec["width"]), expected)


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
@settings(max_examples=5)
def test_a_beam_as_wide_as_the_tree_finds_the_best_sequences_of_all(prompt):
    width = VOCAB**3
    search = BeamSearch(options(width, length_penalty=0.0), num_prompt_tokens=len(prompt), max_tokens=3)
    outputs = [list(output) for output in itertools.product(range(VOCAB), repeat=3)]
    sums = [sum(next_logprobs(prompt + output[:i])[output[i]] for i in range(3)) for output in outputs]
    found = run(prompt, search, VOCAB)
    assert sorted(output for output, _ in found) == outputs
    assert [score for _, score in found] == sorted(sums, reverse=True)


def test_a_search_for_everything_stops_when_nothing_can_become_better():
    search = BeamSearch(
        options(1, ends_anywhere=True, early_stopping="never", length_penalty=0.0),
        num_prompt_tokens=1,
        max_tokens=100,
        eos_token_id=EOS,
    )

    def model(tokens):
        return [-5.0] * EOS + [-0.1] + [-5.0] * (VOCAB - EOS - 1)

    assert [output for output, _ in run([0], search, 2, model)] == [[EOS]]
    assert search.num_steps == 1


@pytest.mark.parametrize(
    ("early_stopping", "expected"), [(True, [[EOS]]), (False, [[0, EOS]]), ("never", [[0, 1, 1, 1]])]
)
def test_what_early_stopping_waits_for(early_stopping, expected):
    def model(tokens):
        likely = {(9,): {0: -0.9, EOS: -1.0}, (9, 0): {EOS: -0.4, 1: -0.6}}.get(tuple(tokens), {1: -0.01})
        return [likely.get(token, -50.0) for token in range(VOCAB)]

    # Scores, by length: -1.0 after one token; then -1.3 / 2, before -1.5 / 2 of what goes on; in the end -1.52 / 4.
    search = BeamSearch(options(1, early_stopping=early_stopping), num_prompt_tokens=1, max_tokens=4, eos_token_id=EOS)
    assert [output for output, _ in run([9], search, 2, model)] == expected


def test_tokens_that_are_ruled_out_continue_nothing():
    search = BeamSearch(options(3), num_prompt_tokens=1, max_tokens=2)
    logprobs = np.array([-0.5, -math.inf, -math.inf], np.float32)
    ids = np.array([4, 0, 1], np.int32)
    assert search.advance([Candidates(ids, logprobs)]) == [(0, 4)]
    assert search.advance([Candidates(ids, logprobs)]) == []
    assert [[beam.token_id for beam in hypothesis.beam.path()] for hypothesis in search.best()] == [[4, 4]]


def test_texts_end_sequences_as_tokens_do():
    asked = []

    def completes_stop(beam, token_id):
        asked.append(([earlier.token_id for earlier in beam.path()], token_id))
        return token_id == 2

    search = BeamSearch(options(1), num_prompt_tokens=1, max_tokens=5, completes_stop=completes_stop)
    search.advance([Candidates(np.array([1, 2], np.int32), np.array([-0.5, -1.0], np.float32))])
    assert asked == [([], 1), ([], 2)]
    # The second best ended: as the best one might still become better, the search goes on.
    assert [hypothesis.beam.token_id for hypothesis in search.best()] == [2]
    assert [beam.token_id for beam in search.beams] == [1]


def test_an_extreme_length_penalty_overflows_nothing():
    for penalty in (-1e4, 1e4):
        search = BeamSearch(options(2, length_penalty=penalty), num_prompt_tokens=1, max_tokens=3)
        assert len(run([1], search, 4)) == 2


def test_log_probabilities_of_a_path_are_made_of_its_candidates():
    first = Candidates(np.array([7, 5, 9], np.int32), np.array([-0.5, -0.5, -2.0], np.float32))
    second = Candidates(np.array([1, 2, 3], np.int32), np.array([-0.125, -3.0, -4.0], np.float32))
    root = Beam(None, -1, 0.0, None)
    one = Beam(root, 5, -0.5, first)
    two = Beam(one, 3, -4.5, second)
    rows = logprob_rows(two.path(), 2, rank_counts_ties=False)
    assert rows.token_ids.tolist() == [[5, 7, 5], [3, 1, 2]]
    assert rows.logprobs.tolist() == [[-0.5, -0.5, -0.5], [-4.0, -0.125, -3.0]]
    assert rows.ranks.tolist() == [1, 3]
    assert logprob_rows(two.path(), 2, rank_counts_ties=True).ranks.tolist() == [2, 3]
