"""Rules of the fields of EngineArgs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taco.engine.arg_fields import Integer


@given(st.integers(1, 10**6), st.sampled_from("kmgKMG"))
def test_scaled_integers(number: int, suffix: str) -> None:
    rule = Integer(minimum=1, scaled=True)
    base = 1000 if suffix.islower() else 1024
    assert rule.check(f"{number}{suffix}") == number * base ** ("kmg".index(suffix.lower()) + 1)
    assert rule.check(str(number)) == rule.check(number) == number


@pytest.mark.parametrize(("text", "number"), [("25.6k", 25600), ("1.5m", 1_500_000), ("0.5g", 500_000_000)])
def test_scaled_fractions(text: str, number: int) -> None:
    assert Integer(scaled=True).check(text) == number


@pytest.mark.parametrize("text", ["1.5", "1.5K", "1.0001k", "-1k", "k", "", "1 k", "0x10"])
def test_texts_that_are_no_integers(text: str) -> None:
    with pytest.raises(ValueError, match="must be an integer"):
        Integer(scaled=True).check(text)


@given(st.integers(), st.integers(-9, 9), st.integers(0, 9))
def test_integers_stay_in_range(number: int, minimum: int, width: int) -> None:
    rule = Integer(minimum=minimum, maximum=minimum + width)
    if minimum <= number <= minimum + width:
        assert rule.check(number) == number
    else:
        with pytest.raises(ValueError, match=f"from {minimum} to {minimum + width}"):
            rule.check(number)
