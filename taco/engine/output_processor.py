"""From new tokens to `RequestOutput`: text, stop strings, log-probabilities, and what is due when.

Stop strings are found here, as they need text; the engine then ends the request in the scheduler. Text that nobody can
see before the end, as there are no stop strings, is made at the end, in one go; log-probabilities when they are read.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from taco.config import TacoConfig
from taco.deferred import Deferred
from taco.engine.detokenizer import Detokenizer, TextStream, make_detokenizer
from taco.engine.input_processor import ProcessedRequest
from taco.engine.logprob_table import LogprobTable
from taco.engine.parallel_sampling import best
from taco.errors import TacoValidationError
from taco.outputs import CompletionOutput, RequestMetrics, RequestOutput
from taco.request import FINISH_REASONS, Request, RequestStatus, RequestUpdate
from taco.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from taco.plan import LogprobRows


@dataclass(slots=True)
class ProcessedOutputs:
    """What one step means to callers.

    Args:
        outputs: to hand out, by the order of their requests' updates.
        stopped: requests that met a stop string, and which; the scheduler is to end them.
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    stopped: list[tuple[Request, str]] = field(default_factory=list)


class _Sequence:
    """One sequence of a request: a completion in the making."""

    def __init__(self, request: Request, index: int, parent: _Parent, waits: bool) -> None:
        self.request = request
        self.index = index
        self.parent = parent
        # Nothing but the end matters, so tokens stay in the request until then.
        self.waits = waits
        self.stream: TextStream | None = None
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: LogprobTable | None = None
        self.cumulative_logprob: float | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.first_token_time = 0.0
        self.last_token_time = 0.0
        self.num_tokens_shown = 0  # by the last output handed out
        self.num_chars_shown = 0

    @property
    def score(self) -> float:
        """What `best_of` ranks by; a sample that failed is worse than any other."""
        assert self.cumulative_logprob is not None
        return -math.inf if self.finish_reason == "error" else self.cumulative_logprob


class _Parent:
    """One request of the caller."""

    def __init__(self, processed: ProcessedRequest) -> None:
        self.processed = processed
        self.params = processed.params
        self.streams = processed.params.output_kind is not RequestOutputKind.FINAL_ONLY
        self.sequences: list[_Sequence] = []
        self.num_unfinished = len(processed.children)
        self.prompt_logprobs: LogprobTable | None = None
        # float32 [num_rows, num_ids], of which the first `num_prompt_rows` are there
        self.prompt_token_id_logprobs: np.ndarray | None = None
        self.num_prompt_rows = 0
        self.error: str | None = None


