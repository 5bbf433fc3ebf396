"""`LLM`: the class that most users need."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar

from taco.config import ModelConfig
from taco.constraint_params import StructuredOutputsParams
from taco.engine.arg_utils import EngineArgs
from taco.engine.input_processor import TokenizeOptions
from taco.engine.llm_engine import LLMEngine
from taco.entrypoints.batch import Batch, Columns, Counter
from taco.entrypoints.beam_search import BeamSearchMixin
from taco.entrypoints.chat import ChatOptions, ChatRenderer, split_conversations
from taco.entrypoints.control import ControlMixin
from taco.entrypoints.legacy import merge_legacy_prompts, positional_is_deprecated, refuse_adapters, with_guided_options
from taco.entrypoints.pooling import PoolingMixin, task_advice
from taco.entrypoints.progress import Progress
from taco.errors import (
    AbsentAttribute,
    EngineAsleepError,
    EngineDeadError,
    TacoError,
    TacoValidationError,
    unknown_arguments,
)
from taco.guided.request import with_constraint
from taco.inputs import single_prompts, split_prompts
from taco.interrupts import interrupts_deferred
from taco.outputs import RequestOutput
from taco.sampling_params import SamplingParams
from taco.tool_calls import tool_choice_schema

logger = logging.getLogger(__name__)


class LLM(BeamSearchMixin, PoolingMixin, ControlMixin):
    """Generates text for many prompts with one model.

    Every argument of `EngineArgs` is accepted; the ones in the signature are those of both vLLM versions. All but
    `model` should be given by name.

    Args:
        model: folder, .gguf file or hub id of the model.
        compat_version: whose behaviour holds where versions of vLLM differ, "0.6" or "0.33"; None is the version of the
            vllm alias (`taco.vllm_alias`) where that is installed, else "0.6".
        kwargs: further fields of `EngineArgs`, such as `max_model_len` and `max_num_seqs`.

    Raises:
        TypeError: an argument is not known.
        TacoValidationError: arguments are wrong; one error lists all of them.
        OutOfMemoryError: weights and KV cache do not fit; the message gives arguments that would.

    Use it in a `with` statement, call `close`, or delete it to give all memory back. One thread runs requests at a
    time; calls from other threads wait.
    """

    DEPRECATE_LEGACY: ClassVar[bool] = True  # whether `prompt_token_ids` makes a DeprecationWarning
    DEPRECATE_INIT_POSARGS: ClassVar[bool] = True  # whether positional arguments after `model` do

    @positional_is_deprecated(2)
    def __init__(
        self,
        model: str,
        # The names of vLLM 0.6.6, in its order.
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        allowed_local_media_path: str = "",
        tensor_parallel_size: int = 1,
        dtype: Any = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float = 0.9,
        swap_space: float | None = None,
        cpu_offload_gb: float = 0,
        enforce_eager: bool | None = None,
        max_seq_len_to_capture: int = 8192,
        disable_custom_all_reduce: bool = False,
        disable_async_output_proc: bool = False,
        hf_overrides: Any = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        task: str = "auto",
        override_pooler_config: Any = None,
        compilation_config: Any = None,
        *,
        # Names that vLLM 0.33 added.
        runner: str = "auto",
        convert: str = "auto",
        allowed_media_domains: list[str] | None = None,
        chat_template: str | None = None,
        offload_group_size: int = 0,
        offload_num_in_group: int = 1,
        offload_prefetch_step: int = 1,
        offload_params: Any = None,
        enable_return_routed_experts: bool = False,
        return_sampling_mask: bool = False,
        hf_token: bool | str | None = None,
        pooler_config: Any = None,
        structured_outputs_config: Any = None,
        profiler_config: Any = None,
        attention_config: Any = None,
        kv_cache_memory_bytes: int | None = None,
        quantization_config: Any = None,
        logits_processors: list[Any] | None = None,
        spec_method: str | None = None,
        spec_model: str | None = None,
        spec_tokens: int | None = None,
        # taco's own.
        compat_version: str | None = None,
        **kwargs: Any,
    ) -> None:
        named = {name: value for name, value in locals().items() if name not in ("self", "kwargs")}
        _check_names(kwargs)
        self._lock = threading.RLock()
        self._is_closed = False
        self.request_counter = Counter()
        self._enqueued: list[str] = []
        kwargs.setdefault("disable_log_stats", True)
        self.engine_class = self.get_engine_class()
        self.llm_engine = self.engine_class.from_engine_args(EngineArgs(**named, **kwargs))

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        """Creates an LLM from the arguments of an engine."""
        return cls(**vars(engine_args))

    @classmethod
    @contextmanager
    def deprecate_legacy_api(cls) -> Iterator[None]:
        """Within the block, `DEPRECATE_LEGACY` is True, for a program that has set it to False elsewhere."""
        before, cls.DEPRECATE_LEGACY = cls.DEPRECATE_LEGACY, True
        try:
            yield
        finally:
            cls.DEPRECATE_LEGACY = before

    @staticmethod
    def get_engine_class() -> type[LLMEngine]:
        """The class of `llm_engine`; a subclass of `LLM` may choose its own."""
        return LLMEngine

    # Generation

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Any = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        guided_options_request: Any = None,
        priority: int | Sequence[int] | None = None,
        *,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Generates completions for one or many prompts.

        Args:
            prompts: one prompt (text, token ids, or a dict, see `taco.inputs`) or many of them. A list is checked as a
                whole before anything runs. An iterator is read as the engine advances, a few thousand prompts ahead at
                most.
            sampling_params: for all prompts, or a list with one for each; None for the model's default. They are not
                changed (vLLM sets `output_kind` of the caller's object).
            prompt_token_ids: deprecated; pass token ids as `prompts`.
            use_tqdm: show a progress bar; a callable is used in place of `tqdm.tqdm`.
            lora_request, prompt_adapter_request: must be None in this version.
            guided_options_request: deprecated; pass `guided_decoding` of `SamplingParams`. A dict with one key, or a
                `GuidedDecodingRequest`, for all prompts.
            priority: for all prompts or a list; smaller runs earlier under scheduling_policy="priority". Prompts from
                an iterator are ordered among those that have been read.
            tokenization_kwargs: `truncate_prompt_tokens`, `truncation_side`, `max_length`, `truncation`,
                `add_special_tokens`; see `InputProcessor.tokenize_options`.
            mm_processor_kwargs: must be None in this version.
            on_error: "raise": one error names all bad rows, before any row has run. "return": a bad row gets an output
                with finish_reason "error" and its `error`, and the others are what they would be without it.

        Returns:
            One output a prompt, in their order.

        Raises:
            BatchValidationError: rows are wrong (for a batch of one row: the row's own error).
            TacoValidationError: other arguments are wrong.
            TacoError: a row failed while it ran; the others were aborted.
            EngineDeadError: the LLM was closed.

            What is raised while rows run, KeyboardInterrupt for Ctrl-C among them, has an attribute `finished_outputs`:
            a dict by row of the outputs that were finished.
        """
        engine = self._generating_engine("generate")
        rows = single_prompts(merge_legacy_prompts(prompts, prompt_token_ids, warns=self.DEPRECATE_LEGACY))
        refuse_adapters(prompt_adapter_request, mm_processor_kwargs)
        columns = self._columns(sampling_params, lora_request, priority)
        if guided_options_request is not None:
            columns = replace(columns, params=with_guided_options(columns.params, guided_options_request))
        return self._run_batch(
            rows,
            columns,
            engine.input_processor.tokenize_options(tokenization_kwargs),
            use_tqdm,
            on_error,
        )

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        chat_template: str | os.PathLike[str] | int | Sequence[int] | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        on_error: str = "raise",
    ) -> list[RequestOutput]:
        """Generates the next message of one or many conversations.

        Args:
            messages: a list of messages (dicts with "role" and "content"), or a list or iterator of such lists.
            sampling_params, use_tqdm, lora_request, mm_processor_kwargs, priority, on_error: see `generate`.
            chat_template: Jinja text, a file, or the name of one of the tokenizer's templates; None for the
                `chat_template` of the LLM, else the tokenizer's. The fifth positional argument is `priority` in vLLM
                0.33: integers are taken as that.
            chat_template_content_format: "string" or "openai" (a list of parts), the form of content that the template
                reads; "auto" finds out and leaves content alone that has a form that it reads.
            add_generation_prompt: end the prompt with the beginning of the model's message.
            continue_final_message: the model goes on with the last message instead; needs add_generation_prompt=False.
            tools: JSON schemas, or functions with type hints and a docstring, that the template describes to the model.
            tool_choice: "auto" or None: the model calls tools as it likes. "none": it is not told of them. "required":
                the text is a JSON list of one call or more, each with the "name" and the "parameters" of one of the
                `tools`. `{"type": "function", "function": {"name": ...}}`: it is a JSON object, the arguments of that
                tool. `taco.parse_tool_calls` reads the calls.
            chat_template_kwargs: further variables for the template, such as `enable_thinking` or `documents`; and
                `chat_template`, where the argument of that name is None.
            tokenization_kwargs: see `generate`; `add_special_tokens` is False unless given here, as templates write
                special tokens themselves.

        Returns:
            One output a conversation, in their order; `prompt` is the text that the template made.

        Raises:
            As `generate`.
        """
        engine = self._generating_engine("chat")
        if chat_template is not None and not isinstance(chat_template, (str, os.PathLike)):
            if priority is not None:
                raise TacoValidationError("chat_template must be a string.", parameter="chat_template")
            chat_template, priority = None, chat_template
        refuse_adapters(None, mm_processor_kwargs)
        options = ChatOptions(
            chat_template,
            chat_template_content_format,
            add_generation_prompt,
            continue_final_message,
            None if tool_choice == "none" else tools,
            chat_template_kwargs or {},
        )
        rendered, num_rows = self._render(messages, options)
        return self._run_batch(
            rendered,
            _with_tool_choice(self._columns(sampling_params, lora_request, priority), tools, tool_choice),
            engine.input_processor.tokenize_options(tokenization_kwargs, add_special_tokens=False),
            use_tqdm,
            on_error,
            num_rows=num_rows,
        )

    def enqueue(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Enters prompts as `generate` does, but leaves running them to `wait_for_completion`.

        Prompts of several calls are run together. All of them are in the engine at once, so `generate` with an iterator
        is the way for very many.

        Args:
            prompts, sampling_params, lora_request, priority, tokenization_kwargs, mm_processor_kwargs: see `generate`.
            use_tqdm: without effect, as entering shows no progress.

        Returns:
            The ids of the requests, in the order of the prompts.

        Raises:
            As `generate`; nothing has been entered then.
        """
        engine = self._generating_engine("enqueue")
        refuse_adapters(None, mm_processor_kwargs)
        rows = split_prompts(prompts)
        return self._enqueue(
            rows,
            len(rows),
            self._columns(sampling_params, lora_request, priority),
            engine.input_processor.tokenize_options(tokenization_kwargs),
        )

    def enqueue_chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        *,
        tool_choice: str | Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Enters conversations as `chat` does, but leaves running them to `wait_for_completion`; see `enqueue`."""
        engine = self._generating_engine("enqueue_chat")
        refuse_adapters(None, mm_processor_kwargs)
        options = ChatOptions(
            chat_template,
            chat_template_content_format,
            add_generation_prompt,
            continue_final_message,
            None if tool_choice == "none" else tools,
            chat_template_kwargs or {},
        )
        conversations = list(messages) if isinstance(messages, Iterator) else messages
        rendered, num_rows = self._render(conversations, options)
        assert num_rows is not None
        return self._enqueue(
            rendered,
            num_rows,
            _with_tool_choice(self._columns(sampling_params, lora_request, priority), tools, tool_choice),
            engine.input_processor.tokenize_options(tokenization_kwargs, add_special_tokens=False),
        )

    def wait_for_completion(
        self, output_type: type | tuple[type, ...] | None = None, *, use_tqdm: bool | Callable[..., Any] = True
    ) -> list[Any]:
        """Runs what was enqueued to its end.

        Args:
            output_type: what each output has to be an instance of; None for anything.
            use_tqdm: see `generate`.

        Returns:
            The outputs, in the order in which their prompts were entered; after them, those of requests that were
            added to `llm_engine` directly. One that failed while it ran has the finish_reason "error", one that `sleep`
            aborted "abort".

        Raises:
            EngineAsleepError: the engine is asleep; the requests stay.
            TypeError: an output is of another type than `output_type`.
        """
        with self._lock:
            engine = self._engine()
            reason = engine.why_idle()
            if reason is not None and engine.output_processor.num_unfinished:
                raise EngineAsleepError(reason)
            enqueued, self._enqueued = self._enqueued, []
            outputs: dict[str, Any] = {}
            try:
                counts_samples = engine.config.behaviour.progress_counts_samples
                children = engine.output_processor.child_ids
                total = sum(len(children(name)) for name in enqueued) if counts_samples else len(enqueued)
                with Progress(use_tqdm, total, counts_samples=counts_samples) as progress:
                    while engine.has_unfinished_requests():
                        with interrupts_deferred():
                            for output in engine.step():
                                outputs[output.request_id] = output
                                progress.add(output)
                        progress.step()
            except BaseException as error:
                error.finished_outputs = {  # type: ignore[attr-defined]
                    index: outputs[name] for index, name in enumerate(enqueued) if name in outputs
                }
                with interrupts_deferred(drops=True):
                    engine.abort_request(enqueued)
                raise
        for output in outputs.values():
            if output_type is not None and not isinstance(output, output_type):
                raise TypeError(f"Expected outputs of the type {output_type}, got {type(output)}.")
        return [outputs[request_id] for request_id in dict.fromkeys([*enqueued, *outputs]) if request_id in outputs]

    # Private names of vLLM that programs use which extend its `LLM`.

    def _add_request(
        self,
        prompt: Any,
        params: SamplingParams,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        priority: int = 0,
    ) -> str:
        """`enqueue` for one prompt; returns its id. The fourth argument is `priority` in vLLM 0.33, if it is an int."""
        if isinstance(prompt_adapter_request, int):
            prompt_adapter_request, priority = None, prompt_adapter_request
        refuse_adapters(prompt_adapter_request, None)
        [request_id] = self.enqueue([prompt], params, lora_request, priority)
        return request_id

    def _run_engine(
        self, output_type: type | tuple[type, ...] | None = None, *, use_tqdm: bool | Callable[..., Any] = True
    ) -> list[Any]:
        """`wait_for_completion`."""
        return self.wait_for_completion(output_type, use_tqdm=use_tqdm)

    # Tokenizer, defaults, state

    def get_tokenizer(self) -> Any:
        """The tokenizer itself: a `chat_template` set on it is used by `chat`.

        Raises:
            TacoValidationError: the LLM was made with `skip_tokenizer_init=True`.
        """
        return self._engine().get_tokenizer()

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Replaces the tokenizer."""
        self._engine().set_tokenizer(tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters that hold where a caller gives none; a new object each time."""
        return self._engine().input_processor.default_params()

    @property
    def model_config(self) -> ModelConfig:
        config: ModelConfig = self.llm_engine.model_config
        return config

    @property
    def chat_template(self) -> str | None:
        """Text of the template that replaces the tokenizer's, or None."""
        return self.model_config.chat_template

    @property
    def input_processor(self) -> Any:
        """That of the engine."""
        return self._engine().input_processor

    renderer = AbsentAttribute("take get_tokenizer().apply_chat_template.")
    pooling_io_processors = AbsentAttribute("there are no plugins for inputs and outputs.")

    @property
    def default_sampling_params(self) -> dict[str, Any]:
        """What `get_default_sampling_params` changes of `SamplingParams()`."""
        return self.model_config.get_diff_sampling_param()

    def close(self) -> None:
        """Gives all memory back; calls after this one raise `EngineDeadError`."""
        with self._lock:  # a call in another thread ends first
            self._is_closed = True
            self.llm_engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Without an engine the constructor failed. When Python ends, the modules that close() needs may be gone, and
        # the memory goes back anyway.
        if "llm_engine" in self.__dict__ and not is_finalizing():
            self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return "LLM(closed)"
        config = self.model_config
        device = self.llm_engine.device_config.device
        limit = config.max_model_len
        return f"LLM(model={config.model!r}, device={device!r}, dtype={config.dtype_name!r}, max_model_len={limit})"

    # One batch

    def _render(self, messages: Any, options: ChatOptions) -> tuple[Iterator[object], int | None]:
        """The text of each conversation, or what is wrong with it; and how many there are, None for an iterator."""
        behaviour = self.llm_engine.config.behaviour
        renderer = ChatRenderer(self.get_tokenizer(), options, behaviour, self.model_config.chat_template)
        conversations = messages if isinstance(messages, Iterator) else split_conversations(messages)
        return _render(conversations, renderer), len(conversations) if isinstance(conversations, list) else None

    def _enqueue(
        self, prompts: Iterable[object], num_rows: int, columns: Columns, options: TokenizeOptions
    ) -> list[str]:
        columns.check_lengths(num_rows)
        with self._lock:
            batch = Batch(self.llm_engine, self.request_counter, columns, options, on_error="raise", has_choice=False)
            request_ids = batch.enqueue(batch.prepare_all(prompts, num_rows), num_rows)
            self._enqueued += request_ids
        return request_ids

    def _engine(self) -> LLMEngine:
        if self._is_closed:
            raise EngineDeadError("This LLM is closed; create a new one.")
        return self.llm_engine

    def _generating_engine(self, method: str) -> LLMEngine:
        """The engine, whose model must generate text for this method."""
        engine = self._engine()
        if engine.model_config.pooler_config is not None:
            raise TacoValidationError(
                f"LLM.{method}() is only supported for (conditional) generation models (XForCausalLM, "
                f"XForConditionalGeneration). This model pools hidden states (task={engine.model_config.task!r}). "
                + task_advice(engine.model_config, ("generate",))
            )
        return engine

    def _columns(self, params: Any, lora_request: object, priority: object) -> Columns:
        if params is None:
            params = self.get_default_sampling_params()
        return Columns(params, lora_request, 0 if priority is None else priority)

    def _run_batch(
        self,
        prompts: Iterable[object],
        columns: Columns,
        options: TokenizeOptions,
        use_tqdm: bool | Callable[..., Any],
        on_error: str,
        num_rows: int | None = None,
        *,
        has_choice: bool = True,
        make_progress: Callable[[], Progress] | None = None,
        max_unfinished: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        name_row: Callable[[int], object] = int,
    ) -> list[Any]:
        """Checks and runs rows; prompts that are errors already are bad rows.

        Args:
            on_error, has_choice, name_row: see `Batch`.
            num_rows: number of prompts; None if they are a list, or an iterator whose length is not known.
            make_progress: makes the progress bar, instead of the usual one.
            max_unfinished: most sequences in the engine at a time.
            transform: what to return of each output, instead of the output itself.
        """
        if on_error not in ("raise", "return"):
            raise TacoValidationError(
                f'on_error must be "raise" or "return", got {on_error!r}.', parameter="on_error", value=on_error
            )
        if isinstance(prompts, list):
            num_rows = len(prompts)
        columns.check_lengths(num_rows)
        with self._lock:
            if self._engine().has_unfinished_requests():
                raise TacoError(
                    "The engine has unfinished requests that this call did not add: it is called from inside another "
                    "call, or requests were added by enqueue or to llm_engine directly. Let those finish "
                    "(wait_for_completion) or abort them first."
                )
            batch = Batch(
                self.llm_engine,
                self.request_counter,
                columns,
                options,
                on_error=on_error,
                has_choice=has_choice,
                name_row=name_row,
                max_unfinished=max_unfinished,
            )
            if num_rows is None:
                rows = batch.prepare_as_needed(iter(prompts))
            else:
                rows = batch.prepare_all(prompts, num_rows)
            if make_progress is None:
                counts_samples = self.llm_engine.config.behaviour.progress_counts_samples
                total = columns.num_samples(num_rows) if counts_samples else num_rows
                make_progress = functools.partial(Progress, use_tqdm, total, counts_samples=counts_samples)
            with make_progress() as progress:
                return batch.run(rows, progress, transform)


def _render(conversations: Iterable[object], renderer: ChatRenderer) -> Iterator[object]:
    """The text of each conversation, or what is wrong with it."""
    for conversation in conversations:
        prompt: object
        try:
            prompt = renderer.render(conversation)
        except TacoValidationError as error:
            prompt = error
        yield prompt


def _check_names(kwargs: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(EngineArgs)]
    if unknown := [name for name in kwargs if name not in known]:
        raise TypeError(unknown_arguments("LLM", unknown, known))


def _with_tool_choice(columns: Columns, tools: Sequence[Any] | None, tool_choice: object) -> Columns:
    """Columns with parameters whose texts are what `tool_choice` demands; those of the caller are not changed."""
    schema = tool_choice_schema(tools, tool_choice)
    if schema is None:
        return columns
    constraint = StructuredOutputsParams(json=schema)
    return replace(columns, params=with_constraint(columns.params, "tool_choice", structured_outputs=constraint))
