"""The methods of `LLM` for pooling models: `encode`, `embed`, `classify`, `score`, `reward`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from taco.config import ModelConfig, PoolerSettings
from taco.engine.pooling_config import possible_tasks
from taco.engine.pooling_input import TextPair
from taco.entrypoints.chat import ChatOptions, ChatRenderer
from taco.entrypoints.legacy import merge_legacy_prompts, refuse_adapters
from taco.errors import BatchValidationError, TacoValidationError, UnsupportedFeatureError
from taco.inputs import single_prompts
from taco.models.registry import find_architecture
from taco.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from taco.pooling_params import PoolingParams, check_task

if TYPE_CHECKING:
    from taco.entrypoints.llm import LLM

ParamsArgument = PoolingParams | Sequence[PoolingParams] | None
Progress = bool | Callable[..., Any]
T = TypeVar("T")


class PoolingMixin:
    """The part of `LLM` for pooling models. Batches are checked and run as by `LLM.generate`."""

    @property
    def runner_type(self) -> str:
        """What requests end in: "generate" or "pooling"."""
        return _llm(self).model_config.runner_type

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """What the model can do: ("generate",), or pooling tasks."""
        settings = _llm(self).model_config.pooler_config
        return ("generate",) if settings is None else settings.tasks

    @property
    def pooling_task(self) -> str | None:
        """The pooling task that the model is for; None for a model that generates."""
        settings = _llm(self).model_config.pooler_config
        return None if settings is None else settings.task

    def encode(
        self,
        prompts: Any = None,
        pooling_params: ParamsArgument = None,
        prompt_token_ids: Any = None,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        *,
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | Sequence[int] | None = None,
        on_error: str = "raise",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Pools the hidden states of one or many prompts.

        Args:
            prompts: one prompt (text, token ids, or a dict, see `taco.inputs`) or many of them, or an iterator, see
                `LLM.generate`. A dict of token ids may have `token_type_ids`.
            pooling_params: for all prompts, or a list with one for each. They are not changed.
            prompt_token_ids: deprecated; pass token ids as `prompts`.
            use_tqdm, lora_request, prompt_adapter_request, priority: see `LLM.generate`.
            pooling_task: "embed", "classify", "token_embed" or "token_classify"; None for what the model is for.
            tokenization_kwargs: see `LLM.generate`; `truncation_side` is by default the tokenizer's, and special tokens
                around a text stay in place.
            truncate_prompt_tokens: short for the key of this name in `tokenization_kwargs`.
            on_error: "raise": one error names all bad rows, before any row has run. "return": a bad row gets an output
                with `error` and without `outputs`.

        Returns:
            One output a prompt, in their order: `outputs.data` is a float32 tensor, [D] for a text or [tokens, D].

        Raises:
            BatchValidationError: rows are wrong (for a batch of one row: the row's own error), such as a prompt that is
                longer than the model allows and not to be truncated.
            TacoValidationError: the model does not pool, or other arguments are wrong.
        """
        self._pooler_settings("encode")
        rows = single_prompts(merge_legacy_prompts(prompts, prompt_token_ids, warns=_llm(self).DEPRECATE_LEGACY))
        refuse_adapters(prompt_adapter_request)
        return self._pool(
            rows,
            _with_task(pooling_params, pooling_task),
            use_tqdm,
            lora_request,
            _tokenization(tokenization_kwargs, truncate_prompt_tokens),
            on_error,
            priority=priority,
        )

    def embed(
        self,
        prompts: Any,
        *,
        use_tqdm: Progress = True,
        pooling_params: ParamsArgument = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | Sequence[int] | None = None,
        prompt_name: str | None = None,
        output: str = "outputs",
        on_error: str = "raise",
    ) -> Any:
        """Makes an embedding vector of each prompt.

        Args:
            prompts, pooling_params, use_tqdm, lora_request, prompt_adapter_request, tokenization_kwargs,
            truncate_prompt_tokens, priority, on_error: see `encode`.
            prompt_name: name of a text of config_sentence_transformers.json, such as "query", to put before each
                prompt. None puts nothing there, also where the file names a default.
            output: "outputs" for a list of objects; "numpy" for one array, which takes a fraction of the memory.

        Returns:
            One `EmbeddingRequestOutput` a prompt, whose `outputs.embedding` is a list of floats (for a model that is
            for "token_embed": `PoolingRequestOutput`, as of `encode`). With output="numpy": float32
            [number of prompts, D]; rows with errors are NaN.

        Raises:
            As `encode`.
        """
        settings = self._pooler_settings("embed")
        if output not in ("outputs", "numpy"):
            raise TacoValidationError(
                f'output must be "outputs" or "numpy", got {output!r}.', parameter="output", value=output
            )
        rows = _rows(prompts, prompt_adapter_request)
        if prompt_name is not None:
            rows = _prefixed(rows, _prompt_text(settings, prompt_name))
        if settings.task == "token_embed":
            if output == "numpy":
                raise TacoValidationError(
                    'output="numpy" is one vector a prompt, but this model is for "token_embed"; use encode.',
                    parameter="output",
                    value=output,
                )
            task, transform = "token_embed", None
        else:
            task, transform = "embed", _vector if output == "numpy" else EmbeddingRequestOutput.from_base
        found = self._pool(
            rows,
            _with_task(pooling_params, task),
            use_tqdm,
            lora_request,
            _tokenization(tokenization_kwargs, truncate_prompt_tokens),
            on_error,
            priority=priority,
            transform=transform,
        )
        return _stack(found, settings) if output == "numpy" else found

    def classify(
        self,
        prompts: Any,
        *,
        pooling_params: ParamsArgument = None,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | Sequence[int] | None = None,
        on_error: str = "raise",
    ) -> list[ClassificationRequestOutput]:
        """Says how likely each class of a classification model is for each prompt.

        Args:
            All: see `encode`.

        Returns:
            One output a prompt, whose `outputs.probs` has a float for each class. For a model with a single class it is
            the probability of that class.

        Raises:
            As `encode`.
        """
        self._pooler_settings("classify")
        return self._pool(
            _rows(prompts, prompt_adapter_request),
            _with_task(pooling_params, "classify"),
            use_tqdm,
            lora_request,
            _tokenization(tokenization_kwargs, truncate_prompt_tokens),
            on_error,
            priority=priority,
            transform=ClassificationRequestOutput.from_base,
        )

    def reward(
        self,
        prompts: Any,
        *,
        pooling_params: ParamsArgument = None,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | Sequence[int] | None = None,
        on_error: str = "raise",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Scores each prompt with a reward model.

        Args:
            All: see `encode`.

        Returns:
            One output a prompt. For reward models `outputs.data` is [tokens, labels], or [steps, labels] with pooling
            type "STEP"; for classification models it is [labels], the logits of the whole text: no activation is
            applied unless `pooling_params` ask for it.

        Raises:
            As `encode`.
        """
        settings = self._pooler_settings("reward")
        if pooling_params is None and settings.task == "classify":
            pooling_params = PoolingParams(use_activation=False)
        return self._pool(
            _rows(prompts, prompt_adapter_request),
            _with_task(pooling_params, settings.task),
            use_tqdm,
            lora_request,
            _tokenization(tokenization_kwargs, truncate_prompt_tokens),
            on_error,
            priority=priority,
        )

    def score(
        self,
        data_1: Any,
        data_2: Any,
        /,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        pooling_params: PoolingParams | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        on_error: str = "raise",
    ) -> list[ScoringRequestOutput]:
        """Says how well texts go together: by a model for pairs (cross-encoder), or by the cosine of their embeddings.

        Args:
            data_1: a text or a list of texts (a text may be a dict with `prompt` or `prompt_token_ids`).
            data_2: likewise; the numbers of texts must be 1 and 1, 1 and N, or N and N.
            truncate_prompt_tokens: most tokens of a pair (of each text, where they are embedded one by one).
            chat_template: Jinja text, or a file of it, that makes one prompt of the messages "query" and "document",
                for decoders that were trained so; None lets the tokenizer join the texts.
            use_tqdm, lora_request, prompt_adapter_request, pooling_params, tokenization_kwargs, on_error: see `encode`.

        Returns:
            One output a pair, whose `outputs.score` is a float.

        Raises:
            As `encode`.
        """
        self._pooler_settings("score")
        refuse_adapters(prompt_adapter_request)
        texts_1, texts_2 = _texts(data_1), _texts(data_2)
        for side, name in ((texts_1, "text"), (texts_2, "text_pair")):
            if not side:
                raise TacoValidationError(f"At least one {name} element must be given.", parameter=name)
        if len(texts_1) not in (1, len(texts_2)):
            raise TacoValidationError(
                f"Input lengths must be either 1:1, 1:N or N:N, got {len(texts_1)}:{len(texts_2)}."
            )
        options = _tokenization(tokenization_kwargs, truncate_prompt_tokens)
        if not _llm(self).model_config.is_cross_encoder:
            if chat_template is not None:
                raise TacoValidationError(
                    "chat_template is for models that score pairs; this one embeds each text by itself.",
                    parameter="chat_template",
                )
            params = _with_task(pooling_params, "embed")
            found = self._pool_texts(texts_1, texts_2, params, use_tqdm, lora_request, options, on_error)
            firsts, seconds = found[: len(texts_1)], found[len(texts_1) :]
            firsts = firsts * (len(seconds) // len(firsts))
            separator = getattr(_llm(self).llm_engine.input_processor.tokenizer, "pad_token_id", None)
            return [_cosine(*pair, separator) for pair in zip(firsts, seconds, strict=True)]
        rows: Sequence[Any]
        rows = [self._pair(*texts) for texts in zip(texts_1 * (len(texts_2) // len(texts_1)), texts_2, strict=True)]
        if chat_template is not None:
            rows = self._rendered(rows, chat_template)
        return self._pool(
            rows,
            _with_task(pooling_params, "classify"),
            use_tqdm,
            lora_request,
            options,
            on_error,
            transform=ScoringRequestOutput.from_base,
        )

    # Parts

    def _pool_texts(
        self, firsts: list[object], seconds: list[object], params: Any, use_tqdm: Progress, *options: Any
    ) -> list[Any]:
        """`_pool` for the texts of pairs, one by one; errors name pairs."""

        def name_row(index: int) -> str:
            return f"{index} (first text)" if index < len(firsts) else f"{index - len(firsts)} (second text)"

        try:
            return self._pool([*firsts, *seconds], params, use_tqdm, *options, name_row=name_row)
        except BatchValidationError as error:
            raise _by_pair(error, len(firsts), len(seconds)) from None
        except BaseException as error:
            vars(error).pop("finished_outputs", None)  # they are of texts
            raise

    def _pool(
        self,
        rows: Iterable[object],
        params: PoolingParams | list[PoolingParams],
        use_tqdm: Progress,
        lora_request: Any,
        tokenization_kwargs: Mapping[str, Any] | None,
        on_error: str,
        *,
        priority: int | Sequence[int] | None = None,
        transform: Callable[[Any], Any] | None = None,
        name_row: Callable[[int], object] = int,
    ) -> list[Any]:
        llm = _llm(self)
        if isinstance(rows, list) and not rows and llm.llm_engine.config.behaviour.pooling_needs_prompts:
            raise TacoValidationError("You must pass at least one prompt.", parameter="prompts")
        return llm._run_batch(
            rows,
            llm._columns(params, lora_request, priority),
            llm._engine().input_processor.tokenize_options(tokenization_kwargs),
            use_tqdm,
            on_error,
            transform=transform,
            name_row=name_row,
        )

    def _pooler_settings(self, method: str) -> PoolerSettings:
        """Settings of the model.

        Raises:
            TacoValidationError: the model is not for this method.
        """
        llm = _llm(self)
        llm._engine()
        model = llm.model_config
        settings = model.pooler_config
        if settings is None:
            raise TacoValidationError(
                f"LLM.{method}() is only supported for pooling models. This model was loaded to generate text. "
                + task_advice(model, _TASKS[method])
            )
        tasks = {name: _TASKS[name] for name in ("embed", "classify", "reward")}
        if method in tasks and model.task not in tasks[method]:
            what = {"embed": "Embedding", "classify": "Classification", "reward": "Reward"}[method]
            raise TacoValidationError(
                f"{what} API is only enabled for `--task {tasks[method][0]}`, but the model is used for "
                f"{model.task!r}. {task_advice(model, _TASKS[method])}"
            )
        if method == "score" and model.task not in ("embed", "score"):
            raise TacoValidationError(
                "Your model does not support cross encoding: score needs a model with embeddings, or a classification "
                f"model with num_labels == 1. {task_advice(model, _TASKS[method])}"
            )
        return settings

    def _plain_text(self, text: object) -> str:
        """A text of a pair: the tokenizer joins texts, so token ids become text again."""
        if isinstance(text, Mapping) and isinstance(text.get("prompt"), str):
            text = text["prompt"]
        elif isinstance(text, Mapping) and text.get("prompt_token_ids") is not None:
            text = _llm(self).get_tokenizer().decode(text["prompt_token_ids"])
        if not isinstance(text, str):
            raise TacoValidationError(
                f"score takes texts (or dicts with a prompt), but one is of type {type(text).__name__}.",
                parameter="data_1",
                value=text,
            )
        return text

    def _pair(self, text: object, text_pair: object) -> TextPair | TacoValidationError:
        """A prompt of two texts, or what is wrong with them."""
        try:
            return TextPair(self._plain_text(text), self._plain_text(text_pair))
        except TacoValidationError as error:
            return error

    def _rendered(
        self, pairs: Sequence[TextPair | TacoValidationError], chat_template: str | os.PathLike[str]
    ) -> list[object]:
        """The prompt of each pair, or what is wrong with it."""
        options = ChatOptions(chat_template, add_generation_prompt=False)
        renderer = ChatRenderer(_llm(self).get_tokenizer(), options, _llm(self).llm_engine.config.behaviour)

        def render(pair: TextPair | TacoValidationError) -> object:
            if isinstance(pair, TacoValidationError):
                return pair
            texts = {"query": pair.text, "document": pair.text_pair}
            try:
                return renderer.render([{"role": role, "content": text} for role, text in texts.items()])
            except TacoValidationError as error:
                return error

        return [render(pair) for pair in pairs]


# The tasks that a method needs one of, the most likely first.
_TASKS = {
    "embed": ("embed",),
    "classify": ("classify", "score"),
    "reward": ("reward", "classify", "score"),
    "score": ("score", "embed"),
    "encode": ("embed", "classify", "reward"),
}


def task_advice(model: ModelConfig, wanted: Sequence[str]) -> str:
    """What to say where a model was not loaded for any of the wanted tasks: one that it can do, or what it can do."""
    architecture = find_architecture(model.hf_text_config)
    possible = set() if architecture is None else possible_tasks(model.hf_text_config, architecture)
    usable = [task for task in wanted if task in possible]
    if usable:
        advice = f"It can do this if task={usable[0]!r} is passed to LLM"
        convert = " (or --convert embed|classify, in vLLM 0.33)" if usable[0] in ("embed", "classify") else ""
        return f"{advice}{convert}."
    return f"It cannot do this: its tasks are {', '.join(map(repr, sorted(possible))) or repr(model.task)}."


def _llm(mixin: PoolingMixin) -> LLM:
    return cast("LLM", mixin)


def _rows(prompts: Any, prompt_adapter_request: object) -> Iterable[object]:
    """Single prompts: a list, or the iterator that was passed."""
    refuse_adapters(prompt_adapter_request)
    return single_prompts(prompts)


def _by_pair(error: BatchValidationError, num_firsts: int, num_pairs: int) -> TacoValidationError:
    """What is wrong with the texts of pairs, first ones before second ones, as what is wrong with pairs."""
    messages: dict[int, list[str]] = {}
    for index, message in sorted(error.errors.items()):
        if index >= num_firsts:
            messages.setdefault(index - num_firsts, []).append(f"second text: {message}")
        else:
            for pair in range(num_pairs) if num_firsts == 1 else [index]:
                messages.setdefault(pair, []).append(f"first text: {message}")
    joined = {pair: " ".join(parts) for pair, parts in messages.items()}
    return TacoValidationError(joined[0]) if num_pairs == 1 else BatchValidationError(joined, num_pairs)


def _texts(data: object) -> list[object]:
    return list(data) if isinstance(data, (list, tuple)) else [data]


def _tokenization(
    tokenization_kwargs: Mapping[str, Any] | None, truncate_prompt_tokens: int | None
) -> Mapping[str, Any] | None:
    if truncate_prompt_tokens is None:
        return tokenization_kwargs
    given = dict(tokenization_kwargs or {})
    if given.setdefault("truncate_prompt_tokens", truncate_prompt_tokens) != truncate_prompt_tokens:
        raise TacoValidationError(
            "truncate_prompt_tokens is given twice, with different values.", parameter="truncate_prompt_tokens"
        )
    return given


def _with_task(params: ParamsArgument, task: str | None) -> PoolingParams | list[PoolingParams]:
    """Copies of parameters, those of the default if None, with the task where they have none.

    Rows that came with the same object share their copy, so that it is checked once.
    """
    check_task("pooling_task", task)
    if params is None:
        return PoolingParams(task=task)
    copies: dict[int, PoolingParams] = {}

    def copy_of(one: Any) -> Any:
        if not isinstance(one, PoolingParams):
            return one  # the input processor says what is wrong
        if id(one) not in copies:
            copy = copies[id(one)] = one.clone()
            if copy.task is None:
                copy.task = task
            elif task is not None and copy.task != task:
                raise TacoValidationError(
                    f"You cannot overwrite task={copy.task!r} of PoolingParams with {task!r}; leave it None.",
                    parameter="pooling_task",
                    value=task,
                )
        return copies[id(one)]

    return [copy_of(one) for one in params] if isinstance(params, (list, tuple)) else copy_of(cast(Any, params))


def _prompt_text(settings: PoolerSettings, name: str) -> str:
    if name not in settings.prompts:
        raise TacoValidationError(
            f"prompt_name={name!r}: the model's config_sentence_transformers.json has the prompts "
            f"{list(settings.prompts)}.",
            parameter="prompt_name",
            value=name,
        )
    if not settings.include_prompt:
        raise UnsupportedFeatureError(
            "prompt_name: this model pools without the tokens of the prompt, which is not implemented.",
            parameter="prompt_name",
            value=name,
        )
    return settings.prompts[name]


def _prefixed(rows: Iterable[object], prefix: str) -> Iterable[object]:
    """Prompts with a text before them; what is no text is left to be found wrong."""

    def with_prefix(row: object) -> object:
        if isinstance(row, str):
            return prefix + row
        if isinstance(row, Mapping) and isinstance(row.get("prompt"), str) and row.get("prompt_token_ids") is None:
            return {**row, "prompt": prefix + row["prompt"]}
        return TacoValidationError("prompt_name goes with texts, not with token ids.", parameter="prompt_name")

    changed = map(with_prefix, rows)
    return list(changed) if isinstance(rows, list) else changed


def _vector(output: PoolingRequestOutput[PoolingOutput]) -> np.ndarray | None:
    """The data of an output, None for a row with an error."""
    return None if output.error is not None else output.outputs.data.numpy()


def _stack(vectors: list[np.ndarray | None], settings: PoolerSettings) -> np.ndarray:
    size = next((len(vector) for vector in vectors if vector is not None), settings.embedding_size or 0)
    array = np.full((len(vectors), size), np.nan, np.float32)
    for index, vector in enumerate(vectors):
        if vector is not None:
            array[index] = vector
    return array


def _cosine(
    first: PoolingRequestOutput[PoolingOutput], second: PoolingRequestOutput[PoolingOutput], separator: int | None
) -> ScoringRequestOutput:
    """The score of two embeddings; its tokens are those of both texts, with the padding token between them."""
    named = (("first text", first.error), ("second text", second.error))
    error = " ".join(f"{name}: {error}" for name, error in named if error is not None) or None
    output: Any = None
    if error is None:
        a, b = first.outputs.data, second.outputs.data
        output = ScoringOutput(float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-12)))
    return ScoringRequestOutput(
        f"{first.request_id}_{second.request_id}",
        output,
        [*first.prompt_token_ids, *([] if separator is None else [separator]), *second.prompt_token_ids],
        True,
        (first.num_cached_tokens or 0) + (second.num_cached_tokens or 0),
        error=error,
    )
