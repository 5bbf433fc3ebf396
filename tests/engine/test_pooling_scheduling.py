"""Pooling requests in the scheduler: integers only, and a worker that only keeps which tokens it has seen of a row."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taco.config import SchedulerConfig
from taco.engine.block_manager import BlockManager, UnlimitedBlockManager
from taco.engine.scheduler import Scheduler
from taco.plan import StepPlan, StepResult
from taco.pooling_params import PoolingParams
from taco.request import Request, RequestStatus


def make_request(name: str, prompt: list[int], *, accumulates: bool, priority: int = 0) -> Request:
    return Request(
        name,
        prompt,
        PoolingParams(task="embed", skip_reading_prefix_cache=accumulates),
        len(prompt) + 1,
        accumulates=accumulates,
        priority=priority,
    )


class PoolingWorker:
    """A result is the tokens whose computation the row has seen; those before its first were cached or swapped."""

    def __init__(self, scheduler: Scheduler, num_ahead: int) -> None:
        self.scheduler = scheduler
        self.num_ahead = num_ahead
        self.rows: dict[int, tuple[list[int], int, list[int]]] = {}  # tokens, number computed, tokens seen
        self.queue: deque[tuple[StepPlan, StepResult]] = deque()

    def step(self) -> list[tuple[Request, np.ndarray]]:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.queue.append((plan, self.execute(plan)))
        updates = []
        if self.queue and (plan is None or len(self.queue) > self.num_ahead):
            updates = self.scheduler.update(*self.queue.popleft())
        assert plan is not None or updates or self.queue or not self.scheduler.num_unfinished, "nothing moves"
        self.scheduler.check_integrity()
        return [(update.request, update.pooled) for update in updates if update.pooled is not None]

    def execute(self, plan: StepPlan) -> StepResult:
        for row in plan.removed_rows:
            del self.rows[row]
        for new in plan.new_rows:
            assert new.num_prompt_tokens == len(new.token_ids)
            self.rows[new.row] = (new.token_ids, new.num_computed_tokens, [])
        assert sum(plan.num_tokens) <= self.scheduler.config.max_num_batched_tokens
        result = StepResult(plan.step_id, [[] for _ in plan.samples])
        for index, (number, count) in enumerate(zip(plan.rows, plan.num_tokens, strict=True)):
            tokens, start, seen = self.rows[number]
            seen += tokens[start : start + count]
            self.rows[number] = (tokens, start + count, seen)
            assert (index in plan.samples) == (start + count == len(tokens))
        for place, index in enumerate(plan.samples):
            result.pooled[place] = np.array(self.rows[plan.rows[index]][2])
        return result

    def run(self) -> dict[str, list[int]]:
        results = {}
        for _ in range(5000):
            for request, pooled in self.step():
                assert request.status == RequestStatus.FINISHED_STOPPED and request.request_id not in results
                results[request.request_id] = pooled.tolist()
            if not self.scheduler.num_unfinished:
                return results
        raise AssertionError("requests starve")


def make_scheduler(blocks: BlockManager, **config: object) -> Scheduler:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 40}
    return Scheduler(SchedulerConfig(**(defaults | config)), blocks)  # type: ignore[arg-type]


rows = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.booleans(), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


@given(rows, st.integers(0, 1), st.sampled_from([None, "swap", "recompute"]), st.sampled_from(["fcfs", "priority"]))
def test_what_is_made_of_all_tokens_sees_each_of_them_once(requests, num_ahead, preemption_mode, policy):
    blocks = BlockManager(num_blocks=12, num_host_blocks=9, block_size=4)
    scheduler = make_scheduler(blocks, policy=policy, preemption_mode=preemption_mode, long_prefill_token_threshold=5)
    for index, (prompt, accumulates, priority) in enumerate(requests):
        scheduler.add(make_request(str(index), prompt, accumulates=accumulates, priority=priority))
    results = PoolingWorker(scheduler, num_ahead).run()
    for index, (prompt, accumulates, _) in enumerate(requests):
        seen = results[str(index)]
        assert seen == (prompt if accumulates else prompt[-len(seen) :]) and seen
    blocks.begin_step()  # lets go of the sources of copies
    assert blocks.pool.num_free == 11


@given(rows, st.integers(0, 1), st.sampled_from(["fcfs", "priority"]))
def test_encoders_are_granted_everything_and_compute_prompts_whole(requests, num_ahead, policy):
    scheduler = make_scheduler(
        UnlimitedBlockManager(), max_num_batched_tokens=40, enable_chunked_prefill=False, policy=policy
    )
    for index, (prompt, _, priority) in enumerate(requests):
        scheduler.add(make_request(str(index), prompt, accumulates=True, priority=priority))
    worker = PoolingWorker(scheduler, num_ahead)
    assert worker.run() == {str(index): prompt for index, (prompt, _, _) in enumerate(requests)}
    assert scheduler.num_preemptions == 0 or policy == "priority"


def test_a_preempted_request_that_accumulates_is_not_swapped():
    def preempted(accumulates: bool) -> RequestStatus:
        blocks = BlockManager(num_blocks=12, num_host_blocks=9, block_size=4)
        scheduler = make_scheduler(blocks, policy="priority", max_num_seqs=1)
        worker = PoolingWorker(scheduler, 0)
        late = make_request("late", list(range(30)), accumulates=accumulates, priority=1)
        scheduler.add(late)
        worker.step()
        scheduler.add(make_request("urgent", [1], accumulates=True))
        worker.step()
        return late.status

    assert preempted(True) == RequestStatus.PREEMPTED
    assert preempted(False) == RequestStatus.SWAPPED


@pytest.mark.parametrize("error", ["it failed"])
def test_a_failed_row_has_no_result_and_harms_no_other(error):
    scheduler = make_scheduler(UnlimitedBlockManager())
    requests = [make_request(name, [1, 2], accumulates=True) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    updates = scheduler.update(plan, StepResult(plan.step_id, [[], []], errors={0: error}, pooled={1: np.zeros(2)}))
    assert [update.request.status for update in updates] == [
        RequestStatus.FINISHED_ERROR,
        RequestStatus.FINISHED_STOPPED,
    ]
    assert requests[0].error == error and not scheduler.num_unfinished
