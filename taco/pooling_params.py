"""Parameters of requests to pooling models (embeddings, classification, reranking): `PoolingParams`, `PoolerConfig`.

Field names and defaults are the union of those of vLLM 0.6 and vLLM 0.33.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from taco.errors import TacoValidationError, UnsupportedFeatureError
from taco.param_checks import as_bool, as_int, as_number, as_token_ids, require, type_error
from taco.sampling_params import RequestOutputKind
from taco.struct_fields import WithStructFields

if TYPE_CHECKING:
    from taco.config import ModelConfig, PoolerSettings

SEQ_POOLING_TYPES = ("CLS", "LAST", "MEAN")  # one vector for a text
TOK_POOLING_TYPES = ("ALL", "STEP")  # one vector for each token, or for each token that ends a step
POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")
LATE_INTERACTION_MODES = ("cache_query", "score_doc")
_REMOVED_TASKS = {"encode": "token_embed or token_classify", "score": "classify", "reward": "token_classify"}

# Parameters that mean something for a task, besides those that mean something for every task.
TASK_PARAMETERS = {
    "embed": ("use_activation", "dimensions"),
    "token_embed": ("use_activation", "dimensions"),
    "classify": ("use_activation",),
    "token_classify": ("use_activation", "step_tag_id", "returned_token_ids"),
}


def _optional_bool(name: str, value: Any) -> bool | None:
    return None if value is None else as_bool(name, value)


def _optional_int(name: str, value: Any, minimum: int) -> int | None:
    if value is None:
        return None
    number = as_int(name, value)
    require(number >= minimum, name, number, f"must be at least {minimum}")
    return number


def _optional_number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = as_number(name, value)
    require(math.isfinite(number), name, number, "must be a finite number")
    return number


def _optional_token_ids(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    ids = as_token_ids(name, value)
    require(bool(ids), name, ids, "must be a list of at least one token id")
    require(min(ids) >= 0, name, min(ids), "must contain token ids, which are at least 0")
    return ids


@dataclass
class LateInteractionParams(WithStructFields):
    """Scores of token embeddings, computed where they are (vLLM 0.33); not supported.

    Args:
        mode: "cache_query" or "score_doc".
        query_key: under which the query's embeddings are kept.
        query_uses: how often they are used.
    """

    mode: str
    query_key: str
    query_uses: int | None = None

    def verify(self) -> None:
        """Raises TacoValidationError if a field is wrong; that the feature is missing is said when it is used."""
        if self.mode not in LATE_INTERACTION_MODES:
            raise TacoValidationError(
                f"mode must be one of {list(LATE_INTERACTION_MODES)}, got {self.mode!r}.",
                parameter="mode",
                value=self.mode,
            )
        if not isinstance(self.query_key, str) or not self.query_key:
            raise TacoValidationError(
                f"query_key must be a string that is not empty, got {self.query_key!r}.",
                parameter="query_key",
                value=self.query_key,
            )
        _optional_int("query_uses", self.query_uses, 1)


@dataclass
class LateChunkingParams(WithStructFields):
    """One vector for each chunk of a text (vLLM 0.33); not supported.

    Args:
        chunk_size: tokens of a chunk.
    """

    chunk_size: int

    def verify(self) -> None:
        """Raises TacoValidationError if `chunk_size` is not a number of tokens."""
        if _optional_int("chunk_size", self.chunk_size, 1) is None:
            raise type_error("chunk_size", "an int", None)


@dataclass
class PoolingParams(WithStructFields):
    """What a pooling model makes of one prompt.

    Wrong values raise `TacoValidationError` (a ValueError), wrong types `ParameterTypeError` (also a TypeError), when
    the parameters are used: attributes may be assigned until then. What the model and its task do not allow is found
    at the same time.

    Args:
        additional_data: vLLM 0.6's; carried for models that read it, of which neither vLLM nor taco has one.
        use_activation: normalise embeddings to length 1, or turn logits of classes into probabilities; None: as the
            model says, else yes (for reward models: no).
        dimensions: shorten embeddings to this many numbers before they are normalised (Matryoshka embeddings, Kusupati
            et al. 2022, arXiv:2205.13147); for models that are trained for it.
        step_tag_id: for pooling type "STEP": return the rows of these tokens only.
        returned_token_ids: for pooling type "STEP": return these columns only.
        task: "embed", "classify", "token_embed" or "token_classify"; None: what the called method or the model is for.
        requires_token_ids: the engine always has the token ids where it needs them, so this has no effect.
        skip_reading_prefix_cache: compute the whole prompt, even if parts of it are cached.
        late_interaction_params, late_chunking_params, extra_kwargs: must be None; what they ask for is not supported.
        output_kind: must be FINAL_ONLY.
    """

    additional_data: Any = None
    use_activation: bool | None = None
    dimensions: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    task: str | None = None
    requires_token_ids: bool = False
    skip_reading_prefix_cache: bool | None = None
    late_interaction_params: LateInteractionParams | None = None
    extra_kwargs: dict[str, Any] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    late_chunking_params: LateChunkingParams | None = None

    # As of `SamplingParams`: no position of the prompt has log-probabilities.
    first_scored_position: ClassVar[None] = None
    grammar: ClassVar[None] = None

    @property
    def all_parameters(self) -> list[str]:
        """Parameters that mean something for some task."""
        return ["use_activation", "dimensions", "step_tag_id", "returned_token_ids"]

    @property
    def valid_parameters(self) -> dict[str, list[str]]:
        """Those that mean something, by task."""
        return {task: list(names) for task, names in TASK_PARAMETERS.items()}

    def clone(self) -> PoolingParams:
        """A copy that can be changed freely; `extra_kwargs` and `additional_data` are shared."""
        new = copy.copy(self)
        if new.returned_token_ids is not None:
            new.returned_token_ids = list(new.returned_token_ids)
        return new

    def normalise(self) -> None:
        """Checks every field as far as it can be without a model, and brings it into its canonical form.

        Raises:
            TacoValidationError: naming the field.
        """
        self.use_activation = _optional_bool("use_activation", self.use_activation)
        self.dimensions = _optional_int("dimensions", self.dimensions, 1)
        self.step_tag_id = _optional_int("step_tag_id", self.step_tag_id, 0)
        self.returned_token_ids = _optional_token_ids("returned_token_ids", self.returned_token_ids)
        self.skip_reading_prefix_cache = _optional_bool("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        if self.output_kind is not RequestOutputKind.FINAL_ONLY:
            raise TacoValidationError(
                f"output_kind of PoolingParams must be FINAL_ONLY, got {self.output_kind}.",
                parameter="output_kind",
                value=self.output_kind,
            )
        for name in ("late_interaction_params", "late_chunking_params", "extra_kwargs"):
            if getattr(self, name):
                raise UnsupportedFeatureError(
                    f"{name} is not supported: this version of taco does not have late interaction, late chunking or "
                    "pooling plugins; leave it None.",
                    parameter=name,
                    value=getattr(self, name),
                )
        check_task("task", self.task)

    def verify(self, model_config: ModelConfig) -> None:
        """Checks the fields against a model, and fills in what it decides, in place; the engine does so with a copy.

        Raises:
            TacoValidationError: naming the field; or the model generates text.
        """
        self.normalise()
        settings = model_config.pooler_config
        if settings is None:
            raise TacoValidationError(
                'The model generates text and does not pool; load it with task="embed" or another task of pooling.',
                parameter="task",
                value=self.task,
            )
        task = self.task = self.task or settings.task
        if task not in settings.tasks:
            raise TacoValidationError(
                f"Unsupported task: {task!r}. Supported tasks: {list(settings.tasks)}. What a model is used for is "
                "chosen with task= (or runner= and convert=) of LLM.",
                parameter="task",
                value=task,
            )
        for name in self.all_parameters:
            value = getattr(self, name)
            if value is not None and name not in TASK_PARAMETERS[task]:
                raise TacoValidationError(
                    f"{name}={value!r} means nothing for the task {task!r}; leave it None.", parameter=name, value=value
                )
        if self.use_activation is None:
            self.use_activation = settings.use_activation
        if self.dimensions is not None:
            check_dimensions(settings, self.dimensions)
        elif task in ("embed", "token_embed"):
            self.dimensions = settings.dimensions
        if task == "token_classify":
            self.step_tag_id = settings.step_tag_id if self.step_tag_id is None else self.step_tag_id
            if self.returned_token_ids is not None:
                check_returned_token_ids(settings, self.returned_token_ids)
            elif settings.returned_token_ids is not None:
                self.returned_token_ids = list(settings.returned_token_ids)


def check_task(name: str, task: object) -> None:
    """Raises TacoValidationError if `task` is neither a pooling task nor None."""
    if task is None or task in POOLING_TASKS:
        return
    if task in _REMOVED_TASKS:
        hint = f"{task!r} is not the name of a task any more: use {_REMOVED_TASKS[str(task)]}"
    else:
        hint = f"must be one of {list(POOLING_TASKS)}, got {task!r}"
    raise TacoValidationError(f"{name}: {hint}.", parameter=name, value=task)


def check_dimensions(settings: PoolerSettings, dimensions: int) -> None:
    """Raises TacoValidationError if embeddings of the model cannot be shortened to that many numbers."""
    allowed = settings.matryoshka_dimensions
    if allowed is None:
        raise TacoValidationError(
            f"dimensions={dimensions}: the model does not support matryoshka representation, so shortened embeddings "
            'would be poor. If it was trained for it, pass hf_overrides={"is_matryoshka": True} or '
            '{"matryoshka_dimensions": [...]} to LLM.',
            parameter="dimensions",
            value=dimensions,
        )
    if allowed and dimensions not in allowed:
        raise TacoValidationError(
            f"dimensions={dimensions}: the model supports only {list(allowed)}.",
            parameter="dimensions",
            value=dimensions,
        )
    if settings.embedding_size is not None and not 1 <= dimensions <= settings.embedding_size:
        raise TacoValidationError(
            f"dimensions={dimensions}: must be from 1 to {settings.embedding_size}, the size of the embeddings.",
            parameter="dimensions",
            value=dimensions,
        )


def check_returned_token_ids(settings: PoolerSettings, token_ids: Iterable[int]) -> None:
    """Raises TacoValidationError if the model has no such columns."""
    limit = settings.num_logits
    if limit is not None and (bad := [token_id for token_id in token_ids if token_id >= limit]):
        raise TacoValidationError(
            f"returned_token_ids has {bad[0]}, but the model makes {limit} numbers: ids must be below that.",
            parameter="returned_token_ids",
            value=bad[0],
        )


@dataclass
class PoolerConfig:
    """How a model pools, where the caller knows better than the files of the model.

    Args:
        pooling_type: "CLS", "LAST" or "MEAN" for one vector a text, "ALL" or "STEP" for one a token.
        normalize: as `use_activation`, for embeddings.
        softmax: as `use_activation`, for classes.
        step_tag_id, returned_token_ids: see `PoolingParams`.
        task: what the model is used for where the caller does not say.
        seq_pooling_type: "CLS", "LAST" or "MEAN".
        tok_pooling_type: "ALL" or "STEP".
        use_activation: see `PoolingParams`.
        enable_flash_late_interaction: it concerns late interaction, which is not supported, so it has no effect.
        dimensions: see `PoolingParams`.
        enable_chunked_processing: must be False: embeddings of over-long texts by averaging those of their parts.
        max_embed_len: must be None; it goes with `enable_chunked_processing`.
        logit_mean, logit_sigma: logits of classes become (logit - mean) / sigma before the activation.
    """

    pooling_type: str | None = None
    normalize: bool | None = None
    softmax: bool | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    task: str | None = None
    seq_pooling_type: str | None = None
    tok_pooling_type: str | None = None
    use_activation: bool | None = None
    enable_flash_late_interaction: bool = True
    dimensions: int | None = None
    enable_chunked_processing: bool = False
    max_embed_len: int | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None

    def __post_init__(self) -> None:
        for name in ("normalize", "softmax", "use_activation"):
            setattr(self, name, _optional_bool(name, getattr(self, name)))
        self.dimensions = _optional_int("dimensions", self.dimensions, 1)
        self.step_tag_id = _optional_int("step_tag_id", self.step_tag_id, 0)
        self.returned_token_ids = _optional_token_ids("returned_token_ids", self.returned_token_ids)
        self.logit_mean = _optional_number("logit_mean", self.logit_mean)
        self.logit_sigma = _optional_number("logit_sigma", self.logit_sigma)
        if self.logit_sigma is not None and self.logit_sigma <= 0:
            raise TacoValidationError(
                f"logit_sigma must be above 0, got {self.logit_sigma}.", parameter="logit_sigma", value=self.logit_sigma
            )
        if self.enable_chunked_processing or self.max_embed_len is not None:
            raise UnsupportedFeatureError(
                "enable_chunked_processing and max_embed_len are not supported; split long texts yourself, or truncate "
                "them with tokenization_kwargs={'truncate_prompt_tokens': -1}.",
                parameter="enable_chunked_processing",
            )
        check_task("task", self.task)
        self._check_types()

    def _check_types(self) -> None:
        for name, allowed in (
            ("pooling_type", SEQ_POOLING_TYPES + TOK_POOLING_TYPES),
            ("seq_pooling_type", SEQ_POOLING_TYPES),
            ("tok_pooling_type", TOK_POOLING_TYPES),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str) or value.upper() not in allowed:
                raise TacoValidationError(
                    f"{name} must be one of {list(allowed)}, got {value!r}.", parameter=name, value=value
                )
            setattr(self, name, value.upper())
        if self.pooling_type is None:
            return
        name = "seq_pooling_type" if self.pooling_type in SEQ_POOLING_TYPES else "tok_pooling_type"
        if getattr(self, name) not in (None, self.pooling_type):
            raise TacoValidationError(
                f"pooling_type={self.pooling_type!r} and {name}={getattr(self, name)!r} contradict each other; give "
                "one of them.",
                parameter=name,
            )
        setattr(self, name, self.pooling_type)

    def get_seq_pooling_type(self) -> str:
        """`seq_pooling_type`.

        Raises:
            TacoValidationError: it is left to the model.
        """
        return self._given("seq_pooling_type")

    def get_tok_pooling_type(self) -> str:
        """`tok_pooling_type`; errors as for `get_seq_pooling_type`."""
        return self._given("tok_pooling_type")

    def _given(self, name: str) -> str:
        value: str | None = getattr(self, name)
        if value is None:
            raise TacoValidationError(
                f"{name} is not given, so the model decides it; llm.model_config.pooler_config has what it decided.",
                parameter=name,
            )
        return value

    def compute_hash(self) -> str:
        """A digest of all fields: equal for equal configs, in every process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def activates(self, task: str) -> bool | None:
        """What the config says about the activation for a task; None if it leaves it open."""
        if self.use_activation is not None:
            return self.use_activation
        return self.normalize if task in ("embed", "token_embed") else self.softmax

    @classmethod
    def reject_removed_parameters(cls, data: Any) -> Any:
        """`data` unchanged: a mapping of fields, as for the constructor, or something else, which is not looked at.

        Raises:
            TacoValidationError: a field is not known.
        """
        if isinstance(data, dict):
            known = [field.name for field in fields(cls)]
            if unknown := sorted(set(data) - set(known)):
                raise TacoValidationError(f"PoolerConfig has no {', '.join(unknown)}; it has {', '.join(known)}.")
        return data

    @staticmethod
    def from_json(json_str: str) -> PoolerConfig:
        """A config from a JSON object of its fields."""
        return PoolerConfig.from_mapping(json.loads(json_str))

    @staticmethod
    def from_mapping(values: Any) -> PoolerConfig:
        """A config from a dict of its fields, or from an object that has them as attributes.

        Raises:
            TacoValidationError: a field is not known, or its value is wrong.
        """
        if isinstance(values, PoolerConfig):
            return copy.copy(values)
        if not isinstance(values, dict):
            names = [field.name for field in fields(PoolerConfig)]
            values = {name: getattr(values, name) for name in names if hasattr(values, name)}
        return PoolerConfig(**PoolerConfig.reject_removed_parameters(values))
