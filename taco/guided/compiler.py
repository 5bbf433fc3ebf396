"""Compiles constraints beside the model, keeps what was compiled, and finds it again by content."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakValueDictionary, ref

from taco.guided.protocol import Backend, CompiledGrammar, GrammarError
from taco.guided.spec import GrammarSpec

if TYPE_CHECKING:
    from taco.guided.selection import Backends

# Grammars that no request uses are kept up to this size, least recently used ones going first.
CACHE_BYTES = 256 << 20
# A grammar that takes longer is an error of its row.
COMPILE_SECONDS = 60.0
MAX_CHECKED = 4096


class Compilation:
    """A grammar in the making, or made.

    Attributes:
        spec: what it is made from.
        backend: that makes it.
        grammar: once made.
        error: why it cannot be made.
        started: when a thread began with it, `time.monotonic()`; None before.
    """

    __slots__ = ("__weakref__", "backend", "error", "grammar", "spec", "started")

    def __init__(self, spec: GrammarSpec, backend: Backend) -> None:
        self.spec = spec
        self.backend = backend
        self.grammar: CompiledGrammar | None = None
        self.error: str | None = None
        self.started: float | None = None

    @property
    def is_done(self) -> bool:
        return self.grammar is not None or self.error is not None

    def run(self) -> None:
        """Makes the grammar, in the calling thread."""
        try:
            grammar = self.backend.compile(self.spec)
        except GrammarError as error:
            self.error = self.error or str(error)
        except BaseException as error:  # of a library: it must not take other rows along
            self.error = self.error or f"{self.backend.name} failed on it: {type(error).__name__}: {error}"
        else:
            if self.error is None:  # it may have been given up meanwhile
                self.grammar = grammar


class GrammarCompiler:
    """Turns constraints into grammars, in threads that live as long as there is work.

    Equal constraints are compiled once, as long as a request uses the grammar or the cache has room for it.

    Args:
        make_backends: the libraries, over the vocabulary of a tokenizer; called when the first constraint comes.
        default_backend: for constraints that ask for none.
        num_threads: that compile at the same time.
        compile_seconds: a grammar that takes longer is given up.
        cache_bytes: for grammars that no request uses.
    """

    def __init__(
        self,
        make_backends: Callable[[Any], Backends],
        *,
        default_backend: str = "auto",
        num_threads: int = 2,
        compile_seconds: float = COMPILE_SECONDS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._make_backends = make_backends
        self._default_backend = default_backend
        self._max_threads = num_threads
        self._compile_seconds = compile_seconds
        self._cache_bytes = cache_bytes
        self._tokenizer: Any = None
        self._changed = threading.Condition(threading.RLock())  # guards all below
        self._backends: Backends | None = None
        self._checked: OrderedDict[GrammarSpec, Backend | GrammarError] = OrderedDict()
        self._in_use: WeakValueDictionary[GrammarSpec, Compilation] = WeakValueDictionary()
        self._recent: OrderedDict[GrammarSpec, Compilation] = OrderedDict()
        self._recent_bytes = 0
        self._queue: deque[ReferenceType[Compilation]] = deque()  # nothing is compiled that nobody waits for any more
        self._num_threads = 0

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Forgets all grammars: from now on they are over the vocabulary of another tokenizer."""
        with self._changed:
            self._tokenizer = tokenizer
            self._backends = None
            self._checked.clear()
            self._in_use = WeakValueDictionary()
            self._recent.clear()
            self._recent_bytes = 0

    def check(self, spec: GrammarSpec) -> Backend:
        """Finds the backend for a constraint, and what is wrong with it as far as that is found in milliseconds.

        Raises:
            GrammarError: see `Backend.check`.
        """
        with self._changed:
            known = self._checked.get(spec)
            if known is None:
                if self._tokenizer is None:
                    raise GrammarError(
                        "Guided decoding needs the tokenizer, and there is none: skip_tokenizer_init=True was passed "
                        "to LLM. Leave that out.",
                        parameter="skip_tokenizer_init",
                    )
                if self._backends is None:
                    self._backends = self._make_backends(self._tokenizer)
                try:
                    known, grammar = self._backends.choose(spec, self._default_backend)
                    if grammar is not None and self._find(spec) is None:
                        found = self._in_use[spec] = Compilation(spec, known)
                        found.grammar = grammar
                        self._remember(found)
                except GrammarError as error:
                    error.__traceback__ = error.__cause__ = error.__context__ = None
                    known = error
                self._checked[spec] = known
                if len(self._checked) > MAX_CHECKED:
                    self._checked.popitem(last=False)
        if isinstance(known, GrammarError):
            raise GrammarError(known.message, parameter=known.parameter, value=known.value)
        return known

    def request(self, spec: GrammarSpec) -> Compilation:
        """The grammar of a constraint, which is done already or is put in line.

        Whoever keeps the result keeps the grammar: `get` then finds it.

        Raises:
            GrammarError: see `check`.
        """
        with self._changed:
            found = self._find(spec)
            if found is None:
                backend = self.check(spec)
                found = self._find(spec)  # checking it may have made it
            if found is None:
                found = self._in_use[spec] = Compilation(spec, backend)
                self._queue.append(ref(found))
                if self._num_threads < self._max_threads:
                    self._start_thread()
            return found

    def get(self, spec: GrammarSpec) -> Compilation:
        """The grammar of a constraint, made now if need be.

        Raises:
            GrammarError: it cannot be made.
        """
        found = self.request(spec)
        while not found.is_done:
            self.wait(0.1, found)
        if found.error is not None:
            raise GrammarError(found.error)
        return found

    def wait(self, timeout_s: float, for_one: Compilation | None = None) -> None:
        """Waits until some grammar, or that one, is done; not longer than `timeout_s` seconds."""
        with self._changed:
            if for_one is None or not for_one.is_done:
                self._changed.wait(timeout_s)
            self._give_up_slow_ones()

    def _find(self, spec: GrammarSpec) -> Compilation | None:
        found = self._in_use.get(spec)
        if found is not None and spec in self._recent:
            self._recent.move_to_end(spec)
        return found

    def _give_up_slow_ones(self) -> None:
        now = time.monotonic()
        for one in list(self._in_use.values()):
            if one.started is not None and not one.is_done and now - one.started > self._compile_seconds:
                one.error = (
                    f"it could not be compiled in {self._compile_seconds:.0f} s; make it smaller, or ask for another "
                    "backend"
                )
                # No library can be interrupted. Its thread goes on in vain, and does not count any more.
                self._num_threads -= 1
                one.started = None
                if self._queue:
                    self._start_thread()
                self._changed.notify_all()

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="taco-grammars", daemon=True).start()
        self._num_threads += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._num_threads -= 1
                    return
                one = self._queue.popleft()()
                if one is None:
                    continue
                one.started = time.monotonic()
            one.run()
            with self._changed:
                was_given_up = one.started is None
                one.started = None
                if one.grammar is not None:
                    self._remember(one)
                self._changed.notify_all()
            if was_given_up:
                return

    def _remember(self, one: Compilation) -> None:
        if self._in_use.get(one.spec) is not one:  # of an earlier tokenizer
            return
        assert one.grammar is not None
        self._recent[one.spec] = one
        self._recent_bytes += one.grammar.num_bytes
        while self._recent_bytes > self._cache_bytes and len(self._recent) > 1:
            _, oldest = self._recent.popitem(last=False)
            assert oldest.grammar is not None
            self._recent_bytes -= oldest.grammar.num_bytes
