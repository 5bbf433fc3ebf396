"""Names of the ways in which vLLM is used; programs pass them on to `LLMEngine.from_engine_args`."""

from __future__ import annotations

from enum import Enum


class UsageContext(str, Enum):
    """Who makes an engine. taco reports its use to nobody, so that the value has no effect."""

    UNKNOWN_CONTEXT = "UNKNOWN_CONTEXT"
    LLM_CLASS = "LLM_CLASS"
    API_SERVER = "API_SERVER"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
    OPENAI_BATCH_RUNNER = "OPENAI_BATCH_RUNNER"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"
