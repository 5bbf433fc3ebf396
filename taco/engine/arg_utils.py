"""`EngineArgs`: the flat keyword arguments of an engine, and how they become frozen configs.

The fields of `EngineArgs` are one table. They have the names of vLLM 0.6.6 in its order, then the names that vLLM 0.33
added, then taco's own. Every field has one of three treatments:

- `implemented`: it does what its help text says; its rule states the values it takes. Each of these has a CLI flag.
- `immaterial`: accepted, because no value of it can change a result here or make a request possible; the text says why.
- `not_built`: the feature behind it is missing; any value but the neutral ones raises `UnsupportedFeatureError`.

To build a feature, change the treatment of its field and resolve the value in `EngineArgs.create_config`.

This module imports neither torch nor transformers; `create_config` does, when it is called.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import numbers
import operator
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

from taco import envs
from taco.compat import Behaviour, behaviour_for
from taco.config import (
    QUANTIZATION_METHODS,
    CacheConfig,
    DeviceConfig,
    GuidedDecodingConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    ProfilerConfig,
    ReasoningConfig,
    SchedulerConfig,
    TacoConfig,
)
from taco.engine.pooling_config import Task, resolve_pooler, resolve_task, scores_by_tokens
from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.guided.request import BACKENDS, StructuredOutputsConfig, backend_name
from taco.logits_processor import load_logits_processors
from taco.pooling_params import PoolerConfig
from taco.reasoning import MARKS, complete_reasoning_config
from taco.usage_context import UsageContext
from taco.watermark import WatermarkConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from typing_extensions import Self

    from taco.models.loader.source import ModelSource

logger = logging.getLogger(__name__)

T = TypeVar("T")
Device = Literal["cpu", "cuda"]

GIB = 1 << 30
DEFAULT_BLOCK_SIZE = 16
DEFAULT_NUM_SEQS = 256
DEFAULT_NUM_BATCHED_TOKENS: dict[Device, int] = {"cpu": 2048, "cuda": 8192}
FIT_MAX_MODEL_LEN = -1  # max_model_len="auto"

# ----------------------------------------------------------------------------------------------------------------------
# Rules: which values a field takes, from Python and from the command line
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A text. Other rules derive from this one.

    Args:
        optional: None is allowed, and empty texts, lists and dicts mean None.
    """

    optional: bool = False

    is_secret: ClassVar[bool] = False  # messages do not show values

    def check(self, value: Any) -> Any:
        """Canonical form of `value`; a ValueError says what it must be."""
        if self.optional and (value is None or _is_empty(value)):
            return None
        return self.check_given(value)

    def check_given(self, value: Any) -> Any:
        """`check` for a value that does not stand for an allowed None."""
        if not isinstance(value, str | os.PathLike) or not os.fspath(value):
            raise ValueError("must be a text that is not empty")
        return os.fspath(value)

    def from_text(self, text: str) -> Any:
        """A command line argument as the Python value that it stands for."""
        return text

    def flag_options(self) -> dict[str, Any]:
        """Keywords of `argparse.ArgumentParser.add_argument`."""
        return {"type": self._parse_argument}

    def _parse_argument(self, text: str) -> Any:
        try:
            return self.check(self.from_text(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error) if self.is_secret else f"{text!r}: {error}") from None


@dataclass(frozen=True)
class TextList(Rule):
    """A text or a list of texts, as a tuple."""

    def check_given(self, value: Any) -> tuple[str, ...]:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not items or not all(isinstance(item, str) for item in items):
            raise ValueError("must be a text or a list of texts")
        return tuple(items)

    def flag_options(self) -> dict[str, Any]:
        return {"nargs": "+"}


@dataclass(frozen=True)
class Token(Rule):
    """An access token, or True for the one that `hf auth login` stored."""

    def check_given(self, value: Any) -> str | bool:
        return value if isinstance(value, bool) else cast(str, super().check_given(value))