class OutputProcessor:
    """Keeps the unfinished requests and turns updates into outputs.

    Args:
        config: of the engine.
        tokenizer: a Hugging Face tokenizer; None makes outputs without text.
    """

    def __init__(self, config: TacoConfig, tokenizer: Any) -> None:
        self._behaviour = config.behaviour
        self._detokenizer: Detokenizer | None = None if tokenizer is None else make_detokenizer(tokenizer)
        self._parents: dict[str, _Parent] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._ready: dict[str, RequestOutput] = {}  # of requests that were finished when they came

    @property
    def num_unfinished(self) -> int:
        """Requests whose last output has not been handed out."""
        return len(self._parents) + len(self._ready)

    def request_ids(self) -> list[str]:
        """Ids of the unfinished requests."""
        return [*self._parents, *self._ready]

    def child_ids(self, request_id: str) -> list[str]:
        """Ids of the sequences of an unfinished request, given its id or that of one of them; none for other ids."""
        parent = self._parents.get(request_id)
        if parent is None and request_id in self._sequences:
            parent = self._sequences[request_id].parent
        return [] if parent is None else [sequence.request.request_id for sequence in parent.sequences]

    def add(self, processed: ProcessedRequest) -> None:
        """Enters a request.

        Raises:
            TacoValidationError: its id is in use by an unfinished request.
        """
        request_id = processed.request_id
        ids = {request_id, *(child.request_id for child in processed.children)}
        if not ids.isdisjoint(self._parents) or not ids.isdisjoint(self._sequences) or request_id in self._ready:
            raise TacoValidationError(
                f"request_id {request_id!r} is in use by an unfinished request; choose another one.",
                parameter="request_id",
                value=request_id,
            )
        if processed.finished is not None:
            self._ready[request_id] = processed.finished
            return
        parent = _Parent(processed)
        if parent.params.prompt_logprobs is not None:
            parent.prompt_logprobs = self._prompt_table(processed.prompt_token_ids, parent.params)
        self._enter(parent, processed.children)
        self._parents[request_id] = parent

    def replace_sequences(self, request_id: str, requests: list[Request]) -> None:
        """Exchanges the sequences of an unfinished request for others, all of which are returned."""
        parent = self._parents[request_id]
        for sequence in parent.sequences:
            del self._sequences[sequence.request.request_id]
        parent.sequences = []
        parent.num_unfinished = parent.processed.num_returned = len(requests)
        self._enter(parent, requests)

    def _enter(self, parent: _Parent, requests: list[Request]) -> None:
        params = parent.params
        waits = not parent.streams and not params.stop
        for index, request in enumerate(requests):
            sequence = _Sequence(request, index, parent, waits)
            if not waits:
                sequence.stream = self._stream(parent.processed.prompt_token_ids, params)
            if params.num_logprobs is not None:
                sequence.logprobs = self._table(parent.processed.prompt_token_ids, params)
                sequence.cumulative_logprob = 0.0
            parent.sequences.append(sequence)
            self._sequences[request.request_id] = sequence

    def process(self, updates: list[RequestUpdate]) -> ProcessedOutputs:
        """Takes what one step did; requests that finish are forgotten."""
        processed = ProcessedOutputs()
        if self._ready:
            processed.outputs += self._ready.values()
            self._ready.clear()
        if not updates:
            return processed
        now = time.time()
        changed: dict[str, tuple[_Parent, list[_Sequence]]] = {}
        for update in updates:
            request = update.request
            sequence = self._sequences.get(request.request_id)
            if sequence is None or sequence.finish_reason is not None:
                continue  # ended by a stop string; a step in flight still computed it
            parent = sequence.parent
            if update.prompt_logprobs is not None:
                assert parent.prompt_logprobs is not None
                parent.prompt_logprobs.append(update.prompt_logprobs)
            if update.prompt_token_id_logprobs is not None:
                _take_prompt_rows(parent, *update.prompt_token_id_logprobs)
            finished = request.status.is_finished
            if update.new_token_ids:
                sequence.last_token_time = now
                if not sequence.first_token_time:
                    sequence.first_token_time = now
                if sequence.waits:
                    if sequence.logprobs is not None and update.logprobs is not None:
                        sequence.logprobs.append(update.logprobs)
                    if not finished:
                        continue
            elif request.status != RequestStatus.FINISHED_ERROR:
                continue  # a part of the prompt; if the request has finished, its last tokens are in a later update
            stop = self._advance(sequence, update, finished)
            if stop is not None:
                if not finished:
                    processed.stopped.append((request, stop))
                self._finish(sequence, "stop", stop)
            elif finished:
                self._finish(sequence, FINISH_REASONS[request.status], request.stop_reason)
                if request.status == RequestStatus.FINISHED_ERROR:
                    parent.error = request.error
            if sequence.finish_reason is not None or (parent.streams and self._is_due(sequence)):
                changed.setdefault(parent.processed.request_id, (parent, []))[1].append(sequence)
        for parent, sequences in changed.values():
            finished = parent.num_unfinished == 0
            if finished or parent.streams:
                processed.outputs.append(self._output(parent, sequences, now))
            if finished:
                self._forget(parent)
        return processed

    def abort_all(self) -> None:
        """Forgets every request."""
        self._parents.clear()
        self._sequences.clear()
        self._ready.clear()

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once.

        Args:
            request_id: its id, or that of one of its sequences.

        Returns:
            Its output so far, with finish_reason "abort" where it was not finished; None for an unknown id.
        """
        if (ready := self._ready.pop(request_id, None)) is not None:
            return ready
        parent = self._parents.get(request_id)
        if parent is None:
            sequence = self._sequences.get(request_id)
            if sequence is None:
                return None
            parent = sequence.parent
        for sequence in parent.sequences:
            if sequence.finish_reason is None:
                if sequence.waits:
                    self._catch_up(sequence, hides_last=False)
                self._finish(sequence, "abort", None)
        output = self._output(parent, parent.sequences, time.time())
        self._forget(parent)
        return output

    # One sequence

    def _advance(self, sequence: _Sequence, update: RequestUpdate, finished: bool) -> str | None:
        """Takes the new tokens of a sequence, or all of one that waited; returns the stop string that they complete."""
        request = sequence.request
        # The text of the token that ended the sequence is not part of the output.
        ended_by_token = finished and request.status == RequestStatus.FINISHED_STOPPED
        hides_last = ended_by_token and not request.params.include_stop_str_in_output
        if sequence.waits:
            self._catch_up(sequence, hides_last)
            return None
        num_searched = len(update.new_token_ids) - (ended_by_token and self._behaviour.ending_token_beats_stop_string)
        return self._take(sequence, update.new_token_ids, update.logprobs, hides_last, num_searched)

    def _catch_up(self, sequence: _Sequence, hides_last: bool) -> None:
        token_ids = sequence.request.output_token_ids
        params = sequence.request.params
        if sequence.logprobs is not None:
            # A step that failed may have left tokens without them.
            token_ids = token_ids[: len(sequence.logprobs)]
            _add_up(sequence, 0)
        sequence.token_ids = token_ids
        if self._detokenizer is not None and params.detokenize:
            sequence.text = self._detokenizer.decode(
                sequence.parent.processed.prompt_token_ids,
                token_ids[:-1] if hides_last else token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )

    def _take(
        self,
        sequence: _Sequence,
        token_ids: list[int],
        logprobs: LogprobRows | None,
        hides_last: bool,
        num_searched: int,
    ) -> str | None:
        """Appends tokens, up to one of the first `num_searched` that completes a stop string, which is returned."""
        num_known = len(sequence.token_ids)
        stop = self._take_text(sequence, token_ids, len(token_ids) - hides_last, num_searched)
        if sequence.logprobs is not None and logprobs is not None:
            sequence.logprobs.append(logprobs[: len(sequence.token_ids) - num_known])
            _add_up(sequence, num_known)
        return stop

    def _take_text(self, sequence: _Sequence, token_ids: list[int], num_shown: int, num_searched: int) -> str | None:
        params = sequence.request.params
        assert isinstance(params.stop, list)
        stream = sequence.stream
        for i, token_id in enumerate(token_ids):
            sequence.token_ids.append(token_id)
            if stream is None or i >= num_shown:
                continue
            piece = stream.append(token_id)
            if not piece:
                continue
            sequence.text += piece
            if params.stop and i < num_searched and self._may_stop(len(sequence.token_ids), params):
                found = find_stop(sequence.text, len(piece), params.stop, self._behaviour.stop_string_order)
                if found is not None:
                    stop, start = found
                    end = start + len(stop) if params.include_stop_str_in_output else start
                    sequence.text = sequence.text[:end]
                    return stop
        return None

    def _finish(self, sequence: _Sequence, reason: str, stop_reason: int | str | None) -> None:
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        sequence.parent.num_unfinished -= 1

    def _is_due(self, sequence: _Sequence) -> bool:
        """Whether a streaming request wants to see the new tokens of an unfinished sequence now."""
        num_tokens = len(sequence.token_ids)
        interval = sequence.request.params.stream_interval or 1
        return sequence.num_tokens_shown == 0 or num_tokens - sequence.num_tokens_shown >= interval

    def _forget(self, parent: _Parent) -> None:
        del self._parents[parent.processed.request_id]
        for sequence in parent.sequences:
            del self._sequences[sequence.request.request_id]
        parent.sequences = []  # no cycle of references stays behind

    def _stream(self, prompt_token_ids: list[int], params: SamplingParams) -> TextStream | None:
        if self._detokenizer is None or not params.detokenize:
            return None
        return self._detokenizer.stream(
            prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )

    def _may_stop(self, num_tokens: int, params: SamplingParams) -> bool:
        """Whether a stop string counts that the last of so many tokens completes."""
        return num_tokens >= params.min_tokens + self._behaviour.min_tokens_end_before_stop_strings

    def completes_stop(self, prompt_token_ids: list[int], token_ids: list[int], params: SamplingParams) -> bool:
        """Whether the last one of some output tokens completes a stop string."""
        if self._detokenizer is None or not self._may_stop(len(token_ids), params):
            return False
        assert isinstance(params.stop, list)
        before, text = (
            self._detokenizer.decode(
                prompt_token_ids,
                part,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            for part in (token_ids[:-1], token_ids)
        )
        num_new = len(text) - len(before)
        return num_new > 0 and find_stop(text, num_new, params.stop, self._behaviour.stop_string_order) is not None

    # Log-probabilities

    def _table(self, prompt_token_ids: list[int], params: SamplingParams, **options: Any) -> LogprobTable:
        """For the log-probabilities of what follows a prompt."""
        # What each candidate would add to the text, or what it reads like.
        in_context = self._behaviour.decoded_token_in_context
        options.setdefault("others_are_ranked", params.logprob_token_ids is None)
        return LogprobTable(
            self._stream(prompt_token_ids, params),
            flat=params.flat_logprobs,
            skips_special_tokens=in_context and params.skip_special_tokens,
            in_context=in_context,
            **options,
        )

    def _prompt_table(self, prompt_token_ids: list[int], params: SamplingParams) -> LogprobTable:
        table = self._table([], params, others_are_ranked=True, capacity=len(prompt_token_ids) - 1)
        table.skip_first(prompt_token_ids[0])
        return table

    # Outputs

    def _output(self, parent: _Parent, changed: list[_Sequence], now: float) -> RequestOutput:
        processed = parent.processed
        params = parent.params
        prompt_logprobs: Any = None
        if parent.prompt_logprobs is not None and len(parent.prompt_logprobs) >= len(processed.prompt_token_ids) - 1:
            prompt_logprobs = Deferred(parent.prompt_logprobs.positions)
        rows = parent.prompt_token_id_logprobs
        if rows is not None and parent.num_prompt_rows < len(rows):
            rows = None  # ended before the end of its prompt
        if params.output_kind is RequestOutputKind.DELTA:
            completions = [self._delta(sequence) for sequence in changed]
        else:
            completions = [self._whole(sequence) for sequence in self._chosen(parent)]
            if processed.num_returned < len(parent.sequences):
                for rank, completion in enumerate(completions):
                    completion.index = rank
        return RequestOutput(
            processed.request_id,
            processed.prompt,
            processed.prompt_token_ids,
            prompt_logprobs,
            completions,
            parent.num_unfinished == 0,
            _metrics(parent, now),
            lora_request=processed.lora_request,  # type: ignore[arg-type]
            num_cached_tokens=max(0, parent.sequences[0].request.num_cached_tokens),
            prompt_token_id_logprobs=rows,
            error=parent.error,
        )

    def _chosen(self, parent: _Parent) -> list[_Sequence]:
        return best(parent.sequences, parent.processed.num_returned, lambda sequence: sequence.score)

    def _num_chars_ready(self, sequence: _Sequence) -> int:
        """How much text can be shown: the last characters may become part of a stop string."""
        if sequence.finish_reason is not None:
            return len(sequence.text)
        return max(0, len(sequence.text) - sequence.request.params.output_text_buffer_length)

    def _whole(self, sequence: _Sequence) -> CompletionOutput:
        finished = sequence.finish_reason is not None
        sequence.num_tokens_shown = len(sequence.token_ids)
        hidden = sequence.parent.processed.hides_logprobs
        logprobs: Any = None
        if sequence.logprobs is not None and not hidden:
            if finished:
                sequence.logprobs.trim()
            make = sequence.logprobs.positions
            logprobs = Deferred(make if finished else partial(make, 0, len(sequence.logprobs)))
        return CompletionOutput(
            index=sequence.index,
            text=sequence.text[: self._num_chars_ready(sequence)],
            token_ids=sequence.token_ids if finished else sequence.token_ids.copy(),
            cumulative_logprob=None if hidden else sequence.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            lora_request=sequence.parent.processed.lora_request,  # type: ignore[arg-type]
        )

    def _delta(self, sequence: _Sequence) -> CompletionOutput:
        first_token, first_char = sequence.num_tokens_shown, sequence.num_chars_shown
        logprobs: Any = None
        if sequence.logprobs is not None:
            logprobs = Deferred(partial(sequence.logprobs.positions, first_token, len(sequence.logprobs)))
        sequence.num_tokens_shown = len(sequence.token_ids)
        sequence.num_chars_shown = self._num_chars_ready(sequence)
        return CompletionOutput(
            index=sequence.index,
            text=sequence.text[first_char : sequence.num_chars_shown],
            token_ids=sequence.token_ids[first_token:],
            cumulative_logprob=sequence.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            lora_request=sequence.parent.processed.lora_request,  # type: ignore[arg-type]
        )


def _take_prompt_rows(parent: _Parent, first_token: int, logprobs: np.ndarray) -> None:
    """Enters log-probabilities in the places of prompt token `first_token` and those after it."""
    params = parent.params
    assert isinstance(params.prompt_logprob_token_ids, np.ndarray)
    if parent.prompt_token_id_logprobs is None:
        parent.prompt_token_id_logprobs = np.empty(params.prompt_logprob_token_ids.shape, np.float32)
    start = first_token - 1 - (params.prompt_logprob_start or 0)
    end = start + len(logprobs)
    parent.prompt_token_id_logprobs[start:end] = logprobs
    parent.num_prompt_rows = max(parent.num_prompt_rows, end)


def _add_up(sequence: _Sequence, first: int) -> None:
    """Adds the log-probabilities of the tokens from `first` on to the sequence's sum."""
    assert sequence.logprobs is not None and sequence.cumulative_logprob is not None
    for value in sequence.logprobs.own_logprobs(first):
        sequence.cumulative_logprob += value


