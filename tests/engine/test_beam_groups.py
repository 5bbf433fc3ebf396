"""Beam groups with the real scheduler, above a worker that notices every wrong block."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taco.engine.beam_groups import BeamGroups
from taco.engine.beam_search import BeamOptions
from taco.engine.input_processor import ProcessedRequest
from taco.request import FINISH_REASONS, Request, RequestStatus
from taco.sampling_params import SamplingParams
from tests.engine.beam_reference import search_everything, search_with_early_stopping
from tests.engine.simulated_worker import VOCAB, SimulatedWorker, expected_output, next_logprobs
from tests.engine.test_scheduler import MAX_MODEL_LEN, make_request, make_scheduler

EOS, STOP = 3, 5


class Texts:
    """Stands for the output processor: the letter of token i is chr(97 + i)."""

    def __init__(self):
        self.results = {}

    def completes_stop(self, prompt_token_ids, token_ids, params):
        text = "".join(chr(97 + token) for token in token_ids)
        return any(text.endswith(stop) for stop in params.stop)

    def replace_sequences(self, request_id, requests):
        assert request_id not in self.results
        self.results[request_id] = requests


class Engine:
    """The loop of the engine, with beams and ordinary requests."""

    def __init__(self, num_ahead=0, **config):
        self.scheduler = make_scheduler(**config)
        self.worker = SimulatedWorker(self.scheduler, num_ahead)
        self.texts = Texts()
        self.groups = BeamGroups(self.scheduler, self.texts, rank_counts_ties=False)
        self.updates = {}

    def add(self, request, options):
        self.worker.salts[request.request_id] = request.cache_salt
        request.num_candidates = options.num_candidates
        processed = ProcessedRequest(
            request.request_id,
            None,
            request.prompt_token_ids,
            request.params,
            children=[request],
            beam_options=options,
        )
        self.groups.add(processed)

    def step(self):
        for update in self.groups.process(self.worker.step()):
            if update.request.status.is_finished:
                self.updates[update.request.request_id] = update
        self.scheduler.check_integrity()

    def run(self, limit=5000):
        for _ in range(limit):
            if not self.scheduler.num_unfinished:
                break
            self.step()
        assert not self.scheduler.num_unfinished, "requests starve"
        while self.worker.queue:
            self.step()

    def check_nothing_is_left(self):
        self.scheduler.blocks.begin_step()
        assert self.scheduler.blocks.pool.num_free == self.scheduler.blocks.num_usable_blocks
        assert self.scheduler.blocks.host.num_free == self.scheduler.blocks.host.num_blocks
        assert not self.groups._group_of and not self.groups._running and not self.groups._waiting
        assert self.groups._num_rows == 0

    def outputs(self, name):
        return [result.output_token_ids for result in self.texts.results[name]]


def options(width=3, **changes):
    defaults = {
        "num_returned": width,
        "length_penalty": 1.0,
        "score_includes_prompt": True,
        "early_stopping": "never",
        "ends_anywhere": True,
        "num_candidates": min(2 * width, VOCAB),
        "keeps_candidates": False,
    }
    return BeamOptions(width=width, **(defaults | changes))


def expected(request, options):
    def model(tokens):
        return next_logprobs(tokens, request.cache_salt)

    ends = set(request.stop_token_ids) | ({request.eos_token_id} - {None})
    arguments = (request.prompt_token_ids, model, options.width, request.max_total_tokens - request.num_prompt_tokens)
    scoring = {
        "length_penalty": options.length_penalty,
        "score_includes_prompt": options.score_includes_prompt,
        "eos": request.eos_token_id,
    }
    if options.ends_anywhere:
        found = search_everything(*arguments, ends, **scoring)
    else:
        found = search_with_early_stopping(*arguments, ends, options.early_stopping, **scoring)
    return [output for output, _ in found[: options.num_returned]]


@st.composite
def scenarios(draw):
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    smallest = -(-MAX_MODEL_LEN // block_size) + 1
    chunked = draw(st.booleans())
    config = {
        "block_size": block_size,
        "num_blocks": smallest + draw(st.integers(0, 30)),
        "num_host_blocks": draw(st.sampled_from([0, 3, 200])),
        "caching": draw(st.booleans()),
        "max_num_seqs": draw(st.sampled_from([1, 2, 4, 12])),
        "max_num_batched_tokens": draw(st.integers(1, 20)) if chunked else MAX_MODEL_LEN,
        "enable_chunked_prefill": chunked,
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "preemption_mode": draw(st.sampled_from([None, "recompute", "swap"])),
    }
    requests = draw(
        st.lists(
            st.tuples(
                st.integers(1, 18).flatmap(lambda n: st.integers(0, 2).map(lambda last: [*range(n - 1), last])),
                st.integers(1, 10),  # max_tokens
                st.integers(0, 4),  # beam width; 0: an ordinary request
                st.integers(0, 2),  # priority
                st.booleans(),  # has an end of sequence
                st.sampled_from([None, "salt"]),
                st.integers(0, 8),  # step at which it arrives
                st.sampled_from([None, None, None, 1, 6]),  # steps after which it is aborted
                st.sampled_from(["everything", True, False, "never"]),  # early stopping
            ),
            min_size=1,
            max_size=6,
        )
    )
    return config, requests, draw(st.integers(0, 2))


@given(scenarios())
@settings(max_examples=250)
def test_every_search_finds_what_it_would_find_alone(scenario):
    config, specs, num_ahead = scenario
    engine = Engine(num_ahead, **config)
    arrivals, aborts, requests = {}, {}, []
    for index, (prompt, max_tokens, width, priority, stops, salt, arrival, abort, stopping) in enumerate(specs):
        request = make_request(
            str(index),
            prompt,
            max_tokens,
            priority=priority,
            arrival_time=float(index),
            eos_token_id=EOS if stops else None,
            stop_token_ids=frozenset({STOP}) if stops else frozenset(),
            cache_salt=salt,
        )
        how = None
        if width and stopping == "everything":
            how = options(width)
        elif width:
            how = options(width, ends_anywhere=False, early_stopping=stopping, num_returned=(width + 1) // 2)
        arrivals.setdefault(arrival, []).append((request, how))
        if abort is not None:
            aborts.setdefault(arrival + abort, []).append(request.request_id)
        requests.append((request, how))
    for step in range(16):
        for request, how in arrivals.get(step, []):
            if how is None:
                engine.worker.add(request)
            else:
                engine.add(request, how)
        for name in aborts.get(step, []):
            engine.groups.abort(name)
            if name in engine.scheduler.requests:
                engine.scheduler.finish(engine.scheduler.requests[name], RequestStatus.FINISHED_ABORTED)
            engine.scheduler.check_integrity()
        engine.step()
    engine.run()
    aborted = {name for names in aborts.values() for name in names}
    for request, how in requests:
        if how is None:
            if request.status != RequestStatus.FINISHED_ABORTED:
                assert request.output_token_ids == expected_output(request)
        elif request.request_id in engine.texts.results:
            assert engine.outputs(request.request_id) == expected(request, how)
        else:
            assert request.request_id in aborted
    engine.check_nothing_is_left()


def test_beams_share_full_blocks_and_copy_only_partly_filled_ones():
    engine = Engine(max_num_seqs=4, block_size=4)
    request = make_request("a", range(6), 9)
    engine.add(request, options(4))
    engine.step()
    beams = engine.scheduler.running
    assert [beam.num_tokens for beam in beams] == [7, 7, 7, 7]
    assert len({beam.block_ids[0] for beam in beams}) == 1 and len({beam.block_ids[1] for beam in beams}) == 4
    assert engine.worker.num_computed == 6
    engine.run()
    # Nothing is computed twice: the prompt once, and each beam's token once a step but the last one.
    assert engine.worker.num_computed == 6 + 8 * 4
    assert 0 < engine.worker.num_copies < 8 * 4
    assert engine.outputs("a") == expected(request, options(4))


def test_a_full_last_block_is_shared_without_a_copy():
    engine = Engine(max_num_seqs=4, block_size=4)
    engine.add(make_request("a", range(7), 9), options(4))
    engine.step()
    engine.step()
    before = engine.worker.num_copies
    assert all(beam.num_computed_tokens == 8 for beam in engine.scheduler.running)
    engine.step()
    assert engine.worker.num_copies == before


def test_prefix_caching_is_not_needed_to_share():
    counts = []
    for caching in (True, False):
        engine = Engine(max_num_seqs=4, caching=caching)
        engine.add(make_request("a", range(10), 9), options(4))
        engine.run()
        counts.append((engine.worker.num_computed, engine.worker.num_copies))
    assert counts[0] == counts[1] and counts[0][0] == 10 + 8 * 4


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted_beams_come_back(mode):
    engine = Engine(max_num_seqs=6, num_blocks=12, num_host_blocks=100, preemption_mode=mode, block_size=4)
    requests = [make_request(str(i), [i, 1, 2, 3, 4, 5], 20) for i in range(2)]
    for request in requests:
        engine.add(request, options(3))
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    for request in requests:
        assert engine.outputs(request.request_id) == expected(request, options(3))
    results = [engine.texts.results[request.request_id][0] for request in requests]
    assert sum(result.num_preemptions for result in results) == engine.scheduler.num_preemptions


def test_searches_wait_until_there_is_a_row_for_each_beam():
    engine = Engine(max_num_seqs=8, num_blocks=200)
    for i in range(3):
        engine.add(make_request(str(i), [i, 1, 2], 6), options(4))
    seen = 0
    while engine.scheduler.num_unfinished:
        seen = max(seen, len(engine.scheduler.requests))
        engine.step()
    assert seen == 8 and engine.scheduler.num_preemptions == 0
    assert set(engine.texts.results) == {"0", "1", "2"}


def test_more_beams_than_rows_take_turns():
    engine = Engine(max_num_seqs=2, num_host_blocks=100, preemption_mode="swap")
    request = make_request("a", [1, 2, 3], 6)
    engine.add(request, options(4))
    engine.run()
    assert engine.outputs("a") == expected(request, options(4))


def test_how_sequences_end():
    engine = Engine(max_num_seqs=4)
    request = make_request(
        "a", [1, 2, 3], 6, eos_token_id=EOS, stop_token_ids=frozenset({STOP}), params={"stop": ["ab"]}
    )
    engine.add(request, options(4, num_candidates=VOCAB))
    engine.run()
    ends = set()
    for result in engine.texts.results["a"]:
        output = result.output_token_ids
        reason = FINISH_REASONS[result.status]
        if output[-1] == EOS:
            assert (reason, result.stop_reason) == ("stop", None)
        elif output[-1] == STOP:
            assert (reason, result.stop_reason) == ("stop", STOP)
        else:
            # The output processor looks for the text itself.
            assert (reason, result.stop_reason) == ("length", None)
            assert len(output) == 6 or output[-2:] == [0, 1]
        assert not any(token in (EOS, STOP) for token in output[:-1])
        ends.add(output[-1])
    assert len(ends) > 1


def test_a_beam_that_fails_ends_its_search_alone():
    engine = Engine(max_num_seqs=6)
    bad, good = make_request("bad", [1, 2, 3], 6), make_request("good", [4, 5, 6], 6)
    for request in (bad, good):
        engine.add(request, options(3))
    engine.step()
    plan = engine.scheduler.schedule()
    result = engine.worker.execute(plan)
    failing = [beam for beam in engine.scheduler.running if beam.prompt_token_ids == [1, 2, 3]][1]
    result.errors[plan.rows.index(failing.row)] = "not finite"
    [update] = engine.groups.process(engine.scheduler.update(plan, result))
    assert update.request is engine.texts.results["bad"][0]
    assert (update.request.status, update.request.error) == (RequestStatus.FINISHED_ERROR, "not finite")
    engine.run()
    assert engine.outputs("good") == expected(good, options(3))
    engine.check_nothing_is_left()


def test_an_aborted_search_makes_room_for_the_next():
    engine = Engine(max_num_seqs=4)
    requests = [make_request(str(i), [i, 1], 6) for i in range(3)]
    for request in requests:
        engine.add(request, options(4))
    engine.step()
    engine.groups.abort("1")  # waits
    engine.groups.abort("0")  # runs
    engine.groups.abort("unknown")
    engine.run()
    assert set(engine.texts.results) == {"2"}
    assert engine.outputs("2") == expected(requests[2], options(4))
    engine.check_nothing_is_left()


def test_a_fork_is_a_request_of_its_own():
    request = Request("a", [1, 2], SamplingParams(), 10, num_candidates=4, cache_salt="x", seed=3, priority=2)
    request.token_ids.append(5)
    request.block_ids, request.block_hashes, request.row = [4], [b""], 3
    request.num_computed_tokens = request.num_sent_tokens = 3
    fork = request.fork("b")
    assert (fork.token_ids, fork.prompt_token_ids, fork.seed, fork.priority) == ([1, 2, 5], [1, 2], 3, 2)
    assert (fork.block_ids, fork.row, fork.num_computed_tokens, fork.num_sent_tokens) == ([], -1, 0, 0)
    fork.token_ids.append(6)
    fork.block_ids.append(7)
    fork.block_hashes.append(b"")
    assert (request.token_ids, request.block_ids, request.block_hashes) == ([1, 2, 5], [4], [b""])
