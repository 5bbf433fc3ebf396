from __future__ import annotations

import copy
import pickle

from taco.errors import BatchValidationError, UnsupportedFeatureError


def test_errors_of_a_batch_can_be_pickled_and_copied() -> None:
    error = BatchValidationError({3: "is bad"}, 5)
    error.add_note("seen")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is BatchValidationError
        assert (str(other), other.errors, other.num_rows) == (str(error), {3: "is bad"}, 5)
        assert other.__notes__ == ["seen"]
    assert 'correct them, or pass on_error="return"' in str(error)
    other = pickle.loads(pickle.dumps(BatchValidationError({3: "is bad"}, 5, "correct them")))
    assert "nothing was run; correct them:\n  row 3: is bad" in str(other)


def test_what_does_not_exist_is_not_implemented() -> None:
    assert issubclass(UnsupportedFeatureError, NotImplementedError)