def find_stop(text: str, num_new: int, stops: list[str], order: str) -> tuple[str, int] | None:
    """Finds a stop string that ends in the last `num_new` characters of a text.

    Args:
        order: of several, the first in the "list", or the one whose end comes "earliest".

    Returns:
        The stop string and where it begins, or None.
    """
    found: tuple[str, int] | None = None
    for stop in stops:
        start = text.find(stop, max(0, len(text) - num_new - len(stop) + 1))
        if start < 0:
            continue
        if order == "list":
            return stop, start
        if found is None or start + len(stop) < found[1] + len(found[0]):
            found = stop, start
    return found


def _metrics(parent: _Parent, now: float) -> RequestMetrics:
    requests = [sequence.request for sequence in parent.sequences]
    arrival_time = requests[0].arrival_time
    scheduled = min((r.first_scheduled_time for r in requests if r.first_scheduled_time), default=None)
    first_token = min((s.first_token_time for s in parent.sequences if s.first_token_time), default=None)
    return RequestMetrics(
        arrival_time=arrival_time,
        last_token_time=max(sequence.last_token_time for sequence in parent.sequences),
        first_scheduled_time=scheduled,
        first_token_time=first_token,
        time_in_queue=None if scheduled is None else scheduled - arrival_time,
        finished_time=now if parent.num_unfinished == 0 else None,
        num_generation_tokens=sum(len(sequence.token_ids) for sequence in parent.sequences),
        num_preemptions=sum(request.num_preemptions for request in requests),
        is_watermarked=bool(parent.params.watermarking),
        is_watermark_skipped=parent.params._watermarking_skipped,
    )
