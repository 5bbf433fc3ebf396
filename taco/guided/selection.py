"""Which library a constraint goes to."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from taco.guided.llguidance_backend import LLGuidanceBackend
from taco.guided.outlines_backend import OutlinesBackend
from taco.guided.protocol import Backend, CompiledGrammar, GrammarError
from taco.guided.spec import GrammarSpec
from taco.guided.vocabulary import Vocabulary
from taco.guided.xgrammar_backend import XGrammarBackend

logger = logging.getLogger(__name__)


class Backends:
    """The libraries for guided decoding, over one vocabulary. A library is loaded when it is first asked.

    Args:
        vocabulary: of the model.
        num_threads: that fill masks at the same time.
    """

    def __init__(self, vocabulary: Vocabulary, num_threads: int = 1) -> None:
        # In the order in which "auto" asks: the first enforces most, and compiles in milliseconds.
        self._makers: dict[str, Callable[[], Backend]] = {
            "llguidance": functools.partial(LLGuidanceBackend, vocabulary, num_threads),
            "xgrammar": functools.partial(XGrammarBackend, vocabulary),
            "outlines": functools.partial(OutlinesBackend, vocabulary),
        }
        self._backends: dict[str, Backend | GrammarError] = {}
        self._logged: set[tuple[str, str]] = set()

    def choose(self, spec: GrammarSpec, preferred: str = "auto") -> tuple[Backend, CompiledGrammar | None]:
        """The backend for a constraint, and the grammar if it has been made on the way.

        That is the backend that the constraint asks for. What it would not enforce, or where its package is missing,
        another one takes over, which a line in the log says once for each reason.

        Args:
            preferred: name of the backend for constraints that ask for none, or "auto".

        Raises:
            GrammarError: the constraint is broken, or no backend enforces all of it.
        """
        wanted = preferred if spec.backend == "auto" else spec.backend
        names = list(self._makers)
        if wanted != "auto":
            names.remove(wanted)
            names.insert(0, wanted)
        errors: dict[str, GrammarError] = {}
        for name in names:
            try:
                backend = self._get(name)
                grammar = backend.check(spec)
            except GrammarError as error:
                errors[name] = error
                continue
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # of a library, a panic of Rust too: it must not take other rows along
                errors[name] = GrammarError(f"{name} failed on it: {type(error).__name__}: {str(error)[:300]}")
                continue
            if wanted in errors:
                self._log(wanted, name, errors[wanted].message)
            return backend, grammar
        # The widest backend knows best what is wrong.
        raise errors["llguidance"]

    def _get(self, name: str) -> Backend:
        if name not in self._backends:
            try:
                self._backends[name] = self._makers[name]()
            except GrammarError as error:
                self._backends[name] = error
        found = self._backends[name]
        if isinstance(found, GrammarError):
            raise GrammarError(found.message)
        return found

    def _log(self, wanted: str, taken: str, reason: str) -> None:
        if (wanted, reason) not in self._logged and len(self._logged) < 100:
            self._logged.add((wanted, reason))
            logger.info("Guided decoding by %s instead of %s: %s", taken, wanted, reason)
