"""Keeps requests back until their grammars are compiled, so that no step waits for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taco.guided.compiler import Compilation, GrammarCompiler
from taco.request import RequestStatus, RequestUpdate

if TYPE_CHECKING:
    from taco.engine.input_processor import ProcessedRequest


class GrammarGate:
    """The requests that wait for their grammars.

    Args:
        grammars: compiles them.
    """

    def __init__(self, grammars: GrammarCompiler) -> None:
        self._grammars = grammars
        self._waiting: dict[str, tuple[ProcessedRequest, Compilation]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences that wait."""
        waiting = list(self._waiting.values())
        return sum(child.num_tokens for processed, _ in waiting for child in processed.children)

    def holds(self, processed: ProcessedRequest) -> bool:
        """Takes a request in if its grammar is not there yet; False if it may start now.

        Raises:
            GrammarError: the constraint is not valid.
        """
        spec = processed.params.grammar if processed.children else None
        if spec is None:
            return False
        compilation = self._grammars.request(spec)
        for child in processed.children:
            child.grammar = compilation
        if compilation.grammar is not None:
            return False
        self._waiting[processed.request_id] = (processed, compilation)
        return True

    def take(self) -> tuple[list[ProcessedRequest], list[RequestUpdate]]:
        """Lets requests go.

        Returns:
            Those that may start, and updates that end those whose grammar could not be compiled.
        """
        self._grammars.wait(0)  # gives up those that take too long
        started, failed = [], []
        for request_id, (processed, compilation) in list(self._waiting.items()):
            if not compilation.is_done:
                continue
            del self._waiting[request_id]
            if compilation.error is None:
                started.append(processed)
                continue
            for child in processed.children:
                child.status = RequestStatus.FINISHED_ERROR
                child.error = f"guided decoding: {compilation.error}"
                failed.append(RequestUpdate(child, []))
        return started, failed

    def wait(self, timeout_s: float) -> None:
        """Waits until some grammar is there; not longer than `timeout_s` seconds."""
        self._grammars.wait(timeout_s)

    def discard(self, request_id: str) -> None:
        """Forgets a request; others are left alone."""
        self._waiting.pop(request_id, None)

    def clear(self) -> None:
        """Forgets every request."""
        self._waiting.clear()
