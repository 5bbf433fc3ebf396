from __future__ import annotations

import os

import pytest

from taco import envs
from taco.errors import UnsupportedFeatureError


@pytest.fixture(autouse=True)
def without_vllm_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)


def test_variables_that_cannot_matter_are_accepted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for names in envs._WITHOUT_EFFECT.values():
        for name in names.split():
            monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    envs.check_vllm_variables()
    assert not caplog.records


@pytest.mark.parametrize("name", ["VLLM_USE_MODELSCOPE", "VLLM_BATCH_INVARIANT"])
def test_variables_without_which_something_else_would_happen_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for off in ("", "0", "False"):
        monkeypatch.setenv(name, off)
        envs.check_vllm_variables()
    for on in ("1", "true"):
        monkeypatch.setenv(name, on)
        with pytest.raises(UnsupportedFeatureError, match=f"{name}='{on}'.*unset it"):
            envs.check_vllm_variables()


def test_unknown_variables_are_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("VLLM_TWO", "x")
    monkeypatch.setenv("VLLM_ONE", "x")
    monkeypatch.setenv("OTHER", "x")
    envs.check_vllm_variables()
    assert [record.getMessage() for record in caplog.records] == [
        "These environment variables have no effect on taco: VLLM_ONE, VLLM_TWO"
    ]
