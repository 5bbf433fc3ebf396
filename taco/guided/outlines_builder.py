"""Builds automata of outlines-core in processes of their own, which can be ended.

The library may need minutes and gigabytes for a short expression, and cannot be interrupted.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

from taco.guided.protocol import GrammarError

BUILD_SECONDS = 50.0
MAX_BYTES = 4 << 30  # of memory, where the system can limit it
_PROGRAM = "import sys; sys.path += sys.argv[1:]; from taco.guided.outlines_builder import serve; serve()"


class OutlinesBuilder:
    """Processes that build automata over one vocabulary; as many as are asked at the same time.

    Args:
        vocab_size: see `outlines_core.Vocabulary`.
        tokens: ids by the bytes of their texts.
        build_seconds: an automaton that takes longer is given up.
    """

    def __init__(self, vocab_size: int, tokens: dict[bytes, list[int]], build_seconds: float = BUILD_SECONDS) -> None:
        self._vocabulary = (vocab_size, tokens)
        self._build_seconds = build_seconds
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._alive: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _end_all, self._alive)

    def build(self, regex: str) -> Any:
        """The `outlines_core.Index` of an expression.

        Raises:
            GrammarError: the library refuses it, or it takes too long or too much memory.
        """
        process = self._take()
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(self._build_seconds, give_up)
        timer.start()
        try:
            is_built, answer = _ask(process, regex)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._end(process)
            reason = f"(perhaps {MAX_BYTES >> 30} GiB did not suffice)"
            if is_late.is_set():
                reason = f"in {self._build_seconds:g} s"
            raise GrammarError(
                f"outlines-core could not build an automaton {reason}. Make the constraint smaller, or take "
                'backend="llguidance".'
            ) from None
        except BaseException:
            self._end(process)
            raise
        finally:
            timer.cancel()
        with self._lock:
            self._idle.append(process)
        if not is_built:
            raise GrammarError(f"outlines-core cannot build an automaton: {answer}")
        return answer

    def _take(self) -> subprocess.Popen[bytes]:
        """A process that is waiting for work."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                break
            if process.poll() is None:
                return process
            self._end(process)
        # The packages are where this process has found them, but no file of the program is taken for a standard module.
        command = [sys.executable, "-I", "-c", _PROGRAM, *filter(None, sys.path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with self._lock:
            self._alive.append(process)
        try:
            _send(process.stdin, self._vocabulary)
        except OSError:  # it has ended, as the next question will show
            pass
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._alive.remove(process)
        _end_all([process])


def _ask(process: subprocess.Popen[bytes], regex: str) -> tuple[bool, Any]:
    assert process.stdout is not None
    _send(process.stdin, regex)
    answer: tuple[bool, Any] = pickle.load(process.stdout)
    return answer


def _send(stream: Any, value: object) -> None:
    pickle.dump(value, stream)
    stream.flush()


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # what was not written yet
                pass


def serve() -> None:
    """What such a process does until its input ends: expressions come in, automata go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program
    source, target = sys.stdin.buffer, sys.stdout.buffer
    vocab_size, tokens = pickle.load(source)
    import outlines_core

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    except (ImportError, OSError, ValueError):  # not on this system
        pass
    vocabulary = outlines_core.Vocabulary(vocab_size, tokens)
    while True:
        try:
            regex = pickle.load(source)
        except EOFError:
            return
        try:
            answer = (True, outlines_core.Index(regex, vocabulary))
        except BaseException as error:  # a panic of Rust is no Exception
            answer = (False, f"{type(error).__name__}: {error}")
        _send(target, answer)
