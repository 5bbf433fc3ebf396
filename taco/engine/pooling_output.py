"""From pooled vectors to `PoolingRequestOutput`: the counterpart of the output processor for pooling models."""

from __future__ import annotations

from typing import Any, cast

from taco.config import TacoConfig
from taco.engine.input_processor import ProcessedRequest
from taco.engine.output_processor import ProcessedOutputs
from taco.errors import TacoValidationError
from taco.outputs import PoolingOutput, PoolingRequestOutput
from taco.request import Request, RequestStatus, RequestUpdate


class PoolingOutputProcessor:
    """Keeps the unfinished requests; each is one sequence and has one output, when it has finished.

    It has the methods of `OutputProcessor`; so has its constructor the arguments, none of which matters here.
    """

    def __init__(self, config: TacoConfig, tokenizer: Any) -> None:
        self._requests: dict[str, Request] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def request_ids(self) -> list[str]:
        """Ids of the unfinished requests."""
        return [*self._requests]

    def child_ids(self, request_id: str) -> list[str]:
        """The id itself if its request is unfinished."""
        return [request_id] if request_id in self._requests else []

    def add(self, processed: ProcessedRequest) -> None:
        """Enters a request.

        Raises:
            TacoValidationError: its id is in use by an unfinished request.
        """
        if processed.request_id in self._requests:
            raise TacoValidationError(
                f"request_id {processed.request_id!r} is in use by an unfinished request; choose another one.",
                parameter="request_id",
                value=processed.request_id,
            )
        (self._requests[processed.request_id],) = processed.children

    def process(self, updates: list[RequestUpdate]) -> ProcessedOutputs:
        """Takes what one step did; requests that finish are forgotten."""
        outputs = []
        for update in updates:
            request = update.request
            if request.request_id in self._requests and request.status.is_finished:
                del self._requests[request.request_id]
                outputs.append(_output(update))
        return ProcessedOutputs(cast(Any, outputs))

    def abort_all(self) -> None:
        """Forgets every request."""
        self._requests.clear()

    def abort(self, request_id: str) -> None:
        """Forgets a request; there is no output of a part of it."""
        self._requests.pop(request_id, None)


def _output(update: RequestUpdate) -> PoolingRequestOutput[PoolingOutput | None]:
    import torch

    request = update.request
    outputs = None
    if request.status != RequestStatus.FINISHED_ERROR:
        assert update.pooled is not None
        outputs = PoolingOutput(torch.from_numpy(update.pooled))
    return PoolingRequestOutput(
        request.request_id,
        outputs,
        request.prompt_token_ids,
        True,
        max(0, request.num_cached_tokens),
        error=request.error,
    )
