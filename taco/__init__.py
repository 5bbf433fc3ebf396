"""taco: an offline LLM engine.

The public names are imported when they are first used, so that `import taco` is fast and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from taco.version import __version__, __version_tuple__

if TYPE_CHECKING:
    from taco.constraint_params import GuidedDecodingParams, StructuredOutputsParams
    from taco.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from taco.engine.async_llm_engine import AsyncLLMEngine
    from taco.engine.llm_engine import LLMEngine
    from taco.entrypoints.llm import LLM
    from taco.inputs import PromptType, TextPrompt, TokensPrompt
    from taco.outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from taco.pooling_params import PoolerConfig, PoolingParams
    from taco.sampling_params import SamplingParams
    from taco.tool_calls import ToolCall, parse_tool_calls

_HOMES = {
    "AsyncEngineArgs": "taco.engine.arg_utils",
    "AsyncLLMEngine": "taco.engine.async_llm_engine",
    "ClassificationOutput": "taco.outputs",
    "ClassificationRequestOutput": "taco.outputs",
    "CompletionOutput": "taco.outputs",
    "EmbeddingOutput": "taco.outputs",
    "EmbeddingRequestOutput": "taco.outputs",
    "EngineArgs": "taco.engine.arg_utils",
    "GuidedDecodingParams": "taco.constraint_params",
    "LLM": "taco.entrypoints.llm",
    "LLMEngine": "taco.engine.llm_engine",
    "PoolerConfig": "taco.pooling_params",
    "PoolingOutput": "taco.outputs",
    "PoolingParams": "taco.pooling_params",
    "PoolingRequestOutput": "taco.outputs",
    "PromptType": "taco.inputs",
    "RequestOutput": "taco.outputs",
    "SamplingParams": "taco.sampling_params",
    "ScoringOutput": "taco.outputs",
    "ScoringRequestOutput": "taco.outputs",
    "StructuredOutputsParams": "taco.constraint_params",
    "TextPrompt": "taco.inputs",
    "TokensPrompt": "taco.inputs",
    "ToolCall": "taco.tool_calls",
    "parse_tool_calls": "taco.tool_calls",
}

__all__ = [
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "GuidedDecodingParams",
    "LLM",
    "LLMEngine",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptType",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "ToolCall",
    "__version__",
    "__version_tuple__",
    "parse_tool_calls",
]


def __getattr__(name: str) -> object:
    """Import a public name from the module where it lives, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
