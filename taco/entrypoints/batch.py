"""The rows of one call of `LLM`: checked together, fed to the engine as it has room, collected in their order."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from taco.engine.input_processor import ParamsCache, PreparedPrompt, ProcessedRequest, TokenizeOptions
from taco.engine.llm_engine import LLMEngine
from taco.engine.prefix_order import prefix_order
from taco.entrypoints.progress import Progress
from taco.errors import BatchValidationError, TacoError, TacoValidationError
from taco.interrupts import interrupts_deferred
from taco.outputs import RequestOutput
from taco.sampling_params import RequestOutputKind, SamplingParams

_ROWS_TOKENIZED_AT_ONCE = 1024


class Counter:
    """Numbers the requests of an `LLM`."""

    def __init__(self, start: int = 0) -> None:
        self.counter = start

    def __next__(self) -> int:
        number = self.counter
        self.counter += 1
        return number

    def reset(self) -> None:
        self.counter = 0


@dataclass(frozen=True)
class Columns:
    """What comes with the rows of a batch: a list has one element a row, any other object stands for all rows."""

    params: SamplingParams | Sequence[SamplingParams]
    lora_request: object
    priority: object

    def check_lengths(self, num_rows: int | None) -> None:
        """Raises TacoValidationError where a list does not fit `num_rows` prompts (None: their number is unknown)."""
        for name in ("params", "lora_request", "priority"):
            column = getattr(self, name)
            if not _is_list(column):
                continue
            if num_rows is None:
                raise TacoValidationError(
                    f"A list of {name} needs a list of prompts, as the number of prompts of an iterator is not known "
                    f"beforehand. Pass list(prompts), or one {name} for all.",
                    parameter=name,
                )
            if len(column) != num_rows:
                raise TacoValidationError(
                    f"The lengths of prompts and {name} must be the same. Got prompts ({num_rows}) and {name} "
                    f"({len(column)}).",
                    parameter=name,
                    value=len(column),
                )

    def num_samples(self, num_rows: int | None) -> int | None:
        """How many completions `num_rows` prompts get together; None if their number is unknown."""
        if num_rows is None:
            return None
        return sum(getattr(self.params_of(index), "n", 1) for index in range(num_rows))

    def params_of(self, index: int) -> object:
        return self.params[index] if _is_list(self.params) else self.params  # type: ignore[index]

    def lora_request_of(self, index: int) -> object:
        return self.lora_request[index] if _is_list(self.lora_request) else self.lora_request  # type: ignore[index]

    def priority_of(self, index: int) -> Any:
        return self.priority[index] if _is_list(self.priority) else self.priority  # type: ignore[index]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


# One row on its way to the engine: its index, what the caller passed, and what became of it.
Row = tuple[int, object, PreparedPrompt | TacoValidationError]


class Batch:
    """Checks rows, feeds the engine, collects outputs.

    Args:
        on_error: "raise" or "return", see `LLM.generate`.
        has_choice: the method has the argument `on_error`, which errors then recommend.
        max_unfinished: most sequences in the engine at a time.
        name_row: the name, for messages, of the row with an index.
    """

    def __init__(
        self,
        engine: LLMEngine,
        request_counter: Counter,
        columns: Columns,
        options: TokenizeOptions,
        *,
        on_error: str,
        has_choice: bool = True,
        max_unfinished: int | None = None,
        name_row: Callable[[int], object] = int,
    ) -> None:
        self._engine = engine
        self._request_counter = request_counter
        self._columns = columns
        self._options = options
        self._raises = on_error != "return"
        self._name_row = name_row
        self._has_choice = has_choice
        self._cache = ParamsCache()
        # Sequences (samples, not rows): enough to keep the device busy and to plan ahead; more would only cost memory.
        self._max_unfinished = max_unfinished or 2 * self._engine.scheduler_config.max_num_seqs + 1000

    def _prepare(self, prompts: list[object], first: int) -> list[PreparedPrompt | TacoValidationError]:
        indexes = range(first, first + len(prompts))
        return self._engine.input_processor.prepare_batch(
            prompts,
            [self._columns.params_of(index) for index in indexes],
            self._cache,
            self._options,
            priorities=[self._columns.priority_of(index) for index in indexes],
            lora_requests=[self._columns.lora_request_of(index) for index in indexes],
            output_kind=RequestOutputKind.FINAL_ONLY,
            first_row=first,
        )

    def prepare_all(self, prompts: Iterable[object], num_rows: int) -> Iterator[Row]:
        """Checks all rows, then hands them out, those that are to run earlier first, and forgets them one by one."""
        if self._raises and not _is_list(self._columns.params):
            # What is wrong with every row is said once.
            self._cache.get(self._engine.input_processor, self._columns.params, RequestOutputKind.FINAL_ONLY)
        rows: list[Row] = []
        errors: dict[int, TacoValidationError] = {}
        prompts = iter(prompts)
        while chunk := list(islice(prompts, _ROWS_TOKENIZED_AT_ONCE)):
            prepared = self._prepare(chunk, len(rows))
            for prompt, row in zip(chunk, prepared, strict=True):
                if isinstance(row, TacoValidationError):
                    errors[len(rows)] = row
                    rows.append((len(rows), prompt, row))
                else:
                    rows.append((len(rows), None, row))
        if errors and self._raises:
            if num_rows == 1:
                raise errors[0]
            messages = {index: str(error) for index, error in errors.items()}
            if not self._has_choice:
                raise BatchValidationError(messages, num_rows, "correct them")
            raise BatchValidationError(messages, num_rows)
        if self._engine.scheduler_config.policy == "priority":
            # The engine sees a part of the rows at a time, so its own queue cannot bring the urgent ones forward.
            rows.sort(key=lambda row: 0 if row[0] in errors else self._columns.priority_of(row[0]))
        else:
            rows = self._arranged(rows)
        return _drain(deque(rows))

    def _arranged(self, rows: list[Row]) -> list[Row]:
        """The rows in the order in which they cost least: encoders compute neighbours of the same length together."""
        if self._engine.model_config.is_encoder:
            return sorted(rows, key=lambda row: 0 if isinstance(row[2], TacoValidationError) else len(row[2].token_ids))
        return self._by_prefix(rows)

    def _by_prefix(self, rows: list[Row]) -> list[Row]:
        """The rows with those that share cached prefixes next to each other."""
        cache = self._engine.config.cache_config
        if not cache.enable_prefix_caching:
            return rows
        token_ids = [() if isinstance(row, TacoValidationError) else row.token_ids for _, _, row in rows]
        return [rows[place] for place in prefix_order(token_ids, cache.block_size)]

    def prepare_as_needed(self, prompts: Iterator[object]) -> Iterator[Row]:
        """Checks rows a chunk at a time, when the engine has room for them."""
        first = 0
        while chunk := list(islice(prompts, _ROWS_TOKENIZED_AT_ONCE)):
            prepared = self._prepare(chunk, first)
            rows = list(zip(range(first, first + len(chunk)), chunk, prepared, strict=True))
            for index, prompt, row in self._arranged(rows):
                if isinstance(row, TacoValidationError) and self._raises:
                    raise TacoValidationError(
                        f"Row {self._name_row(index)} is not valid, and the rows after it were not run; pass "
                        f'on_error="return" to run them: {row}',
                        parameter=row.parameter,
                        value=row.value,
                    )
                yield index, prompt, row
            first += len(chunk)

    def run(self, rows: Iterator[Row], progress: Progress, transform: Callable[[Any], Any] | None = None) -> list[Any]:
        """Runs rows to their end and returns their outputs in order, or what `transform` makes of each.

        Whatever happens, no request is left behind, and an exception has what was finished: `finished_outputs`, by row.
        """
        outputs: dict[int, Any] = {}
        unfinished: dict[str, tuple[int, int]] = {}  # request id -> row, number of its sequences
        num_sequences = 0
        first_id = self._request_counter.counter
        try:
            while True:
                while num_sequences < self._max_unfinished and (next_row := next(rows, None)) is not None:
                    index, prompt, row = next_row
                    next(self._request_counter)
                    request_id = str(first_id + index)
                    with interrupts_deferred():
                        added = self._add(request_id, index, prompt, row)
                        if isinstance(added, int):
                            unfinished[request_id] = index, added
                    if isinstance(added, int):
                        num_sequences += added
                    else:
                        outputs[index] = added if transform is None else transform(added)
                        progress.add(added)
                if not unfinished:
                    break
                assert self._engine.has_unfinished_requests()
                with interrupts_deferred():
                    for output in self._engine.step():
                        index, count = unfinished.pop(output.request_id)
                        num_sequences -= count
                        if output.error is not None and self._raises:
                            advice = '; pass on_error="return" to keep them' if self._has_choice else ""
                            raise TacoError(
                                f"Row {self._name_row(index)} failed while it ran, and the unfinished rows were "
                                f"aborted{advice}: {output.error}"
                            )
                        outputs[index] = output if transform is None else transform(output)
                        progress.add(output)
                progress.step()
        except BaseException as error:
            error.finished_outputs = outputs  # type: ignore[attr-defined]
            with interrupts_deferred(drops=True):
                self._engine.abort_request(list(unfinished))
            raise
        return [outputs[index] for index in range(len(outputs))]

    def enqueue(self, rows: Iterator[Row], num_rows: int) -> list[str]:
        """Adds all rows to the engine, whatever their number, and returns the ids of their requests in order."""
        first_id = self._request_counter.counter
        request_ids = [f"{first_id + index}-{uuid.uuid4().hex[:8]}" for index in range(num_rows)]
        try:
            for index, _, row in rows:
                next(self._request_counter)
                assert not isinstance(row, TacoValidationError)
                self._engine.add_processed(self._build(request_ids[index], index, row))
        except BaseException:
            self._engine.abort_request(request_ids)
            raise
        return request_ids

    def _add(
        self, request_id: str, index: int, prompt: object, row: PreparedPrompt | TacoValidationError
    ) -> RequestOutput | int:
        """Adds a row to the engine and returns how many sequences it has, or its output if there is nothing to run."""
        if isinstance(row, TacoValidationError):
            return self._engine.input_processor.error_output(request_id, prompt, row)
        processed = self._build(request_id, index, row)
        if processed.finished is not None:
            return processed.finished
        self._engine.add_processed(processed)
        return len(processed.children)

    def _build(self, request_id: str, index: int, row: PreparedPrompt) -> ProcessedRequest:
        return self._engine.input_processor.build(
            request_id,
            row,
            self._columns.params_of(index),
            self._cache,
            priority=self._columns.priority_of(index),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _drain(rows: deque[Row]) -> Iterator[Row]:
    while rows:
        yield rows.popleft()
