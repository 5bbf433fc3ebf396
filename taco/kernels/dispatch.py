"""Dispatch of one operation to the best of several implementations.

An `Op` owns a plain-torch *reference* (its documentation, its oracle and its fallback) and a list of faster
*candidates*. A call tries the candidates in the order of registration; a candidate declines a case it does not cover
by returning `NotImplemented`, and the reference answers last. What no implementation covers raises an error that says
what was asked and what was tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Op(Generic[P, R]):
    """One typed operation of the kernel layer; create it with the `op` decorator."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.__doc__ = reference.__doc__
        self._candidates: dict[str, Callable[..., Any]] = {}
        self._order: list[Callable[..., Any]] = [reference]

    def candidate(self, name: str) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
        """Registers an implementation with the reference's signature that may return `NotImplemented`."""

        def register(function: Callable[P, Any]) -> Callable[P, Any]:
            assert name not in self._candidates and name != "reference", f"{self.name}: {name} is taken"
            self._candidates[name] = function
            self._order = [*self._candidates.values(), self.reference]
            return function

        return register

    @property
    def names(self) -> list[str]:
        """Names of the implementations in the order they are tried."""
        return [*self._candidates, "reference"]

    @contextlib.contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """Within this context only the implementation called `name` is used (for tests and benchmarks)."""
        order = self._order
        self._order = [self.reference if name == "reference" else self._candidates[name]]
        try:
            yield
        finally:
            self._order = order

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        for function in self._order:
            result = function(*args, **kwargs)
            if result is not NotImplemented:
                return result
        raise NotImplementedError(
            f"kernel {self.name}: no implementation for ({', '.join(map(_describe, [*args, *kwargs.values()]))}); "
            f"tried {', '.join(self.names)}"
        )


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Makes an `Op` out of its reference implementation."""
    return Op(reference)


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}@{value.device}"
    return repr(value)