@dataclass(frozen=True)
class Switch(Rule):
    """True or False; `--name` and `--no-name` on the command line."""

    def check_given(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("must be True or False")
        return value

    def flag_options(self) -> dict[str, Any]:
        return {"action": argparse.BooleanOptionalAction}


@dataclass(frozen=True)
class OneOf(Rule):
    """One of some values. Others may well mean something to vLLM, so they count as unsupported rather than wrong."""

    values: tuple[Any, ...] = ()

    def check_given(self, value: Any) -> Any:
        for known in self.values:
            if _same(value, known):
                return known
        shown = [*self.values, None] if self.optional else [*self.values]
        raise UnsupportedFeatureError(f"taco supports {_listed(shown)}")

    def from_text(self, text: str) -> Any:
        return type(self.values[0])(text)

    def flag_options(self) -> dict[str, Any]:
        return {**super().flag_options(), "metavar": "{" + ",".join(str(value) for value in self.values) + "}"}


@dataclass(frozen=True)
class DType(OneOf):
    """The name of a data type or a torch.dtype object; the canonical form is "auto" or torch's own name."""

    values: tuple[Any, ...] = ("auto", "half", "float16", "bfloat16", "float", "float32")

    def check_given(self, value: Any) -> str:
        # str() and not isinstance(): this module must not need torch to recognise a torch.dtype.
        name = cast(str, super().check_given(str(value).removeprefix("torch.")))
        return {"half": "float16", "float": "float32"}.get(name, name)


@dataclass(frozen=True)
class Integer(Rule):
    """An integer in a range.

    Args:
        minimum, maximum: the range, both ends included.
        scaled: texts such as "4096", "4k" (4000), "4K" (4096) and "1.5m" are numbers too.
        words: further values and the integers that they stand for; these may lie outside the range.
    """

    minimum: int = 0
    maximum: int | None = None
    scaled: bool = False
    words: tuple[tuple[str, int], ...] = ()

    def check_given(self, value: Any) -> int:
        for word, number in self.words:
            if _same(value, word) or _same(value, number):
                return number
        if isinstance(value, str) and self.scaled:
            value = _parse_scaled_integer(value)
        if hasattr(value, "__index__") and not isinstance(value, bool):
            number = operator.index(value)
            if self.minimum <= number and (self.maximum is None or number <= self.maximum):
                return number
        raise ValueError(f"must be {self._described()}")

    def from_text(self, text: str) -> int | str:
        return text if self.scaled else int(text) if re.fullmatch(r"[+-]?\d+", text) else text

    def _described(self) -> str:
        text = f"an integer of at least {self.minimum}"
        if self.maximum is not None:
            text = f"an integer from {self.minimum} to {self.maximum}"
        if self.scaled:
            text += ' (or a text such as "4k" or "4K")'
        return text + "".join(f", or {word!r}" for word, _ in self.words)


@dataclass(frozen=True)
class Number(Rule):
    """A finite number in a range, whose lower end may be excluded."""

    minimum: float = 0.0
    maximum: float = math.inf
    exclude_minimum: bool = False

    def check_given(self, value: Any) -> float:
        if not isinstance(value, bool) and isinstance(value, numbers.Real):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            in_range = self.minimum <= number <= self.maximum and not (self.exclude_minimum and number == self.minimum)
            if in_range and math.isfinite(number):
                return number
        lower = f"above {self.minimum:g}" if self.exclude_minimum else f"of at least {self.minimum:g}"
        upper = "" if math.isinf(self.maximum) else f" and at most {self.maximum:g}"
        raise ValueError(f"must be a number {lower}{upper}")

    def from_text(self, text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text


@dataclass(frozen=True)
class JsonObject(Rule):
    """A dict; JSON on the command line. It may be a callable too where `or_callable` says so."""

    or_callable: bool = False

    def check_given(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        if self.or_callable and callable(value):
            return value
        raise ValueError("must be a dict" + (" or a callable" if self.or_callable else ""))

    def from_text(self, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not valid JSON ({error})") from None


@dataclass(frozen=True)
class PoolerRule(JsonObject):
    """A `PoolerConfig`, or its fields as a dict."""

    def check_given(self, value: Any) -> PoolerConfig:
        if isinstance(value, Mapping):
            value = dict(value)
        elif not hasattr(value, "pooling_type"):
            raise ValueError("must be a PoolerConfig or a dict of its fields")
        return PoolerConfig.from_mapping(value)


@dataclass(frozen=True)
class StructuredOutputsRule(JsonObject):
    """A `StructuredOutputsConfig`, or its fields as a dict."""

    def check_given(self, value: Any) -> StructuredOutputsConfig:
        return StructuredOutputsConfig.from_mapping(value)


@dataclass(frozen=True)
class ProfilerRule(JsonObject):
    """A `ProfilerConfig`, or its fields as a dict, of which `profiler` may be None for no profiler."""

    def check_given(self, value: Any) -> ProfilerConfig | None:
        given = dict(value) if isinstance(value, Mapping) else dict(vars(value)) if hasattr(value, "__dict__") else {}
        if given.get("profiler", "torch") is None:
            return None
        if not given.get("torch_profiler_dir"):
            raise ValueError('must have a folder for trace files, as in {"torch_profiler_dir": "traces"}')
        fields = {field.name: field for field in dataclasses.fields(ProfilerConfig)}
        for name, setting in given.items():
            if name not in fields or (name == "profiler" and setting != "torch"):
                raise UnsupportedFeatureError(f"{name}={setting!r} is not supported; taco has {_listed([*fields])}")
            default = fields[name].default
            if default is not dataclasses.MISSING and type(setting) is not type(default):
                raise ValueError(f"{name} must be of type {type(default).__name__}")
            if isinstance(setting, int) and setting < 0:
                raise ValueError(f"{name} must be at least 0")
        return ProfilerConfig(**given)


@dataclass(frozen=True)
class ReasoningParser(OneOf):
    """A kind of reasoning model; an empty text for none."""

    values: tuple[Any, ...] = tuple(MARKS)

    def check(self, value: Any) -> str:
        return "" if value is None or value == "" else cast(str, self.check_given(value))


@dataclass(frozen=True)
class ReasoningRule(JsonObject):
    """A `ReasoningConfig`, or its fields as a dict."""

    def check_given(self, value: Any) -> ReasoningConfig:
        if isinstance(value, ReasoningConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a ReasoningConfig or a dict of its fields")
        names = [field.name for field in dataclasses.fields(ReasoningConfig)]
        for name, text in value.items():
            if name not in names:
                raise UnsupportedFeatureError(f"{name!r} is not known; there are {_listed(names)}")
            if not isinstance(text, str | None):
                raise ValueError(f"{name} must be a text")
        return ReasoningConfig(**{name: text or "" for name, text in value.items()})


@dataclass(frozen=True)
class WatermarkRule(JsonObject):
    """A `WatermarkConfig`, or its fields as a dict."""

    is_secret = True

    def check_given(self, value: Any) -> WatermarkConfig:
        if isinstance(value, WatermarkConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("must be a WatermarkConfig or a dict of its fields")
        return WatermarkConfig.from_mapping(value)


@dataclass(frozen=True)
class ExecutorRule(Rule):
    """The name of an executor that does, for one device, what the one in this process does."""

    def check_given(self, value: Any) -> str:
        if value not in ("uni", "mp", "external_launcher"):
            raise UnsupportedFeatureError('another executor is not supported; pass "uni", or leave it out')
        if value == "external_launcher" and (num_processes := envs.world_size()) > 1:
            raise UnsupportedFeatureError(
                f"a launcher has started {num_processes} processes (WORLD_SIZE), but an engine runs in one; start "
                "independent processes, each with a part of the prompts"
            )
        return cast(str, value)


@dataclass(frozen=True)
class LogitsProcessorsRule(TextList):
    """Classes of logits processors, or their names, as a tuple of classes."""

    def check_given(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list of classes or of their names")
        return load_logits_processors(value)


@dataclass(frozen=True)
class ClassName(Rule):
    """A class, or its "module.name"; an empty text for none."""

    def check_given(self, value: Any) -> str | type:
        if isinstance(value, type) or value == "":
            return cast("str | type", value)
        name = super().check_given(value)
        if not re.fullmatch(r"\w+(\.\w+)+", name):
            raise ValueError('must be a class or its name, as in "package.module.Class"')
        return cast(str, name)


def _same(value: object, known: object) -> bool:
    """Equality that keeps True and 1 apart."""
    return isinstance(value, bool) == isinstance(known, bool) and bool(value == known)


def _is_empty(value: object) -> bool:
    return isinstance(value, str | list | tuple | set | dict) and not value


def _listed(values: list[Any]) -> str:
    return ", ".join(repr(value) for value in values)


def _parse_scaled_integer(text: str) -> int | str:
    """The number that "4096", "4k" or "1.5m" (powers of 1000) or "4K" (powers of 1024) mean, or `text` itself.

    A fraction goes with powers of 1000 only, as in vLLM: "1.5K" has no agreed meaning.
    """
    match = re.fullmatch(r"(\d+)(\.\d+)?([kmgt]?|[KMGT])", text.strip())
    if match is None:
        return text
    whole, fraction, suffix = match.groups()
    scale = (1000 if suffix.islower() else 1024) ** " kmgt".index(suffix.lower() or " ")
    if fraction is None:
        return int(whole) * scale
    number = float(whole + fraction) * scale
    return round(number) if suffix.islower() and abs(number - round(number)) < 1e-6 else text


# ----------------------------------------------------------------------------------------------------------------------
# Treatments: what happens to the value of a field
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implemented:
    """The field does what `help` says.

    Args:
        help: what it does, for the CLI and the documentation.
        rule: the values it takes.
    """

    help: str
    rule: Rule

    def check(self, name: str, value: Any, default: Any) -> Any:
        """Canonical value of the field; the error names the field."""
        try:
            return self.rule.check(value)
        except ValueError as error:
            cls = UnsupportedFeatureError if isinstance(error, UnsupportedFeatureError) else TacoValidationError
            if self.rule.is_secret:
                raise cls(f"{name}: {error}", parameter=name) from None
            raise cls(f"{name}={value!r}: {error}", parameter=name, value=value) from None


@dataclass(frozen=True)
class Immaterial:
    """The value of the field cannot matter here.

    Args:
        reason: why.
        obsolete: newer versions of vLLM have dropped the name; a value for it makes a DeprecationWarning.
    """

    reason: str
    obsolete: bool = False

    def check(self, name: str, value: Any, default: Any) -> Any:
        if self.obsolete and not _same(value, default):
            warnings.warn(f"{name} has no effect and can go: {self.reason}.", DeprecationWarning, stacklevel=2)
        return value


@dataclass(frozen=True)
class NotBuilt:
    """The feature behind the field does not exist yet.

    Args:
        feature: what a caller who sets the field asks for.
        also: neutral values besides the default.
    """

    feature: str
    also: tuple[Any, ...] = ()

    def check(self, name: str, value: Any, default: Any) -> Any:
        neutral = [default, *self.also]
        if any(_same(value, known) for known in neutral) or (_is_empty(value) and not default):
            return default
        raise UnsupportedFeatureError(
            f"{name}={value!r}: {self.feature} is not supported; {name} can only be {_listed(neutral)}",
            parameter=name,
            value=value,
        )


Treatment = Implemented | Immaterial | NotBuilt


def implemented(default: Any, rule: Rule, help: str, *, show: bool = True) -> Any:
    """A field of `EngineArgs` that does what `help` says; `show=False` keeps a secret out of `repr`."""
    return dataclasses.field(default=default, repr=show, metadata={"treatment": Implemented(help, rule)})


def immaterial(default: Any, reason: str, *, obsolete: bool = False) -> Any:
    """A field of `EngineArgs` that is accepted because of `reason`."""
    return dataclasses.field(default=default, metadata={"treatment": Immaterial(reason, obsolete)})


def not_built(default: Any, feature: str, *, also: tuple[Any, ...] = ()) -> Any:
    """A field of `EngineArgs` that raises unless it has its default, is empty, or is in `also`."""
    return dataclasses.field(default=default, metadata={"treatment": NotBuilt(feature, also)})


ONE_DEVICE = "it concerns several devices or processes, and the engine is one process on one device"
ONE_TOKENIZER = "prompts are tokenised in the process of the engine"
EAGER = "it shapes compilation or CUDA graphs; every step runs eagerly, with the same results"
PLANNED_STEPS = "every step is planned anew while the previous one runs"
LOADER = "it tunes how files are read; the weights are the same"
NO_MEDIA = "it concerns images, audio and video, which no supported model reads"
NO_EXPERTS = "no supported model has experts"
NO_STATE_SPACE = "no supported model has state-space or linear-attention layers"
NO_LORA = "it is read only together with enable_lora"
NO_PROMPT_ADAPTER = "it is read only together with enable_prompt_adapter"
NO_SPECULATION = "it is read only together with speculative_model"
NO_OFFLOAD = "it is read only where weights are offloaded"
SLEEPS = "`LLM.sleep` always works, and needs no allocator of its own"
NO_CONTEXT_PARALLEL = "it is read only together with decode_context_parallel_size"
NO_LOOKAHEAD = "it is read only together with lookahead_cache_config_dir"

TEXT = Rule()
OPTIONAL_TEXT = Rule(optional=True)
SWITCH = Switch()
OPTIONAL_SWITCH = Switch(optional=True)


@dataclass
class EngineArgs:
    """Arguments of an engine; `create_config` checks and resolves them. The table below is their documentation.

    Values are not checked on construction, so that an instance can be changed until it is used. `vars()` of an instance
    is a valid keyword set for `LLM`.
    """

    # Names of vLLM 0.6.6, in its order.
    model: str = implemented("facebook/opt-125m", TEXT, "Folder, .gguf file or hub id of the model.")
    served_model_name: str | list[str] | None = implemented(
        None,
        TextList(optional=True),
        "Name of the model in logs and in what the commands print, instead of `model`; the first counts.",
    )
    tokenizer: str | None = implemented(None, OPTIONAL_TEXT, "Folder or hub id of the tokenizer, if not the model's.")
    task: str = implemented(
        "auto",
        OneOf(values=("auto", "generate", "embed", "embedding", "classify", "score", "reward")),
        'What the model is used for: "auto" is what it is made for.',
    )
    skip_tokenizer_init: bool = implemented(
        False, SWITCH, "Load no tokenizer: prompts must be token ids, and outputs have no text."
    )
    tokenizer_mode: str = implemented(
        "auto",
        OneOf(values=("auto", "slow", "mistral")),
        'Kind of tokenizer: "auto" takes the fast one where there is one, "slow" the one in Python (rare), "mistral" '
        "that of mistral-common, from tekken.json or tokenizer.model.vN.",
    )
    trust_remote_code: bool = implemented(False, SWITCH, "Run Python code that comes with the model.")
    allowed_local_media_path: str = immaterial("", NO_MEDIA)
    download_dir: str | None = implemented(None, OPTIONAL_TEXT, "Folder for downloads, instead of the hub's cache.")
    load_format: str = implemented(
        "auto",
        OneOf(values=("auto", "safetensors", "pt", "gguf", "dummy")),
        'Format of the weights: "auto" takes what it finds, "dummy" makes random ones.',
    )
    config_format: str = implemented("auto", OneOf(values=("auto", "hf")), "Format of the model's config.")
    dtype: Any = implemented(
        "auto", DType(), 'Data type of weights and activations: "auto" follows the checkpoint and the device.'
    )
    kv_cache_dtype: str = implemented(
        "auto", OneOf(values=("auto",)), 'Data type of the KV cache: "auto" is that of the model.'
    )
    quantization_param_path: str | None = not_built(None, "a KV cache with scaling factors")
    seed: int = implemented(
        0, Integer(minimum=-(2**63), maximum=2**64 - 1), "Key of the random numbers of requests without a seed."
    )
    max_model_len: int | str | None = implemented(
        None,
        Integer(minimum=1, optional=True, scaled=True, words=(("auto", FIT_MAX_MODEL_LEN),)),
        "Most tokens of a sequence, prompt and output together. Unset: what the model was made for; "
        '"auto" or -1: the same, or less where the KV cache holds less.',
    )
    worker_use_ray: bool = not_built(False, "running on Ray")
    distributed_executor_backend: Any = implemented(
        None,
        ExecutorRule(optional=True),
        'Who runs the workers: "uni", "mp" or "external_launcher". There is one, which runs in this process, whatever '
        "is given; a launcher must have started one process.",
    )
    pipeline_parallel_size: int = implemented(
        1, OneOf(values=(1,)), "Devices that share the layers of the model, one after the other; only 1 is supported."
    )
    tensor_parallel_size: int = implemented(
        1, OneOf(values=(1,)), "Devices that share the work of every layer; only 1 is supported."
    )
    max_parallel_loading_workers: int | None = immaterial(None, ONE_DEVICE)
    block_size: int | None = implemented(
        None, OneOf(optional=True, values=(8, 16, 32, 64, 128)), "Tokens of a block of the KV cache. Unset: 16."
    )
    enable_prefix_caching: bool | None = implemented(
        None, OPTIONAL_SWITCH, "Keep the KV cache of finished requests for prompts that begin alike. Unset: yes."
    )
    disable_sliding_window: bool = implemented(
        False, SWITCH, "Use full attention, with sequences no longer than the sliding window of the model."
    )
    use_v2_block_manager: bool = immaterial(True, "there is one block manager", obsolete=True)
    swap_space: float | None = implemented(
        None,
        Number(optional=True),
        "Host memory in GiB that takes the KV cache of preempted requests; 0 recomputes them instead. Unset: 4 on a "
        "GPU; 0 on a CPU, where it would be more of the memory that has run out, unless preemption_mode is swap.",
    )
    cpu_offload_gb: float = not_built(0, "offloading weights to host memory")
    gpu_memory_utilization: float = implemented(
        0.9,
        Number(maximum=1.0, exclude_minimum=True),
        "Share of the GPU's memory for weights, activations and KV cache; no effect on a CPU.",
    )
    max_num_batched_tokens: int | None = implemented(
        None,
        Integer(minimum=1, optional=True, scaled=True),
        "Most tokens of a step over all sequences. Unset: 2048 on a CPU, 8192 on a GPU, "
        "and at least max_num_seqs (at least max_model_len without chunked prefill).",
    )
    max_num_seqs: int | None = implemented(
        None, Integer(minimum=1, optional=True), "Most sequences that run at once. Unset: 256."
    )
    max_logprobs: int = implemented(
        20, Integer(minimum=-1), "Most log-probabilities a request may ask for at each position; -1: the vocabulary."
    )
    disable_log_stats: bool = implemented(
        False,
        SWITCH,
        "Do not count the metrics of the engine, which `LLM.get_metrics` returns and a line in the log sums up every "
        "10 s. `LLM` does not count them unless this is False; outputs have their own metrics in any case.",
    )
    revision: str | None = implemented(None, OPTIONAL_TEXT, "Branch, tag or commit of the model on the hub.")
    code_revision: str | None = implemented(
        None,
        OPTIONAL_TEXT,
        "Branch, tag or commit of the model's code on the hub, if it is in a repository of its own.",
    )
    rope_scaling: dict[str, Any] | None = implemented(
        None, JsonObject(optional=True), "Scaling of rotary embeddings, instead of the model's, with its `rope_type`."
    )
    rope_theta: float | None = implemented(
        None, Number(optional=True, exclude_minimum=True), "Base of rotary embeddings, instead of the model's."
    )
    hf_overrides: Any = implemented(
        None,
        JsonObject(optional=True, or_callable=True),
        "Values that replace those of the model's config, or a callable from config to config.",
    )
    tokenizer_revision: str | None = implemented(
        None, OPTIONAL_TEXT, "Branch, tag or commit of the tokenizer on the hub. Unset: `revision`."
    )
    quantization: str | None = implemented(
        None,
        OneOf(optional=True, values=tuple(QUANTIZATION_METHODS)),
        'How the weights are quantised: "gguf" for a .gguf file.',
    )
    enforce_eager: bool | None = implemented(
        None, OPTIONAL_SWITCH, "Do not capture CUDA graphs. None are captured yet, so every step runs eagerly anyway."
    )
    max_seq_len_to_capture: int = implemented(
        8192, Integer(minimum=1), "Longest sequence for which CUDA graphs are used, once they are captured."
    )
    disable_custom_all_reduce: bool = immaterial(False, ONE_DEVICE)
    tokenizer_pool_size: int = immaterial(0, ONE_TOKENIZER, obsolete=True)
    tokenizer_pool_type: Any = immaterial("ray", ONE_TOKENIZER, obsolete=True)
    tokenizer_pool_extra_config: dict[str, Any] | None = immaterial(None, ONE_TOKENIZER, obsolete=True)
    limit_mm_per_prompt: Mapping[str, Any] | None = not_built(None, "multimodal input")
    mm_processor_kwargs: dict[str, Any] | None = not_built(None, "multimodal input")
    disable_mm_preprocessor_cache: bool = immaterial(False, NO_MEDIA)
    enable_lora: bool = not_built(False, "LoRA")
    enable_lora_bias: bool = immaterial(False, NO_LORA)
    max_loras: int = immaterial(1, NO_LORA)
    max_lora_rank: int = immaterial(16, NO_LORA)
    enable_prompt_adapter: bool = not_built(False, "prompt adapters")
    max_prompt_adapters: int = immaterial(1, NO_PROMPT_ADAPTER)
    max_prompt_adapter_token: int = immaterial(0, NO_PROMPT_ADAPTER)
    fully_sharded_loras: bool = immaterial(False, NO_LORA)
    lora_extra_vocab_size: int = immaterial(256, NO_LORA)
    long_lora_scaling_factors: tuple[float, ...] | None = immaterial(None, NO_LORA)
    lora_dtype: Any = immaterial("auto", NO_LORA)
    max_cpu_loras: int | None = immaterial(None, NO_LORA)
    device: str = implemented(
        "auto", OneOf(values=("auto", "cpu", "cuda")), 'Where the model runs: "auto" takes a GPU where there is one.'
    )
    num_scheduler_steps: int = immaterial(1, PLANNED_STEPS, obsolete=True)
    multi_step_stream_outputs: bool = immaterial(True, PLANNED_STEPS, obsolete=True)
    ray_workers_use_nsight: bool = not_built(False, "running on Ray")
    num_gpu_blocks_override: int | None = implemented(
        None, Integer(minimum=1, optional=True), "Number of blocks of the KV cache, instead of what the memory holds."
    )
    num_lookahead_slots: int = immaterial(0, NO_SPECULATION, obsolete=True)
    model_loader_extra_config: dict[str, Any] | None = not_built(None, "options of a weight loader")
    ignore_patterns: str | list[str] | None = implemented(
        None, TextList(optional=True), "Glob patterns of files of the model that are not downloaded."
    )
    preemption_mode: str | None = implemented(
        None,
        OneOf(optional=True, values=("swap", "recompute")),
        "What becomes of the KV cache of a preempted request. Unset: swapped while there is room, else recomputed.",
    )
    scheduler_delay_factor: float = immaterial(
        0.0, "prompts and running requests share every step, so that delaying prompts gains nothing", obsolete=True
    )
    enable_chunked_prefill: bool | None = implemented(
        None, OPTIONAL_SWITCH, "Split prompts over several steps. Unset: yes; no: every prompt in one step."
    )
    guided_decoding_backend: str = implemented(
        "auto",
        OneOf(values=tuple(BACKENDS)),
        'Library for guided decoding where a request names none; "auto" is the first that enforces all that is asked '
        "for. What the named one cannot enforce is left to another.",
    )
    logits_processor_pattern: str | None = not_built(None, "logits processors by name")
    speculative_model: str | None = not_built(None, "speculative decoding")
    speculative_model_quantization: str | None = immaterial(None, NO_SPECULATION)
    speculative_draft_tensor_parallel_size: int | None = immaterial(None, NO_SPECULATION)
    num_speculative_tokens: int | None = immaterial(None, NO_SPECULATION)
    speculative_disable_mqa_scorer: bool | None = immaterial(False, NO_SPECULATION)
    speculative_max_model_len: int | None = immaterial(None, NO_SPECULATION)
    speculative_disable_by_batch_size: int | None = immaterial(None, NO_SPECULATION)
    ngram_prompt_lookup_max: int | None = immaterial(None, NO_SPECULATION)
    ngram_prompt_lookup_min: int | None = immaterial(None, NO_SPECULATION)
    spec_decoding_acceptance_method: str = immaterial("rejection_sampler", NO_SPECULATION)
    typical_acceptance_sampler_posterior_threshold: float | None = immaterial(None, NO_SPECULATION)
    typical_acceptance_sampler_posterior_alpha: float | None = immaterial(None, NO_SPECULATION)
    qlora_adapter_name_or_path: str | None = not_built(None, "QLoRA")
    disable_logprobs_during_spec_decoding: bool | None = immaterial(None, NO_SPECULATION)
    otlp_traces_endpoint: str | None = not_built(None, "OpenTelemetry tracing")
    collect_detailed_traces: Any = not_built(None, "OpenTelemetry tracing")
    disable_async_output_proc: bool = implemented(
        False, SWITCH, "Plan each step only after the previous one has ended, instead of while it runs."
    )
    scheduling_policy: str = implemented(
        "fcfs",
        OneOf(values=("fcfs", "priority")),
        'Order of requests: "fcfs", first come, first served; "priority", smallest priority number first.',
    )
    override_neuron_config: dict[str, Any] | None = not_built(None, "running on AWS Neuron")
    override_pooler_config: Any = implemented(
        None, PoolerRule(optional=True), "Old name of pooler_config; give one of them."
    )
    compilation_config: Any = immaterial(None, EAGER)
    worker_cls: str = not_built("auto", "another worker class")
    kv_transfer_config: Any = not_built(None, "sending the KV cache to other engines")
    generation_config: str | None = implemented(
        None,
        OPTIONAL_TEXT,
        'Where default sampling parameters come from: "auto", generation_config.json of the model; "vllm", neutral '
        "values; else a folder that has such a file. Unset: as compat_version says.",
    )

    # Names that vLLM 0.33 added, in its order.
    enable_return_routed_experts: bool = not_built(False, "returning the experts of a token")
    return_sampling_mask: bool = not_built(False, "returning the sampling mask")
    model_weights: str = not_built("", "weights from another place than `model`")
    hf_config_path: str | None = not_built(None, "a config from another place than `model`")
    runner: str = implemented(
        "auto",
        OneOf(values=("auto", "generate", "pooling")),
        'Whether the model generates or pools hidden states: "auto" is what it is made for. See `task`.',
    )
    convert: str = implemented(
        "auto",
        OneOf(values=("auto", "none", "embed", "classify")),
        'What a model is used for that was made for something else; "none" and "auto" leave it to runner and task.',
    )
    enable_prompt_embeds: bool = not_built(False, "prompts of embeddings")
    allowed_media_domains: list[str] | None = immaterial(None, NO_MEDIA)
    safetensors_load_strategy: str | None = immaterial(None, LOADER)
    safetensors_prefetch_num_threads: int | None = immaterial(None, LOADER)
    safetensors_prefetch_block_size: int | None = immaterial(None, LOADER)
    cudagraph_capture_sizes: list[int] | None = immaterial(None, EAGER)
    max_cudagraph_capture_size: int | None = immaterial(None, EAGER)
    ir_op_priority: Any = not_built(None, "the choice of kernels")
    master_addr: str = immaterial("127.0.0.1", ONE_DEVICE)
    master_port: int = immaterial(29501, ONE_DEVICE)
    nnodes: int = not_built(1, "running on several machines")
    node_rank: int = not_built(0, "running on several machines")
    distributed_timeout_seconds: int | None = immaterial(None, ONE_DEVICE)
    cpu_distributed_timeout_seconds: int | None = immaterial(None, ONE_DEVICE)
    numa_bind: bool = not_built(False, "binding to NUMA nodes")
    numa_bind_nodes: list[int] | None = not_built(None, "binding to NUMA nodes")
    numa_bind_cpus: list[str] | None = not_built(None, "binding to NUMA nodes")
    device_ids: list[int | str] | None = not_built(None, "the choice of devices other than by CUDA_VISIBLE_DEVICES")
    prefill_context_parallel_size: int = not_built(1, "context parallelism")
    decode_context_parallel_size: int = not_built(1, "context parallelism")
    dcp_comm_backend: str | None = immaterial(None, NO_CONTEXT_PARALLEL)
    dcp_q_replicate: bool | None = immaterial(None, NO_CONTEXT_PARALLEL)
    dcp_kv_cache_interleave_size: int = immaterial(1, NO_CONTEXT_PARALLEL)
    cp_kv_cache_interleave_size: int | None = immaterial(None, NO_CONTEXT_PARALLEL)
    data_parallel_size: int = implemented(
        1, OneOf(values=(1,)), "Copies of the model that share the requests; only 1 is supported."
    )
    data_parallel_rank: int | None = not_built(None, "data parallelism", also=(0,))
    data_parallel_start_rank: int | None = not_built(None, "data parallelism", also=(0,))
    data_parallel_size_local: int | None = not_built(None, "data parallelism", also=(1,))
    data_parallel_address: str | None = immaterial(None, ONE_DEVICE)
    data_parallel_rpc_port: int | None = immaterial(None, ONE_DEVICE)
    data_parallel_hybrid_lb: bool = not_built(False, "data parallelism")
    data_parallel_external_lb: bool = not_built(False, "data parallelism")
    data_parallel_multi_port_external_lb: bool = not_built(False, "data parallelism")
    data_parallel_backend: str = immaterial("mp", ONE_DEVICE)
    enable_hc_sp: bool = not_built(False, "sequence parallelism")
    enable_expert_parallel: bool = immaterial(False, NO_EXPERTS)
    enable_batch_sharded_sampling: bool | None = immaterial(None, ONE_DEVICE)
    enable_ep_weight_filter: bool = immaterial(False, NO_EXPERTS)
    moe_backend: str = immaterial("auto", NO_EXPERTS)
    linear_backend: str = not_built("auto", "the choice of kernels")
    sparse_indexer_topk_backend: str = not_built("auto", "the choice of kernels")
    all2all_backend: str = immaterial("allgather_reducescatter", NO_EXPERTS)
    enable_elastic_ep: bool = immaterial(False, NO_EXPERTS)
    elastic_ep_max_dp_size: int | None = immaterial(None, NO_EXPERTS)
    enable_dbo: bool = immaterial(False, ONE_DEVICE)
    ubatch_size: int = immaterial(0, ONE_DEVICE)
    dbo_decode_token_threshold: int = immaterial(32, ONE_DEVICE)
    dp_sync_interval: int = immaterial(16, ONE_DEVICE)
    dbo_prefill_token_threshold: int = immaterial(512, ONE_DEVICE)
    disable_nccl_for_dp_synchronization: bool | None = immaterial(None, ONE_DEVICE)
    eplb_config: Any = immaterial(None, NO_EXPERTS)
    enable_eplb: bool = immaterial(False, NO_EXPERTS)
    expert_placement_strategy: str = immaterial("linear", NO_EXPERTS)
    _api_process_count: int = not_built(1, "several API processes")
    _api_process_rank: int = not_built(0, "several API processes")
    prefix_caching_hash_algo: str = immaterial("sha256", "the keys of the prefix cache never leave the process")
    prefix_cache_retention_interval: int | None = not_built(0, "keeping prefix cache entries for a time", also=(None,))
    disable_cascade_attn: bool | None = immaterial(
        None, "prefixes that are read once for several rows change no bit of their results"
    )
    offload_backend: str = immaterial("auto", NO_OFFLOAD)
    cpu_offload_params: Any = immaterial(None, NO_OFFLOAD)
    offload_group_size: int = not_built(0, "offloading weights to host memory")
    offload_num_in_group: int = immaterial(1, NO_OFFLOAD)
    offload_prefetch_step: int = immaterial(1, NO_OFFLOAD)
    offload_params: Any = immaterial(None, NO_OFFLOAD)
    kv_cache_memory_bytes: int | None = implemented(
        None,
        Integer(minimum=1, optional=True, scaled=True),
        "Size of the KV cache in bytes, instead of what gpu_memory_utilization or VLLM_CPU_KVCACHE_SPACE say.",
    )
    max_num_scheduled_tokens: int | None = not_built(None, "a limit of scheduled tokens besides max_num_batched_tokens")
    long_prefill_token_threshold: int = implemented(
        0, Integer(), "Most prompt tokens of one sequence in a step, so that others advance too; 0: no limit."
    )
    long_prefill_token_threshold_adaptive: bool = not_built(False, "a limit of prompt tokens that adapts itself")
    max_num_active_seqs: int | None = not_built(None, "a limit of sequences besides max_num_seqs")
    max_num_queued_reqs: int | None = not_built(None, "a limit of waiting requests")
    max_num_queued_tokens: int | None = not_built(None, "a limit of waiting requests")
    logprobs_mode: str | None = implemented(
        None,
        OneOf(optional=True, values=("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")),
        "What log-probabilities show: logits or their log-softmax, before (raw) or after (processed) penalties, "
        "temperature and filters. Unset: as compat_version says.",
    )
    use_fp64_gumbel: bool = not_built(False, "sampling in double precision")
    enable_trace_replay: bool = immaterial(False, "requests with trace_decode_token_ids need nothing set up")
    aggregate_engine_logging: bool = immaterial(False, ONE_DEVICE)
    hf_token: bool | str | None = implemented(
        None, Token(optional=True), "Access token of the hub, or True for the stored one.", show=False
    )
    model_class_overrides: dict[str, str] | None = not_built(None, "another model class")
    quantization_config: Any = not_built(None, "quantising weights while they are loaded")
    allow_deprecated_quantization: bool = immaterial(False, "no quantization that taco knows is deprecated")
    enable_shm_tensor_arena: bool = immaterial(False, ONE_DEVICE)
    language_model_only: bool = immaterial(False, NO_MEDIA)
    enable_mm_embeds: bool = not_built(False, "multimodal input")
    interleave_mm_strings: bool = not_built(False, "multimodal input")
    media_io_kwargs: dict[str, Any] | None = not_built(None, "multimodal input")
    mm_processor_cache_gb: float = immaterial(4, NO_MEDIA)
    mm_processor_cache_type: str | None = immaterial("lru", NO_MEDIA)
    mm_hasher_algorithm: str = immaterial("blake3", NO_MEDIA)
    mm_shm_cache_max_object_size_mb: int = immaterial(128, NO_MEDIA)
    mm_encoder_only: bool = not_built(False, "running a media encoder alone")
    mm_encoder_tp_mode: str = immaterial("weights", NO_MEDIA)
    mm_encoder_attn_backend: Any = immaterial(None, NO_MEDIA)
    mm_encoder_attn_dtype: str | None = immaterial(None, NO_MEDIA)
    mm_encoder_fp8_scale_path: str | None = immaterial(None, NO_MEDIA)
    mm_encoder_fp8_scale_save_path: str | None = not_built(None, "writing scales of a media encoder")
    mm_encoder_fp8_scale_save_margin: float = immaterial(1.5, NO_MEDIA)
    io_processor_plugin: str | None = not_built(None, "plugins for input and output")
    renderer_num_workers: int = immaterial(1, ONE_TOKENIZER)
    skip_mm_profiling: bool = immaterial(False, NO_MEDIA)
    video_pruning_rate: float | None = immaterial(None, NO_MEDIA)
    video_pruning_method: str = immaterial("evs", NO_MEDIA)
    mm_tensor_ipc: str = immaterial("direct_rpc", NO_MEDIA)
    mm_processor_device: str = immaterial("auto", NO_MEDIA)
    mm_ipc_gpu_memory_gb: float = immaterial(0, NO_MEDIA)
    mm_device_do_normalize: bool | None = immaterial(True, NO_MEDIA)
    default_mm_loras: dict[str, str] | None = immaterial(None, NO_LORA)
    lora_target_modules: list[str] | None = immaterial(None, NO_LORA)
    enable_tower_connector_lora: bool = immaterial(False, NO_LORA)
    specialize_active_lora: bool = immaterial(False, NO_LORA)
    enable_mixed_moe_lora_format: bool = immaterial(False, NO_LORA)
    enable_moe_shared_loras: bool = immaterial(False, NO_LORA)
    max_lora_cls_labels: int | None = immaterial(None, NO_LORA)
    disable_chunked_mm_input: bool = immaterial(False, NO_MEDIA)
    scheduler_reserve_full_isl: bool = not_built(True, "another admission of prompts")
    prefill_schedule_interval: int = not_built(1, "steps without prompts")
    watermark: float = not_built(0.0, "a reserve of free blocks")
    disable_hybrid_kv_cache_manager: bool | None = not_built(
        None, "a KV cache with a layout for each kind of layer", also=(True,)
    )
    structured_outputs_config: Any = implemented(
        None,
        StructuredOutputsRule(optional=True),
        "What holds for guided decoding where a request does not say otherwise: a `StructuredOutputsConfig`, or a dict "
        "of its fields backend, disable_any_whitespace, disable_additional_properties, reasoning_parser and "
        "enable_in_reasoning.",
    )
    aux_output_config: Any = not_built(None, "auxiliary outputs")
    reasoning_parser: str = implemented(
        "",
        ReasoningParser(),
        "Kind of reasoning model: it says which marks enclose reasoning, for `SamplingParams.thinking_token_budget`.",
    )
    reasoning_parser_plugin: str | None = not_built(None, "parsing of reasoning")
    speculative_config: dict[str, Any] | None = not_built(None, "speculative decoding")
    spec_method: str | None = not_built(None, "speculative decoding")
    spec_model: str | None = not_built(None, "speculative decoding")
    spec_tokens: int | None = not_built(None, "speculative decoding")
    watermark_config: Any = implemented(
        None,
        WatermarkRule(optional=True),
        "How drawn tokens are marked: a `taco.watermark.WatermarkConfig` or a dict of its fields, such as key.",
        show=False,
    )
    diffusion_config: dict[str, Any] | None = not_built(None, "diffusion models")
    show_hidden_metrics_for_version: str | None = immaterial(None, "no metric is hidden")
    per_request_spec_decode_metrics: str = not_built("none", "metrics of speculative decoding")
    kv_cache_metrics: bool = not_built(False, "metrics of the life of blocks")
    kv_cache_metrics_sample: float = immaterial(0.01, "it is read only together with kv_cache_metrics")
    custom_histogram_buckets: dict[str, list[float]] | None = not_built(None, "histograms of metrics")
    cudagraph_metrics: bool = not_built(False, "metrics of CUDA graphs")
    enable_layerwise_nvtx_tracing: bool = not_built(False, "NVTX tracing")
    enable_mfu_metrics: bool = not_built(False, "metrics of the use of the device")
    enable_logging_iteration_details: bool = not_built(False, "logging of every step")
    jit_monitor_mode: str = immaterial("warn", "nothing is compiled while it runs")
    jit_monitor_verbose: bool = immaterial(False, "nothing is compiled while it runs")
    enable_mm_processor_stats: bool = not_built(False, "metrics of multimodal input")
    scheduler_cls: Any = not_built(None, "another scheduler class")
    pooler_config: Any = implemented(
        None,
        PoolerRule(optional=True),
        "How a pooling model pools, where that is not what its files say: a `PoolerConfig` or a dict of its fields.",
    )
    attention_config: Any = not_built(None, "the choice of an attention backend")
    engram_config: Any = not_built(None, "models with engrams")
    mamba_config: Any = immaterial(None, NO_STATE_SPACE)
    kernel_config: Any = not_built(None, "the choice of kernels")
    enable_flashinfer_autotune: bool | None = immaterial(None, "FlashInfer is not used")
    monokernel: bool = not_built(False, "the choice of kernels")
    worker_extension_cls: Any = implemented(
        "", ClassName(), "Class whose methods the worker gets, for `LLM.collective_rpc`: `module.name`."
    )
    profiler_config: Any = implemented(
        None,
        ProfilerRule(optional=True),
        "What `LLM.start_profile` records: a `ProfilerConfig` or a dict of its fields, such as torch_profiler_dir. "
        "Unset: what the environment variables VLLM_TORCH_PROFILER_* say.",
    )
    logging_config: Any = not_built(None, 'set-up of logging other than by the logger "taco"')
    log_level: str | None = not_built(None, 'set-up of logging other than by the logger "taco"')
    log_config_file: str | None = not_built(None, 'set-up of logging other than by the logger "taco"')
    kv_events_config: Any = not_built(None, "events of the KV cache")
    ec_transfer_config: Any = not_built(None, "sending encoder results to other engines")
    ec_manager_config: Any = immaterial(None, NO_MEDIA)
    reasoning_config: Any = implemented(
        None,
        ReasoningRule(optional=True),
        "Marks that enclose reasoning: a `taco.config.ReasoningConfig` or a dict of its fields, reasoning_start_str "
        "and reasoning_end_str.",
    )
    enable_sleep_mode: bool = immaterial(False, SLEEPS)
    sleep_mode_backend: str = immaterial("cumem", SLEEPS)
    sleep_mode_offload_cudagraph: bool = immaterial(False, EAGER)
    sleep_preserve_parameter_names: list[str] | None = not_built(None, "keeping some weights through a deep sleep")
    enable_cumem_allocator: bool = not_built(False, "another allocator of GPU memory")
    enable_nccl_comm_suspend: bool = immaterial(False, ONE_DEVICE)
    override_generation_config: dict[str, Any] | None = implemented(
        None, JsonObject(optional=True), "Values that replace or extend what generation_config says."
    )
    model_impl: str = not_built("auto", "another implementation of the models", also=("vllm",))
    attention_backend: Any = not_built(None, "the choice of an attention backend")
    kv_cache_dtype_skip_layers: list[str] | None = immaterial(None, "it is read only with a quantised KV cache")
    mamba_cache_dtype: str = immaterial("auto", NO_STATE_SPACE)
    mamba_ssm_cache_dtype: str = immaterial("auto", NO_STATE_SPACE)
    mamba_block_size: int | None = immaterial(None, NO_STATE_SPACE)
    prefix_match_unit: int | None = not_built(None, "prefix cache entries of another length than a block")
    mamba_cache_mode: str | None = immaterial(None, NO_STATE_SPACE)
    enable_mamba_shared_prefix_checkpoint: bool = immaterial(False, NO_STATE_SPACE)
    replayssm_buffer_len: int = immaterial(16, NO_STATE_SPACE)
    use_replayssm: bool = immaterial(False, NO_STATE_SPACE)
    mamba_backend: Any = immaterial("triton", NO_STATE_SPACE)
    mamba_ssu_algorithm: Any = immaterial(None, NO_STATE_SPACE)
    enable_mamba_cache_stochastic_rounding: bool = immaterial(False, NO_STATE_SPACE)
    mamba_cache_philox_rounds: int = immaterial(0, NO_STATE_SPACE)
    additional_config: dict[str, Any] | None = not_built(None, "configuration of a platform plugin")
    use_tqdm_on_load: bool = immaterial(True, "loading shows no progress bar")
    pt_load_map_location: Any = immaterial("cpu", LOADER)
    logits_processors: list[Any] | None = implemented(
        None,
        LogitsProcessorsRule(optional=True),
        "Classes derived from `taco.logits_processor.LogitsProcessor`, or their names as package.module:Class, whose "
        "objects edit the logits of every step. Unset: none.",
    )
    async_scheduling: bool | None = implemented(
        None,
        OPTIONAL_SWITCH,
        "Plan a step while the previous one runs. Unset: on a GPU, unless disable_async_output_proc.",
    )
    stream_interval: int = not_built(1, "outputs of every few tokens")
    kv_sharing_fast_prefill: bool = not_built(False, "skipping layers in a prefill")
    swa_bounded_replay: bool = not_built(True, "another treatment of sliding windows")
    optimization_level: Any = immaterial(2, EAGER)
    performance_mode: str = not_built("balanced", "planning for short response times", also=("throughput",))
    fault_tolerance_config: Any = not_built(None, "fault tolerance between engines")
    enable_fault_tolerance: bool = not_built(False, "fault tolerance between engines")
    kv_offloading_size: float | None = not_built(None, "a second level of the KV cache")
    kv_offloading_backend: str = immaterial("native", "it is read only together with kv_offloading_size")
    tokens_only: bool = not_built(False, "an engine that takes token ids alone, other than by skip_tokenizer_init")
    shutdown_timeout: int = immaterial(0, "closing the engine waits for nothing")
    watchdog_config: Any = not_built(None, "a watchdog")
    weight_transfer_config: Any = not_built(None, "receiving new weights")
    fail_on_environ_validation: bool = not_built(False, "checking the names of environment variables")
    gdn_prefill_backend: str | None = immaterial(None, NO_STATE_SPACE)
    kda_prefill_backend: str | None = immaterial(None, NO_STATE_SPACE)
    kda_decode_backend: str | None = immaterial(None, NO_STATE_SPACE)

    # Names of TACO-LLM.
    max_context_len_to_capture: int | None = immaterial(None, EAGER, obsolete=True)
    lookahead_cache_config_dir: str | None = not_built(None, "the lookahead cache")
    enable_prefix_cache_offload: bool = not_built(False, "a second level of the prefix cache")
    cpu_prefill_memory_utilization: float = immaterial(0.3, "it is read only together with enable_prefix_cache_offload")
    cpu_decoding_memory_utilization: float = immaterial(0.15, NO_LOOKAHEAD)
    sequence_parallel_size: int = not_built(1, "sequence parallelism")
    conservative_dry_run: bool = not_built(False, "a start-up probe of memory inside kernels")

    # An argument of LLM in vLLM 0.33, and taco's own.
    chat_template: str | None = implemented(
        None, OPTIONAL_TEXT, "Jinja template for chats, instead of the tokenizer's: a file or the text itself."
    )
    compat_version: str | None = implemented(
        None,
        OPTIONAL_TEXT,
        'Whose behaviour holds where versions of vLLM differ: "0.6" or "0.33". Unset: that of the vllm alias, '
        'else "0.6".',
    )

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add a flag for every implemented field: `--max-num-seqs`, for switches `--enforce-eager` and its `--no-`."""
        for name, field, treatment in _table(cls):
            if isinstance(treatment, Implemented):
                help = treatment.help + ("" if field.default is None else f" (default: {field.default})")
                flag = "--" + name.replace("_", "-")
                parser.add_argument(flag, dest=name, default=field.default, help=help, **treatment.rule.flag_options())
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Arguments from a parsed command line; fields without an attribute in `args` keep their defaults."""
        return cls(**{name: getattr(args, name) for name, _, _ in _table(cls) if hasattr(args, name)})

    def create_engine_config(self, usage_context: UsageContext | None = None, headless: bool = False) -> TacoConfig:
        """`create_config`, under vLLM's name.

        Args:
            usage_context: accepted and without effect: taco reports its use to nobody.
            headless: must be False: there are no nodes without an engine of their own.
        """
        if headless:
            raise UnsupportedFeatureError("headless is not supported; leave it out.", parameter="headless", value=True)
        return self.create_config()

    def create_model_config(self) -> ModelConfig:
        """The part of `create_config` that describes the model."""
        return self.create_config().model_config

    def create_load_config(self) -> LoadConfig:
        """The part of `create_config` that says how weights are loaded; the model is not looked for.

        Raises:
            TacoValidationError: as by `create_config`, as far as arguments are wrong by themselves.
        """
        return self._valid()._load_config()

    def create_watermark_config(self) -> WatermarkConfig | None:
        """The part of `create_config` that says how texts are marked; errors as for `create_load_config`."""
        return cast("WatermarkConfig | None", self._valid().watermark_config)

    def create_structured_outputs_config(self) -> StructuredOutputsConfig:
        """What was given as `structured_outputs_config`, else its defaults; errors as for `create_load_config`."""
        return self._valid().structured_outputs_config or StructuredOutputsConfig()

    def validate_tensorizer_args(self) -> None:
        """Checks all arguments, with errors as for `create_load_config`; what taco does not have is refused there."""
        self._valid()

    # None, as what they configure is refused.
    create_diffusion_config = create_logging_config = create_observability_config = validate_tensorizer_args

    def create_speculative_config(self, target_model_config: object, target_parallel_config: object) -> None:
        """None, as speculative decoding is refused; errors as for `create_load_config`."""
        self._valid()

    @classmethod
    def get_batch_defaults(cls, world_size: int) -> tuple[dict[UsageContext, int], dict[UsageContext, int]]:
        """`max_num_batched_tokens` and `max_num_seqs` where nobody states them, by what uses the engine.

        Args:
            world_size: without effect: there is one device.
        """
        num_tokens = DEFAULT_NUM_BATCHED_TOKENS[resolve_device("auto")]
        return dict.fromkeys(UsageContext, num_tokens), dict.fromkeys(UsageContext, DEFAULT_NUM_SEQS)

    def create_config(self) -> TacoConfig:
        """Check every argument, find the model and resolve what depends on it.

        Raises:
            UnsupportedFeatureError: arguments ask for what this version does not have.
            TacoValidationError: arguments are wrong; one error lists all of them. Arguments that depend on the model
                are checked after the others.
        """
        from taco.models.loader.sentence_transformers import read_sentence_transformers_files
        from taco.models.loader.source import load_generation_config
        from taco.models.registry import known_architecture

        problems = _Problems()
        args = self._checked(problems)
        with problems.collecting():
            behaviour = behaviour_for(args.compat_version)
        with problems.collecting():
            envs.check_vllm_variables()
        with problems.collecting():
            device = resolve_device(args.device)
        with problems.collecting():
            cpu_kv_cache_bytes = resolve_cpu_kv_cache_bytes(args.kv_cache_memory_bytes)
        with problems.collecting():
            log_stats_interval_s = None if args.disable_log_stats else envs.log_stats_interval_s()
        with problems.collecting():
            chat_template = resolve_chat_template(args.chat_template)
        with problems.collecting():
            constraints = args.structured_outputs_config or StructuredOutputsConfig()
            reasoning_parser = args.reasoning_parser or constraints.reasoning_parser
            reasoning_config = complete_reasoning_config(args.reasoning_config, reasoning_parser)
        with problems.collecting():
            check_generation_overrides(args.override_generation_config or {})
        with problems.collecting():
            separate_generation_config = read_generation_config(args.generation_config)
        with problems.collecting():
            guided_decoding_config = resolve_guided_decoding(args)
        check_combinations(args, problems)
        problems.raise_all()

        source, hf_config = args._find_model()
        text_config = hf_config.get_text_config()
        architecture = known_architecture(text_config)
        files = read_sentence_transformers_files(source.path) if source.kind == "hf" else None
        task: Task = "generate"
        pooler, is_encoder = None, False
        given = args.pooler_config or args.override_pooler_config
        with problems.collecting():
            if tokens := scores_by_tokens(text_config):
                text_config.score_token_ids = args._token_ids(tokens, source)
            task = resolve_task(args, text_config, architecture, files)
            if task != "generate":
                pooler = resolve_pooler(given or PoolerConfig(), task, text_config, architecture, files)
                if args.logits_processors:
                    problems.add("logits_processors: a pooling model has no logits; drop the argument")
            elif given is not None:
                problems.add('pooler_config: the model is to generate text; pass task="embed", or drop it')
            is_encoder = architecture.is_encoder
            if is_encoder:
                args = for_encoder(args)
        with problems.collecting():
            check_quantization(hf_config, source, args.quantization)
        with problems.collecting():
            check_rope(text_config, args)
        with problems.collecting():
            trained_len = files.max_seq_length if files is not None and pooler is not None else None
            max_model_len = resolve_max_model_len(text_config, args, trained_len)
            max_num_seqs, max_num_batched_tokens = resolve_batch_limits(args, max_model_len, device)
        with problems.collecting():
            own_generation_config = load_generation_config(source, hf_config)
        problems.raise_all()

        dtype = resolve_dtype(
            args.dtype, checkpoint_dtype(hf_config), text_config.model_type, device, behaviour, pools=pooler is not None
        )
        # On a CPU the device work of a step runs in this thread, so there is nothing to overlap it with.
        use_async = _first_given(args.async_scheduling, device != "cpu" and not args.disable_async_output_proc)
        default_logprobs_mode = "processed_logprobs" if behaviour.logprobs_after_processing else "raw_logprobs"
        overrides = args.override_generation_config or {}
        overridden_eos = {name: value for name, value in overrides.items() if name == "eos_token_id"}
        sampling_source = own_generation_config if separate_generation_config is None else separate_generation_config
        return TacoConfig(
            model_config=ModelConfig(
                model=args.model,
                source=source,
                tokenizer=args.tokenizer or args.model,
                tokenizer_mode=cast(Literal["auto", "slow", "mistral"], args.tokenizer_mode),
                skip_tokenizer_init=args.skip_tokenizer_init,
                trust_remote_code=args.trust_remote_code,
                revision=args.revision,
                tokenizer_revision=args.tokenizer_revision or args.revision,
                code_revision=args.code_revision,
                hf_token=args.hf_token,
                dtype=dtype,
                seed=args.seed,
                max_model_len=max_model_len,
                fit_max_model_len=args.max_model_len == FIT_MAX_MODEL_LEN,
                max_logprobs=text_config.vocab_size if args.max_logprobs == -1 else args.max_logprobs,
                logprobs_mode=args.logprobs_mode or default_logprobs_mode,
                served_model_name=args.served_model_name[0] if args.served_model_name else args.model,
                hf_config=hf_config,
                hf_text_config=text_config,
                # A separate file may lack the model's end-of-sequence tokens, without which texts would not end.
                generation_config=own_generation_config | (separate_generation_config or {}) | overridden_eos,
                default_sampling_params=resolve_default_sampling_params(args, sampling_source, behaviour),
                vocab_size=text_config.vocab_size,
                quantization="gguf" if source.kind == "gguf" else None,
                chat_template=chat_template,
                hf_overrides=args.hf_overrides,
                enforce_eager=bool(args.enforce_eager),
                max_seq_len_to_capture=args.max_seq_len_to_capture,
                use_async_output_proc=use_async,
                task=task,
                is_encoder=is_encoder,
                pooler_config=pooler,
                logits_processors=tuple(args.logits_processors or ()),
            ),
            cache_config=CacheConfig(
                block_size=_first_given(args.block_size, DEFAULT_BLOCK_SIZE),
                gpu_memory_utilization=args.gpu_memory_utilization,
                swap_space_bytes=resolve_swap_space_bytes(args, device),
                kv_cache_dtype=dtype,
                enable_prefix_caching=_first_given(args.enable_prefix_caching, behaviour.prefix_caching_default),
                num_gpu_blocks_override=args.num_gpu_blocks_override,
                kv_cache_memory_bytes=args.kv_cache_memory_bytes,
                cpu_kv_cache_bytes=cpu_kv_cache_bytes,
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                policy=cast(Literal["fcfs", "priority"], args.scheduling_policy),
                enable_chunked_prefill=args.enable_chunked_prefill is not False,
                preemption_mode=cast(Literal["swap", "recompute"] | None, args.preemption_mode),
                async_scheduling=use_async,
                long_prefill_token_threshold=args.long_prefill_token_threshold,
            ),
            device_config=DeviceConfig(device=device),
            load_config=args._load_config(),
            parallel_config=ParallelConfig(
                tensor_parallel_size=args.tensor_parallel_size,
                pipeline_parallel_size=args.pipeline_parallel_size,
                data_parallel_size=args.data_parallel_size,
                worker_extension_cls=args.worker_extension_cls or None,
            ),
            behaviour=behaviour,
            profiler_config=args.profiler_config or profiler_from_environment(),
            reasoning_config=reasoning_config,
            watermark_config=args.watermark_config,
            guided_decoding_config=guided_decoding_config,
            log_stats_interval_s=log_stats_interval_s,
        )

    def _checked(self, problems: _Problems) -> Self:
        """A copy with canonical values; where a value is wrong, it has the default and `problems` the error."""
        values: dict[str, Any] = {}
        for name, field, treatment in _table(type(self)):
            values[name] = field.default
            with problems.collecting():
                values[name] = treatment.check(name, getattr(self, name), field.default)
        return type(self)(**values)

    def _valid(self) -> Self:
        """A copy with canonical values, each of which is right by itself."""
        problems = _Problems()
        args = self._checked(problems)
        problems.raise_all()
        return args

    def _load_config(self) -> LoadConfig:
        return LoadConfig(
            load_format=self.load_format,
            download_dir=self.download_dir,
            ignore_patterns=tuple(self.ignore_patterns or ()),
        )

    def _find_model(self) -> tuple[ModelSource, PretrainedConfig]:
        """Where the weights are on this machine, after a download if need be, and the config of the model."""
        from taco.models.loader.source import load_hf_config, resolve_model

        rope = {"rope_scaling": self.rope_scaling, "rope_theta": self.rope_theta}
        rope = {name: value for name, value in rope.items() if value is not None}
        # check_combinations has seen to it that a callable does not meet rope arguments.
        hf_overrides = {**(self.hf_overrides or {}), **rope} if rope else self.hf_overrides
        source = resolve_model(
            self.model,
            revision=self.revision,
            download_dir=self.download_dir,
            hf_token=self.hf_token,
            load_format=self.load_format,
            ignore_patterns=list(self.ignore_patterns) if self.ignore_patterns else None,
        )
        hf_config = load_hf_config(
            source,
            trust_remote_code=self.trust_remote_code,
            revision=self.code_revision,
            hf_overrides=hf_overrides,
        )
        return source, hf_config

    def _token_ids(self, tokens: list[str], source: ModelSource) -> list[int]:
        """Ids of tokens of the tokenizer, which is the one that the engine will load."""
        from taco.tokenizer.loading import load_tokenizer

        revision = self.tokenizer_revision or self.revision
        is_models_own = self.tokenizer in (None, self.model) and revision == self.revision
        tokenizer = load_tokenizer(
            source if is_models_own else self.tokenizer or self.model,
            tokenizer_mode=self.tokenizer_mode,
            trust_remote_code=self.trust_remote_code,
            revision=revision,
            download_dir=self.download_dir,
            hf_token=self.hf_token,
        )
        ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
        if unknown := [
            token for token, found in zip(tokens, ids, strict=True) if found in (None, tokenizer.unk_token_id)
        ]:
            raise TacoValidationError(f"classifier_from_token: the tokenizer does not have {unknown}")
        return ids


@dataclass
class AsyncEngineArgs(EngineArgs):
    """`EngineArgs` with the names that vLLM's asynchronous engine adds."""

    disable_log_requests: bool = immaterial(False, "requests are never logged", obsolete=True)
    enable_log_requests: bool = not_built(False, "logging of every request")

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser, async_args_only: bool = False) -> argparse.ArgumentParser:
        """As `EngineArgs.add_cli_args`.

        Args:
            async_args_only: add none of the flags of `EngineArgs`, which leaves none at all: what this class adds to
                it is not implemented.
        """
        return parser if async_args_only else super().add_cli_args(parser)


def treatment_of(field: dataclasses.Field[Any]) -> Treatment:
    """What happens to the value of a field of `EngineArgs`."""
    return cast(Treatment, field.metadata["treatment"])


def _table(cls: type[EngineArgs]) -> Iterator[tuple[str, dataclasses.Field[Any], Treatment]]:
    for field in dataclasses.fields(cls):
        yield field.name, field, treatment_of(field)


# ----------------------------------------------------------------------------------------------------------------------
# Resolution: what the values come to, given each other, the machine and the model
# ----------------------------------------------------------------------------------------------------------------------


class _Problems:
    """Wrong arguments found so far, to be raised together."""

    def __init__(self) -> None:
        self._errors: list[TacoValidationError] = []

    def add(self, message: str) -> None:
        self._errors.append(TacoValidationError(message))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep an error of the caller's arguments for `raise_all`; what the block was to assign is then missing."""
        try:
            yield
        except TacoValidationError as error:
            self._errors.append(error)

    def raise_all(self) -> None:
        """Raise what was collected, as UnsupportedFeatureError if nothing else is wrong."""
        if not self._errors:
            return
        if len(self._errors) == 1:
            raise self._errors[0]
        only_unsupported = all(isinstance(error, UnsupportedFeatureError) for error in self._errors)
        cls = UnsupportedFeatureError if only_unsupported else TacoValidationError
        lines = "\n".join(f"  {error.message}" for error in self._errors)
        raise cls(f"{len(self._errors)} engine arguments are not valid:\n{lines}")


def check_combinations(args: EngineArgs, problems: _Problems) -> None:
    """Add what is wrong about values that are right one by one."""
    if args.async_scheduling and args.disable_async_output_proc:
        problems.add("async_scheduling=True and disable_async_output_proc=True contradict each other; drop one of them")
    if args.pooler_config is not None and args.override_pooler_config is not None:
        problems.add("pooler_config and override_pooler_config are two names of the same; drop one of them")
    if args.quantization == "gguf" and args.load_format not in ("auto", "gguf"):
        problems.add(f'quantization="gguf" needs load_format="auto" or "gguf", not {args.load_format!r}')
    if args.rope_scaling is not None and not {"rope_type", "type"} & set(args.rope_scaling):
        problems.add(
            f'rope_scaling={args.rope_scaling!r}: needs a "rope_type", as in {{"rope_type": "yarn", "factor": 4.0}}'
        )
    if callable(args.hf_overrides) and (args.rope_scaling is not None or args.rope_theta is not None):
        problems.add("rope_scaling and rope_theta cannot go with a callable hf_overrides; set them in the callable")
    tokenizer = args.tokenizer or args.model
    if args.tokenizer_revision not in (None, args.revision) and Path(tokenizer).expanduser().exists():
        problems.add(
            f"tokenizer_revision={args.tokenizer_revision!r}: {tokenizer} is a local folder or file, which has no "
            "revisions; drop the argument, or pass the hub id of the tokenizer"
        )
    if args.preemption_mode == "swap" and args.swap_space == 0:
        problems.add('preemption_mode="swap" needs a swap_space above 0')
    if args.enable_chunked_prefill is False and args.long_prefill_token_threshold:
        problems.add(
            f"long_prefill_token_threshold={args.long_prefill_token_threshold} splits prompts, "
            "which enable_chunked_prefill=False forbids; drop one of them"
        )


def for_encoder(args: EngineArgs) -> EngineArgs:
    """Arguments for a model whose tokens also see those after them: nothing can be cached, no prompt can be split.

    Raises:
        TacoValidationError: an argument asks for one of these.
    """
    for name in ("enable_chunked_prefill", "enable_prefix_caching", "long_prefill_token_threshold"):
        if getattr(args, name):
            raise TacoValidationError(
                f"{name}={getattr(args, name)!r}: every token of an encoder model sees all others of its text, so that "
                "a text is computed in one step, and nothing of it can be used again; drop the argument",
                parameter=name,
                value=getattr(args, name),
            )
    return dataclasses.replace(args, enable_chunked_prefill=False, enable_prefix_caching=False)


def resolve_device(requested: str) -> Device:
    """The device for `device`: "cuda" only where torch finds one."""
    if requested == "cpu":
        return "cpu"
    import torch

    if torch.accelerator.is_available() and str(torch.accelerator.current_accelerator()).startswith("cuda"):
        return "cuda"
    if requested == "auto":
        return "cpu"
    raise TacoValidationError(
        'device="cuda": torch finds no CUDA device; pass device="cpu", or check the driver and install torch for CUDA',
        parameter="device",
        value=requested,
    )


def resolve_cpu_kv_cache_bytes(kv_cache_memory_bytes: int | None) -> int | None:
    """Size of the KV cache on a CPU: the argument, else VLLM_CPU_KVCACHE_SPACE, else None for the worker to choose."""
    if kv_cache_memory_bytes is not None:
        return kv_cache_memory_bytes
    gib = envs.cpu_kv_cache_space_gib()
    return None if gib is None else int(gib * GIB)


def resolve_swap_space_bytes(args: EngineArgs, device: str) -> int:
    """Size of the swap space: the argument, else 4 GiB where swapping is of use or asked for.

    Swapping on a CPU copies within one memory. A larger KV cache does more with the same bytes.
    """
    if args.swap_space is None:
        return 4 * GIB if device != "cpu" or args.preemption_mode == "swap" else 0
    return int(args.swap_space * GIB)


def profiler_from_environment() -> ProfilerConfig | None:
    """What the environment variables of vLLM say about profiling; None if nothing."""
    options = envs.torch_profiler_options()
    return None if options is None else ProfilerConfig(**options)  # type: ignore[arg-type]


def resolve_guided_decoding(args: EngineArgs) -> GuidedDecodingConfig:
    """What holds for guided decoding where a request does not say otherwise."""
    given = args.structured_outputs_config or StructuredOutputsConfig()
    backends = {
        backend_name(args.guided_decoding_backend, "guided_decoding_backend"),
        backend_name(given.backend, "structured_outputs_config.backend"),
    }
    if len(backends - {"auto"}) > 1:
        raise TacoValidationError(
            f"guided_decoding_backend={args.guided_decoding_backend!r} and structured_outputs_config with "
            f"backend={given.backend!r} contradict each other; give one of them"
        )
    return GuidedDecodingConfig(
        backend=next(iter(backends - {"auto"}), "auto"),
        disable_any_whitespace=given.disable_any_whitespace,
        disable_additional_properties=given.disable_additional_properties,
        enable_in_reasoning=given.enable_in_reasoning,
    )


def resolve_chat_template(template: str | None) -> str | None:
    """The text of a template that is given as a file or as itself."""
    if template is None or "{" in template or "\n" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TacoValidationError(
            f"chat_template={template!r}: no Jinja template (it has no brace), and no file that can be read ({error})",
            parameter="chat_template",
            value=template,
        ) from None


def read_generation_config(name: str | None) -> dict[str, Any] | None:
    """Contents of generation_config.json in the folder that `generation_config` names; None where it names none."""
    from taco.models.loader.source import load_generation_config

    if name is None or name in ("auto", "vllm"):
        return None
    if not (Path(name) / "generation_config.json").is_file():
        raise TacoValidationError(
            f'generation_config={name!r}: must be "auto", "vllm", or a folder that has a generation_config.json',
            parameter="generation_config",
            value=name,
        )
    return load_generation_config(name)


# Which values of generation_config.json become sampling parameters: those of vLLM 0.6, and those that 0.33 added.
_SAMPLING_NAMES = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
_FURTHER_SAMPLING_NAMES = ("presence_penalty", "frequency_penalty", "max_new_tokens", "skip_special_tokens")
# What transformers 4 took a value for that a file does not have.
_TRANSFORMERS_DEFAULTS = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def check_generation_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse names of `override_generation_config` that would have no effect, and wrong end-of-sequence tokens."""
    known = (*_SAMPLING_NAMES, *_FURTHER_SAMPLING_NAMES, "eos_token_id")
    if unknown := sorted(set(overrides) - set(known)):
        raise TacoValidationError(
            f"override_generation_config: {unknown} would have no effect; known are {list(known)}",
            parameter="override_generation_config",
            value=overrides,
        )
    eos = overrides.get("eos_token_id", [])
    if not all(type(token_id) is int for token_id in (eos if isinstance(eos, list) else [eos])):
        raise TacoValidationError(
            f"override_generation_config: eos_token_id must be an int or a list of ints, got {eos!r}",
            parameter="override_generation_config",
            value=overrides,
        )


def resolve_default_sampling_params(
    args: EngineArgs, generation_config: Mapping[str, Any], behaviour: Behaviour
) -> dict[str, Any]:
    """Sampling parameters of a caller who gives none, by the names of `SamplingParams`.

    Where the file applies unasked, all its sampling values do; else only those that vLLM 0.6 took from it. Values of
    `override_generation_config` always apply.
    """
    applies_unasked = behaviour.use_generation_config_defaults
    mode = args.generation_config or ("auto" if applies_unasked else "vllm")
    names = _SAMPLING_NAMES + (_FURTHER_SAMPLING_NAMES if applies_unasked else ())
    values = {} if mode == "vllm" else {name: generation_config.get(name) for name in names}
    if behaviour.drops_transformers_defaults:
        values = {name: value for name, value in values.items() if value != _TRANSFORMERS_DEFAULTS.get(name)}
    overrides = args.override_generation_config or {}
    values |= {name: overrides[name] for name in _SAMPLING_NAMES + _FURTHER_SAMPLING_NAMES if name in overrides}
    renamed = {"max_new_tokens": "max_tokens"}
    return {renamed.get(name, name): value for name, value in values.items() if value is not None}


def check_quantization(hf_config: PretrainedConfig, source: ModelSource, quantization: str | None) -> None:
    """Refuse checkpoints that are quantised in a way that cannot be read."""
    if source.kind == "gguf":
        return
    if quantization == "gguf":
        raise TacoValidationError(
            f'quantization="gguf" needs a .gguf file, and {source.path} is none; drop the argument',
            parameter="quantization",
            value=quantization,
        )
    details = getattr(hf_config, "quantization_config", None)
    if details:
        method = details.get("quant_method") if isinstance(details, Mapping) else getattr(details, "quant_method", None)
        raise UnsupportedFeatureError(
            f"model={str(source.path)!r}: its weights are quantised ({method}), which is not supported; take the model "
            "without quantization, or a .gguf file",
            parameter="model",
        )


def check_rope(text_config: PretrainedConfig, args: EngineArgs) -> None:
    """Refuse arguments about rotary embeddings for models that have none."""
    is_given = args.rope_scaling is not None or args.rope_theta is not None
    if is_given and not getattr(text_config, "rope_parameters", None):
        raise TacoValidationError(
            f"rope_scaling, rope_theta: a model of type {text_config.model_type!r} has no rotary embeddings; drop them"
        )


# Names under which configs say how many positions a model was made for. The smallest counts.
_MAX_LEN_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_target_positions",
    "model_max_length",
    "seq_length",
    "seq_len",
)


# Families whose first row of the position table that a token can have is the one after that of padding.
_POSITIONS_AFTER_PADDING = ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl")


def resolve_max_model_len(text_config: PretrainedConfig, args: EngineArgs, trained_len: int | None = None) -> int:
    """Most tokens of a sequence: what the model was made for, or less if the caller says so.

    `trained_len` is what an embedding model is made for by its authors; a caller may raise it to what the model allows.
    Linear and dynamic scaling of rotary embeddings and YaRN multiply the positions. Other kinds (Llama 3, LongRoPE)
    do not, since their configs state the multiplied number; neither do those of Gemma 3, for the same reason.
    """
    requested = cast(int | None, args.max_model_len)
    stated = {name: getattr(text_config, name, None) for name in _MAX_LEN_NAMES}
    known = {name: number for name, number in stated.items() if isinstance(number, int)}
    if not known:
        if requested is None or requested == FIT_MAX_MODEL_LEN:
            raise TacoValidationError(
                "max_model_len: the model's config does not say how long a sequence may be; pass a number",
                parameter="max_model_len",
                value=requested,
            )
        return requested

    name = min(known, key=lambda name: known[name])
    limit, origin = known[name], name
    if text_config.model_type in _POSITIONS_AFTER_PADDING:
        limit -= text_config.pad_token_id + 1
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type")
    if rope_type in ("linear", "yarn") and "gemma3" not in text_config.model_type:
        start = rope.get("original_max_position_embeddings", limit) if rope_type == "yarn" else limit
        limit, origin = int(start * rope.get("factor", 1.0)), f"{name} with {rope_type} rope scaling"
    window = getattr(text_config, "sliding_window", None)
    if args.disable_sliding_window and window and getattr(text_config, "use_sliding_window", True):
        limit, origin = min(limit, window), "its sliding window, since disable_sliding_window=True"

    if requested is None or requested == FIT_MAX_MODEL_LEN:
        return min(limit, trained_len or limit)
    if requested > limit:
        raise TacoValidationError(
            f"max_model_len={requested}: the model has {limit} positions ({origin}); lower it, or stretch the model "
            'with rope_scaling, such as {"rope_type": "yarn", "factor": 4.0}, if it is made for that',
            parameter="max_model_len",
            value=requested,
        )
    return requested


def resolve_batch_limits(args: EngineArgs, max_model_len: int, device: Device) -> tuple[int, int]:
    """`max_num_seqs` and `max_num_batched_tokens`.

    A step of N tokens advances at most N sequences, so more are not admitted: their KV cache would lie idle.
    """
    num_seqs, num_tokens = args.max_num_seqs, args.max_num_batched_tokens
    is_chunked = args.enable_chunked_prefill is not False
    if num_tokens is None:
        num_tokens = max(DEFAULT_NUM_BATCHED_TOKENS[device], num_seqs or 0, 0 if is_chunked else max_model_len)
    elif not is_chunked and num_tokens < max_model_len:
        raise TacoValidationError(
            f"max_num_batched_tokens={num_tokens}: with enable_chunked_prefill=False a whole prompt must fit into a "
            f"step, so it must be at least max_model_len ({max_model_len}); raise it, lower max_model_len, or allow "
            "chunked prefill",
            parameter="max_num_batched_tokens",
            value=num_tokens,
        )
    if num_seqs is not None and num_seqs > num_tokens:
        logger.warning("max_num_seqs is lowered from %d to max_num_batched_tokens, %d.", num_seqs, num_tokens)
    return min(_first_given(num_seqs, DEFAULT_NUM_SEQS), num_tokens), num_tokens


def checkpoint_dtype(hf_config: PretrainedConfig) -> str:
    """Data type that the config states; "float32" where it states none, as for .gguf files."""
    for config in (hf_config, hf_config.get_text_config()):
        dtype = getattr(config, "dtype", None)
        if dtype is not None:
            return str(dtype).removeprefix("torch.")
    return "float32"


def resolve_dtype(
    requested: str, checkpoint: str, model_type: str, device: Device, behaviour: Behaviour, *, pools: bool = False
) -> str:
    """Data type of weights and activations; one log line says what "auto" came to.

    On a GPU, "auto" keeps 16-bit types and halves others; for pooling models, whose results are the hidden states
    themselves, it halves them to float16, which is the more exact type. On a CPU it is bfloat16 where the processor
    computes in it, else float32: products in float16 are slow there. Gemma models overflow in float16 and get bfloat16.
    """
    is_gemma = model_type.startswith("gemma")
    if requested != "auto":
        if requested == "float16" and is_gemma:
            logger.warning('dtype="float16": activations of Gemma models overflow in it; prefer "bfloat16".')
        elif requested == "float16" and device == "cpu":
            logger.warning('dtype="float16" is slow on a CPU; prefer "bfloat16" or "float32".')
        return requested
    if device == "cpu":
        if cpu_has_bfloat16():
            dtype, reason = "bfloat16", "this processor computes in it"
        else:
            dtype, reason = "float32", "this processor has no bfloat16 instructions"
    elif checkpoint == "bfloat16":
        dtype, reason = "bfloat16", "it is the type of the checkpoint"
    elif is_gemma:
        dtype, reason = "bfloat16", "Gemma models overflow in float16"
    elif checkpoint == "float16":
        dtype, reason = "float16", "it is the type of the checkpoint"
    else:
        dtype = "float16" if pools or behaviour.dtype_auto_float32 == "float16" else "bfloat16"
        reason = "it takes half the memory"
    logger.info('dtype="auto" is %s for this %s checkpoint: %s.', dtype, checkpoint, reason)
    return dtype


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    names = {"avx512_bf16", "amx_bf16", "bf16"}
    import torch

    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.13 and later
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in names)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(names & set(line.split()) for line in lines if line.startswith(("flags", "Features")))


def _first_given(value: T | None, default: T) -> T:
    return default if value is None else value
