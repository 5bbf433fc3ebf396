"""Beam search in the engine: the beams of a prompt are requests, which the scheduler knows as any others.

A beam's request is held after each step. When all beams of a prompt have their candidates, the search chooses: a beam
that goes on in one way goes on in its own request; for every further way its request is forked, which shares all full
blocks of the KV cache and copies the last one; the request of a beam that does not go on ends.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from taco.engine.beam_search import Beam, BeamSearch, Hypothesis, logprob_rows
from taco.engine.input_processor import ProcessedRequest
from taco.engine.parallel_sampling import child_ids
from taco.engine.scheduler import Scheduler
from taco.plan import Candidates
from taco.request import Request, RequestStatus, RequestUpdate
from taco.sampling_params import SamplingParams


class TextSide(Protocol):
    """What beam search needs of the output processor."""

    def completes_stop(self, prompt_token_ids: list[int], token_ids: list[int], params: SamplingParams) -> bool:
        """Whether the last one of some output tokens completes a stop string."""

    def replace_sequences(self, request_id: str, requests: list[Request]) -> None:
        """Exchanges the sequences of an unfinished request."""


class _Group:
    """The beams of one prompt."""

    def __init__(self, processed: ProcessedRequest, text_side: TextSide) -> None:
        assert processed.beam_options is not None
        self.request_id = processed.request_id
        self.options = processed.beam_options
        [root] = processed.children
        self.root = root
        params = root.params
        # Tokens that end a beam. Where a grammar lets nothing follow, the end of sequence ends even what ignores it.
        self.end_ids = root.stop_token_ids
        if root.grammar is not None:
            self.end_ids |= params.all_stop_token_ids

        def completes_stop(beam: Beam, token_id: int) -> bool:
            output = [*(earlier.token_id for earlier in beam.path()), token_id]
            return text_side.completes_stop(root.prompt_token_ids, output, params)

        self.search = BeamSearch(
            self.options,
            num_prompt_tokens=root.num_prompt_tokens,
            max_tokens=root.max_total_tokens - root.num_prompt_tokens,
            eos_token_id=root.eos_token_id,
            stop_token_ids=self.end_ids,
            completes_stop=completes_stop if params.stop else None,
        )
        self.requests = [root]  # of the search's beams, in their order
        self.candidates: dict[Request, Candidates] = {}  # of the step that is under way
        self.num_requests = 1  # that there ever were
        self.num_preemptions = 0


class BeamGroups:
    """Runs the beam searches of an engine; those that would not find a row for each beam wait.

    Args:
        scheduler: of the engine.
        text_side: its output processor.
        rank_counts_ties: see `taco.compat.Behaviour`.

    Attributes:
        num_steps: steps done, over all searches.
    """

    def __init__(self, scheduler: Scheduler, text_side: TextSide, rank_counts_ties: bool) -> None:
        self._scheduler = scheduler
        self._text_side = text_side
        self._rank_counts_ties = rank_counts_ties
        self._waiting: deque[_Group] = deque()
        self._running: dict[str, _Group] = {}
        self._group_of: dict[Request, _Group] = {}
        self._num_rows = 0  # kept for the searches that run
        self.num_steps = 0

    def add(self, processed: ProcessedRequest) -> None:
        """Enters a request; it starts at once if there is room."""
        self._waiting.append(_Group(processed, self._text_side))
        self._start()

    def abort(self, request_id: str) -> None:
        """Ends the search of a request; others ids are left alone."""
        group = self._running.get(request_id)
        if group is not None:
            self._end(group)
        else:
            self._waiting = deque(group for group in self._waiting if group.request_id != request_id)

    def clear(self) -> None:
        """Forgets every search, after the scheduler has forgotten its requests."""
        self._waiting.clear()
        self._running.clear()
        self._group_of.clear()
        self._num_rows = 0

    def process(self, updates: list[RequestUpdate]) -> list[RequestUpdate]:
        """Takes what a step did to beams, and lets them go on.

        Returns:
            The updates of all other requests, and those of the results of searches that are over.
        """
        if not self._group_of:
            return updates
        others = []
        for update in updates:
            request = update.request
            group = self._group_of.get(request)
            if group is None:
                if update.candidates is None:  # else of a search that an earlier update has ended
                    others.append(update)
            elif request.status == RequestStatus.FINISHED_ERROR:
                others += self._fail(group, request.error)
            elif update.candidates is not None:
                group.candidates[request] = update.candidates
                if len(group.candidates) == len(group.requests):
                    others += self._advance(group)
            else:
                others.append(update)  # log-probabilities of the prompt
        return others

    def _start(self) -> None:
        max_num_rows = self._scheduler.config.max_num_seqs
        while self._waiting:
            group = self._waiting[0]
            if self._running and self._num_rows + group.options.width > max_num_rows:
                break
            self._waiting.popleft()
            self._running[group.request_id] = group
            self._group_of[group.root] = group
            self._num_rows += group.options.width
            self._scheduler.add(group.root)

    def _advance(self, group: _Group) -> list[RequestUpdate]:
        requests = group.requests
        survivors = group.search.advance([group.candidates[request] for request in requests])
        group.candidates.clear()
        self.num_steps += 1
        if not survivors:
            return self._finish(group)
        parents = {index for index, _ in survivors}
        for index, request in enumerate(requests):
            if index not in parents:
                self._drop(group, request)
        group.requests = []
        for index, _ in survivors:
            request = requests[index]
            if index in parents:
                parents.remove(index)
            else:
                request = self._scheduler.fork(request, f"{group.request_id}/beam {group.num_requests}")
                group.num_requests += 1
                self._group_of[request] = group
            group.requests.append(request)
        for request, (_, token_id) in zip(group.requests, survivors, strict=True):
            self._scheduler.proceed(request, token_id)
        return []

    def _drop(self, group: _Group, request: Request) -> None:
        del self._group_of[request]
        group.num_preemptions += request.num_preemptions
        self._scheduler.finish(request, RequestStatus.FINISHED_ABORTED)

    def _end(self, group: _Group) -> None:
        """Ends all beams of a search, and starts searches that waited for their rows."""
        for request in group.requests:
            self._drop(group, request)
        del self._running[group.request_id]
        self._num_rows -= group.options.width
        self._start()

    def _fail(self, group: _Group, error: str | None) -> list[RequestUpdate]:
        self._end(group)
        [result] = self._results(group, 1)
        result.status = RequestStatus.FINISHED_ERROR
        result.error = error
        return [RequestUpdate(result, [])]

    def _finish(self, group: _Group) -> list[RequestUpdate]:
        self._end(group)
        found = group.search.best()
        return [
            self._complete(group, result, hypothesis)
            for result, hypothesis in zip(self._results(group, len(found)), found, strict=True)
        ]

    def _results(self, group: _Group, count: int) -> list[Request]:
        """Requests that stand for what is returned; they never run."""
        results = [group.root.fork(request_id) for request_id in child_ids(group.request_id, count)]
        for result in results:
            result.token_ids = group.root.prompt_token_ids.copy()
        results[0].num_preemptions = group.num_preemptions
        self._text_side.replace_sequences(group.request_id, results)
        return results

    def _complete(self, group: _Group, request: Request, hypothesis: Hypothesis) -> RequestUpdate:
        path = hypothesis.beam.path()
        token_ids = [beam.token_id for beam in path]
        request.token_ids += token_ids
        # Where a text ended it, the output processor finds that text again, and says so.
        request.status = RequestStatus.FINISHED_LENGTH
        if not hypothesis.reached_limit and token_ids[-1] == request.eos_token_id:
            request.status = RequestStatus.FINISHED_STOPPED
        elif not hypothesis.reached_limit and token_ids[-1] in group.end_ids:
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = token_ids[-1] if token_ids[-1] in request.stop_token_ids else None
        num_best = request.params.num_logprobs
        if num_best is None:
            return RequestUpdate(request, token_ids)
        num_best = group.options.num_candidates if num_best == -1 else num_best
        return RequestUpdate(request, token_ids, logprob_rows(path, num_best, self._rank_counts_ties))
