from __future__ import annotations

import gc
import weakref

import pytest

from taco.garbage import older_objects_spared


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen():
    gc.collect()
    assert gc.get_freeze_count() == 0
    yield
    gc.unfreeze()


def test_older_garbage_is_collected_after_the_context_and_newer_within_it() -> None:
    older = weakref.ref(Cycle())
    if older() is None:
        pytest.skip("the collector ran just now")
    with pytest.raises(KeyError), older_objects_spared():
        newer = weakref.ref(Cycle())
        gc.collect()
        assert older() is not None and newer() is None
        raise KeyError
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert older() is None


def test_what_the_program_froze_stays_frozen() -> None:
    gc.freeze()
    with older_objects_spared():
        pass
    assert gc.get_freeze_count() > 0
