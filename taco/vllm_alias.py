"""`import vllm` served by taco, in a process that asks for it.

`install()` puts a finder before all others. It makes the modules of one table, which names for each module of vLLM 0.6
and vLLM 0.33 the objects of taco that stand in it. They are taco's own objects (`vllm.LLM is taco.LLM`), imported when
they are first used, so that `install` and `import vllm` load no torch.

A name that taco does not have raises an ImportError (an AttributeError for `vllm.name`) that says so; nothing is made
up.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

from taco.compat import DEFAULT_VERSION, behaviour_for, set_default_version
from taco.errors import TacoError, TacoValidationError

_FULL_VERSIONS = {"0.6": "0.6.6.post1", "0.33": "0.33.0"}  # what `vllm.__version__` says if only the series is given

_SAMPLING = {
    "taco.sampling_params": "SamplingParams BeamSearchParams RequestOutputKind SamplingType GuidedDecodingParams "
    "StructuredOutputsParams RepetitionDetectionParams MAX_LOGPROB_TOKEN_IDS"
}
_OUTPUTS = {
    "taco.outputs": "RequestOutput CompletionOutput PoolingRequestOutput PoolingOutput EmbeddingRequestOutput "
    "EmbeddingOutput ClassificationRequestOutput ClassificationOutput ScoringRequestOutput ScoringOutput"
}
_LOGPROBS = {"taco.logprobs": "Logprob PromptLogprobs SampleLogprobs"}
_NO_TEMPLATE = {"taco.errors": "ChatTemplateResolutionError"}
_CHAT_MESSAGE = {"taco.entrypoints.chat": "ConversationMessage", **_NO_TEMPLATE}
_BEAMS = {"taco.outputs": "BeamSearchSequence BeamSearchOutput BeamSearchInstance"}
_PROMPTS = {
    "taco.inputs": "TextPrompt TokensPrompt EmbedsPrompt DataPrompt ExplicitEncoderDecoderPrompt SingletonPrompt "
    "PromptType"
}
_POOLER = {"taco.pooling_params": "PoolerConfig"}
_WATERMARK = {"taco.watermark": "WatermarkConfig"}
_ENGINE = {"taco.engine.llm_engine": "LLMEngine"}
_ASYNC_ENGINE = {"taco.engine.async_llm_engine": "AsyncLLMEngine AsyncLLM"}
_COUNTER = {"taco.entrypoints.batch": "Counter"}
_RANDOM_SEED = {"taco.entrypoints.vllm_functions": "set_random_seed"}
_ARGUMENT_PARSER = {"taco.entrypoints.vllm_functions": "FlexibleArgumentParser"}
_TOKENIZER = {"taco.entrypoints.vllm_functions": "get_tokenizer"}
_STRUCTURED_OUTPUTS = {"taco.guided.request": "StructuredOutputsConfig"}
_MISTRAL_TOKENIZER = {"taco.tokenizer.mistral": "MistralTokenizer"}
_TOKENIZER_GROUP = {"taco.tokenizer.group": "TokenizerGroup BaseTokenizerGroup=TokenizerGroup"}
_EXECUTOR = {"taco.executor.inprocess": "Executor=InProcessExecutor"}
_LOGITS_PROCESSOR = "LogitsProcessor BatchUpdate MoveDirectionality"
_RAY = {"taco.entrypoints.vllm_functions": "initialize_ray_cluster"}
_PROCESS_GROUPS = {
    "taco.entrypoints.vllm_functions": "destroy_model_parallel destroy_distributed_environment "
    "cleanup_dist_env_and_memory"
}

# Module of vLLM -> module of taco -> names, "theirs=ours" where they differ. A module may stand in either layout.
_TABLE: dict[str, dict[str, str]] = {
    "vllm": {
        "taco.entrypoints.llm": "LLM",
        "taco.entrypoints.vllm_functions": "ModelRegistry initialize_ray_cluster",
        "taco.inputs": "PromptType TextPrompt TokensPrompt",
        "taco.sampling_params": "SamplingParams",
        "taco.pooling_params": "PoolingParams",
        **_OUTPUTS,
        **_ENGINE,
        "taco.engine.async_llm_engine": "AsyncLLMEngine",
        "taco.engine.arg_utils": "EngineArgs AsyncEngineArgs",
    },
    "vllm.beam_search": _BEAMS,
    "vllm.config": {
        "taco.config": "CacheConfig DeviceConfig LoadConfig ModelConfig ParallelConfig ProfilerConfig "
        "ReasoningConfig SchedulerConfig VllmConfig=TacoConfig",
        **_POOLER,
        **_WATERMARK,
        **_STRUCTURED_OUTPUTS,
    },
    "vllm.config.pooler": _POOLER,
    "vllm.config.profiler": {"taco.config": "ProfilerConfig"},
    "vllm.config.reasoning": {"taco.config": "ReasoningConfig"},
    "vllm.config.watermarking": _WATERMARK,
    "vllm.config.structured_outputs": _STRUCTURED_OUTPUTS,
    "vllm.distributed": _PROCESS_GROUPS,
    "vllm.distributed.parallel_state": _PROCESS_GROUPS,
    "vllm.distributed.weight_transfer": {},
    "vllm.distributed.weight_transfer.nccl_common": {"taco.entrypoints.vllm_functions": "trainer_init"},
    "vllm.distributed.weight_transfer.packed_tensor": {
        "taco.entrypoints.vllm_functions": "packed_nccl_broadcast_producer"
    },
    "vllm.engine": {},
    "vllm.engine.arg_utils": {"taco.engine.arg_utils": "EngineArgs AsyncEngineArgs"},
    "vllm.engine.async_llm_engine": _ASYNC_ENGINE,
    "vllm.engine.llm_engine": _ENGINE,
    "vllm.entrypoints": {},
    "vllm.entrypoints.chat_utils": {
        "taco.entrypoints.chat": "ConversationMessage ChatCompletionMessageParam=ConversationMessage"
    },
    "vllm.entrypoints.common": {},
    "vllm.entrypoints.common.offline": {"taco.entrypoints.llm": "OfflineInferenceMixin=LLM"},
    "vllm.entrypoints.generate": {},
    "vllm.entrypoints.generate.beam_search": {},
    "vllm.entrypoints.generate.beam_search.offline": {
        "taco.entrypoints.beam_search": "BeamSearchOfflineMixin=BeamSearchMixin"
    },
    "vllm.entrypoints.generate.beam_search.utils": _BEAMS,
    "vllm.entrypoints.llm": {"taco.entrypoints.llm": "LLM"},
    "vllm.entrypoints.pooling": {},
    "vllm.entrypoints.pooling.offline": {"taco.entrypoints.pooling": "PoolingOfflineMixin=PoolingMixin"},
    "vllm.entrypoints.rl": {},
    "vllm.entrypoints.rl.offline": {"taco.entrypoints.control": "RLOfflineMixin=ControlMixin"},
    "vllm.exceptions": {
        "taco.errors": "VLLMError=TacoError VLLMClientError=TacoValidationError VLLMServerError=EngineError "
        "VLLMValidationError=TacoValidationError ProfilerAlreadyActiveError"
    },
    "vllm.executor": {},
    "vllm.executor.ray_utils": _RAY,
    "vllm.inputs": _PROMPTS,
    "vllm.inputs.data": _PROMPTS,
    "vllm.inputs.llm": {"taco.inputs": _PROMPTS["taco.inputs"] + " _PromptOptions"},
    "vllm.logger": {"taco.entrypoints.vllm_functions": "init_logger"},
    "vllm.logits_process": {"taco.logits_processor": "LogitsProcessor=RequestLogitsProcessor"},
    "vllm.logprobs": {"taco.logprobs": "Logprob FlatLogprobs LogprobsOnePosition PromptLogprobs SampleLogprobs"},
    "vllm.lora": {},
    "vllm.lora.request": {"taco.lora_request": "LoRARequest"},
    "vllm.model_executor": _RANDOM_SEED,
    "vllm.model_executor.guided_decoding": {},
    "vllm.model_executor.guided_decoding.guided_fields": {
        "taco.guided.request": "GuidedDecodingRequest LLMGuidedOptions"
    },
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.quantization": {"taco.config": "QuantizationMethods QUANTIZATION_METHODS"},
    "vllm.model_executor.models": {"taco.entrypoints.vllm_functions": "ModelRegistry"},
    "vllm.model_executor.models.registry": {"taco.entrypoints.vllm_functions": "ModelRegistry _ModelRegistry"},
    "vllm.model_executor.utils": _RANDOM_SEED,
    "vllm.outputs": {"taco.outputs": _OUTPUTS["taco.outputs"] + " RequestError SamplingMask WeightVersionSpan"},
    "vllm.pooling_params": {"taco.pooling_params": "PoolingParams LateInteractionParams LateChunkingParams"},
    "vllm.prompt_adapter": {},
    "vllm.prompt_adapter.request": {"taco.lora_request": "PromptAdapterRequest"},
    "vllm.renderers": {},
    "vllm.renderers.chat_utils": _CHAT_MESSAGE,
    "vllm.renderers.chat_utils.types": _CHAT_MESSAGE,
    "vllm.renderers.hf": {"taco.entrypoints.vllm_functions": "resolve_chat_template", **_NO_TEMPLATE},
    "vllm.sampling_params": _SAMPLING,
    "vllm.sequence": {**_LOGPROBS, "taco.outputs": "RequestMetrics", "taco.request": "SequenceStatus"},
    "vllm.tokenizers": _TOKENIZER,
    "vllm.tokenizers.mistral": _MISTRAL_TOKENIZER,
    "vllm.transformers_utils": {},
    "vllm.transformers_utils.tokenizer": {
        **_TOKENIZER,
        "taco.tokenizer.mistral": "MistralTokenizer AnyTokenizer",
    },
    "vllm.transformers_utils.tokenizer_group": _TOKENIZER_GROUP,
    "vllm.usage": {},
    "vllm.usage.usage_lib": {"taco.usage_context": "UsageContext"},
    "vllm.utils": {
        **_COUNTER,
        "taco.entrypoints.vllm_functions": "FlexibleArgumentParser get_ip get_open_port random_uuid",
    },
    "vllm.utils.argparse_utils": _ARGUMENT_PARSER,
    "vllm.utils.counter": _COUNTER,
    "vllm.utils.network_utils": {"taco.entrypoints.vllm_functions": "get_ip get_open_port"},
    "vllm.utils.torch_utils": _RANDOM_SEED,
    "vllm.v1": {},
    "vllm.v1.engine": {},
    "vllm.v1.engine.async_llm": {**_ASYNC_ENGINE, "taco.engine.arg_utils": "AsyncEngineArgs"},
    "vllm.v1.engine.llm_engine": _ENGINE,
    "vllm.v1.executor": _EXECUTOR,
    "vllm.v1.executor.abstract": _EXECUTOR,
    "vllm.v1.executor.ray_utils": _RAY,
    "vllm.v1.metrics": {},
    "vllm.v1.metrics.stats": {"taco.outputs": "RequestStateStats"},
    "vllm.v1.metrics.reader": {"taco.engine.metrics": "Metric Counter Gauge Histogram Vector"},
    "vllm.v1.sample": {},
    "vllm.v1.sample.logits_processor": {"taco.logits_processor": _LOGITS_PROCESSOR + " AdapterLogitsProcessor"},
    "vllm.v1.sample.logits_processor.builtin": {"taco.logits_processor": "process_dict_updates"},
    "vllm.v1.sample.logits_processor.interface": {
        "taco.logits_processor": _LOGITS_PROCESSOR + " AddedRequest MovedRequest RemovedRequest"
    },
    "vllm.v1.watermarking": {
        "taco.watermark": "GumbelWatermarkDetector DualKeyGumbelWatermarkDetector WatermarkDetection"
    },
    "vllm.version": {},
}

# Why taco will not have a name or module, and what lies below it.
_REASONS = {
    "vllm.entrypoints.openai": "it is an offline engine, without a server",
}


def install(version: str = DEFAULT_VERSION, shown_version: str | None = None) -> None:
    """Makes `import vllm` and its submodules resolve to taco in this process. Call it before anything imports vllm.

    A second call with the same version does nothing. A vLLM that is installed stays as it is, and is not imported.

    Args:
        version: of vLLM, which `vllm.__version__` and the package metadata show: one of the 0.6 or the 0.33 series;
            "0.6" and "0.33" stand for 0.6.6.post1 and 0.33.0. Engines behave as it does, unless they are given a
            `compat_version`.
        shown_version: what is shown in place of it, for programs that insist on a version between the two.

    Raises:
        TacoValidationError: another version, or `shown_version` is not a version at all.
        TacoError: vLLM itself, or the alias with another version, is there already.
    """
    behaviour = behaviour_for(version)
    if shown_version is not None and not re.fullmatch(r"\d+(\.\d+)+[\w.+]*", shown_version):
        raise TacoValidationError(
            f"{shown_version!r} is not a version of vLLM; one is written as 0.10.1.",
            parameter="shown_version",
            value=shown_version,
        )
    shown = shown_version or _FULL_VERSIONS.get(version, version)
    for finder in _installed():
        if finder.version != shown or behaviour_for() is not behaviour:
            raise TacoError(
                f"vllm {finder.version} is what taco stands in for already, and cannot become vllm {shown} now that "
                "it may have been imported; choose the version once, at the start of the program."
            )
        return
    imported = sorted(name for name in sys.modules if _is_vllm(name))
    if imported:
        raise TacoError(
            f"{imported[0]} was imported before taco.vllm_alias.install() was called, so that taco cannot stand in for "
            "it any more; call install() first in the program, or start it with `taco run`."
        )
    sys.meta_path.insert(0, _Finder(shown))
    set_default_version(version)


def uninstall() -> None:
    """Undoes `install`: forgets the modules it made. Objects that were imported from them stay what they are."""
    for finder in _installed():
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_vllm(name)]:
            del sys.modules[name]
        set_default_version()


def version_tuple(version: str) -> tuple[int | str, ...]:
    """`(0, 6, 6, "post1")` for "0.6.6.post1"."""
    return tuple(int(part) if part.isdigit() else part for part in version.split("."))


def _is_vllm(name: str) -> bool:
    return name == "vllm" or name.startswith("vllm.")


def _installed() -> list[_Finder]:
    return [finder for finder in sys.meta_path if isinstance(finder, _Finder)]


class _Finder(MetaPathFinder, Loader):
    """Makes the modules of `_TABLE`, and the metadata of a distribution named vllm."""

    def __init__(self, version: str) -> None:
        self.version = version

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _is_vllm(fullname):
            return None
        if fullname in _TABLE:
            # Every module is a package: so Python asks for the "module" vllm.outputs.X in `from vllm.outputs import X`
            # if X is missing, and the error is the one below.
            return ModuleSpec(fullname, self, origin=f"taco, as vllm {self.version}", is_package=True)
        parent, _, name = fullname.rpartition(".")
        # No error for who asks whether a module exists, or imports "" from one, which means the module itself.
        # `importlib.util.find_spec` and an import come the same way, two calls above.
        if not name or sys._getframe(2).f_globals.get("__name__") == "importlib.util":
            return None
        # With the parent's name, as for `cannot import name`. Named after the module itself, Python would replace it.
        raise ModuleNotFoundError(self.missing(fullname), name=parent)

    def exec_module(self, module: ModuleType) -> None:
        targets = {}
        for home, names in _TABLE[module.__name__].items():
            for entry in names.split():
                theirs, _, ours = entry.partition("=")
                targets[theirs] = (home, ours or theirs)
        if module.__name__ in ("vllm", "vllm.version"):
            module.__version__ = self.version  # type: ignore[attr-defined]
            module.__version_tuple__ = version_tuple(self.version)  # type: ignore[attr-defined]
            public = ["__version__", "__version_tuple__", *targets]
        else:
            public = [name for name in targets if not name.startswith("_")]
        module.__all__ = public  # type: ignore[attr-defined]
        module.__getattr__ = partial(self._attribute, module, targets)  # type: ignore[method-assign]
        module.__dir__ = lambda: sorted({*vars(module), *targets})  # type: ignore[method-assign]

    def _attribute(self, module: ModuleType, targets: dict[str, tuple[str, str]], name: str) -> object:
        full_name = f"{module.__name__}.{name}"
        if name in targets:
            home, attribute = targets[name]
            value = getattr(import_module(home), attribute)
            setattr(module, name, value)
            return value
        if full_name in _TABLE:
            return import_module(full_name)
        raise AttributeError(self.missing(full_name), name=name, obj=module)

    def missing(self, full_name: str) -> str:
        """What the error says about a name that taco does not have."""
        message = f"taco, which stands in for vllm {self.version} in this process, does not have {full_name}"
        for name, reason in _REASONS.items():
            if full_name == name or full_name.startswith(f"{name}."):
                return f"{message}: {reason}."
        return f"{message}."

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        """For `importlib.metadata`, which asks every finder that has this method."""
        if context.name is None or context.name.lower() == "vllm":
            yield _VllmDistribution(self.version)


class _VllmDistribution(Distribution):
    def __init__(self, version: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: taco, standing in for vllm\n",
            "top_level.txt": "vllm\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: object) -> Path:
        return Path(__file__).parent / str(path)
