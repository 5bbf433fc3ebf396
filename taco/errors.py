"""Exceptions that users of taco can meet."""

from __future__ import annotations

import difflib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class TacoError(Exception):
    """Base class of every error that taco raises on purpose."""


class TacoValidationError(TacoError, ValueError):
    """The caller's input is wrong; the message says what to change.

    Args:
        message: what was wrong and what to do about it.
        parameter: name of the offending parameter, if one can be named.
        value: the offending value.
    """

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.value = value


class UnsupportedFeatureError(TacoValidationError, NotImplementedError):
    """A parameter is known, but what it asks for does not exist in this version of taco."""


class UnsupportedAttributeError(UnsupportedFeatureError, AttributeError):
    """An attribute of an object of vLLM does not exist in this version of taco, as `hasattr` says too."""


class UnknownPartTypeError(TacoValidationError, NotImplementedError):
    """A part of a chat message has a type that is not known. vLLM 0.6 raises a NotImplementedError there."""


class EmptyAdapterPathError(TacoValidationError, AssertionError):
    """An adapter has no folder. vLLM fails an assertion there."""


class ChatTemplateResolutionError(TacoValidationError):
    """A conversation cannot become a prompt, as there is no chat template."""


class BatchValidationError(TacoValidationError):
    """Several rows of one batch are wrong; raised before any row has run.

    Args:
        errors: message of each bad row, keyed by its index in the batch.
        num_rows: number of rows in the batch.
        advice: what to do.
    """

    MAX_SHOWN = 20

    def __init__(
        self,
        errors: Mapping[int, str],
        num_rows: int,
        advice: str = 'correct them, or pass on_error="return" to run the others',
    ) -> None:
        self.errors = dict(errors)
        shown = [f"  row {index}: {text}" for index, text in sorted(self.errors.items())[: self.MAX_SHOWN]]
        if len(self.errors) > self.MAX_SHOWN:
            shown.append(f"  ... and {len(self.errors) - self.MAX_SHOWN} more rows (all in .errors)")
        verb = "is" if len(self.errors) == 1 else "are"
        super().__init__(
            f"{len(self.errors)} of {num_rows} rows {verb} not valid, so nothing was run; {advice}:\n"
            + "\n".join(shown)
        )
        self.num_rows = num_rows
        self.advice = advice

    def __reduce__(self) -> tuple[Any, ...]:  # an exception is copied with its message alone
        return type(self), (self.errors, self.num_rows, self.advice), self.__dict__


class EngineError(TacoError, RuntimeError):
    """The engine cannot do its work, whatever the caller's input."""


class OutOfMemoryError(EngineError):
    """The memory account does not close; the message gives the numbers and arguments that would work."""


class EngineDeadError(EngineError):
    """The engine was closed, or an earlier step failed and left it unusable."""


class EngineAsleepError(EngineError):
    """The engine was put to sleep, or its weights are missing; the message says how to go on."""


class ProfilerAlreadyActiveError(EngineError):
    """The profiler was started twice."""


class StatsDisabledError(TacoValidationError, AssertionError):
    """Metrics were asked for that the engine does not count. vLLM fails an assertion there."""


def refused(function: F) -> F:
    """Makes a function raise UnsupportedFeatureError; its docstring says what is not supported and what to do instead.

    Programs written for vLLM find the name and the signature, and learn on the call what they cannot have.
    """
    assert function.__doc__ is not None
    message = f"{function.__qualname__}: {inspect.cleandoc(function.__doc__)}"

    @functools.wraps(function)
    def refuse_call(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedFeatureError(message)

    @functools.wraps(function)
    async def refuse_await(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedFeatureError(message)

    return refuse_await if inspect.iscoroutinefunction(function) else refuse_call  # type: ignore[return-value]


class AbsentAttribute:
    """An attribute that vLLM's object has: to read it from one of taco raises UnsupportedAttributeError.

    Args:
        advice: what to do instead.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        raise UnsupportedAttributeError(f"{self._name} is not supported: {self._advice}")


def refuse_given(**arguments: object) -> None:
    """Raises UnsupportedFeatureError, which names it, if an argument that has to stay None is given."""
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedFeatureError(f"{name} is not supported; leave it None.", parameter=name, value=value)


def forget_locals(error: BaseException) -> None:
    """Clears the variables of the functions that an exception came through; called where it is caught.

    Whoever keeps the exception, as notebooks do, would keep what they held: the weights of an engine that could not
    start. Exceptions that callers were handling already are left alone.
    """
    outside = [frame for frame, _ in traceback.walk_stack(inspect.currentframe())][2:]
    seen: list[BaseException] = []
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is None or link in seen or (trace := link.__traceback__) is None or trace.tb_frame in outside:
            continue
        seen.append(link)
        traceback.clear_frames(trace)
        chain += [link.__cause__, link.__context__]


def unknown_arguments(function: str, unknown: Iterable[str], known: Sequence[str]) -> str:
    """What to say of keyword arguments that a function does not have: each with the known name next to it, if any."""
    names = list(unknown)
    shown = []
    for name in names:
        close = difflib.get_close_matches(name, known, n=1)
        shown.append(f"{name!r}; did you mean {close[0]!r}?" if close else repr(name))
    if len(names) == 1:
        return f"{function}() got an unexpected keyword argument {shown[0]}"
    return f"{function}() got unexpected keyword arguments:\n  " + "\n  ".join(shown)
