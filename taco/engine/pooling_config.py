"""What a model is used for, and how it pools: resolved from the caller's arguments and the files of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from taco.config import PoolerSettings
from taco.errors import TacoValidationError
from taco.pooling_params import PoolerConfig, check_dimensions, check_returned_token_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from taco.engine.arg_utils import EngineArgs
    from taco.models.loader.sentence_transformers import SentenceTransformersFiles
    from taco.models.registry import Architecture

Task = Literal["generate", "embed", "classify", "score", "reward"]
Activation = Literal["softmax", "sigmoid", "identity"]
_ACTIVATIONS: tuple[Activation, ...] = ("softmax", "sigmoid", "identity")


def resolve_task(
    args: EngineArgs,
    hf_config: PretrainedConfig,
    architecture: Architecture,
    files: SentenceTransformersFiles | None,
) -> Task:
    """What the model is used for: what `task` says, else `runner` and `convert`, else what the checkpoint is made for.

    A checkpoint with settings for sentence-transformers is made for embeddings, whatever its architecture is.

    Raises:
        TacoValidationError: the arguments contradict each other, or the model.
    """
    given = "embed" if args.task == "embedding" else args.task
    wanted = _task_of_runner(args) if given == "auto" else given
    if given != "auto":
        runner = "generate" if given == "generate" else "pooling"
        if args.runner not in ("auto", runner) or (args.convert not in ("auto", "none") and args.convert != given):
            raise TacoValidationError(
                f"task={args.task!r} contradicts runner={args.runner!r} or convert={args.convert!r}; drop one of them",
                parameter="task",
                value=args.task,
            )
    is_embedder = files is not None and files.seq_pooling_type is not None and architecture.use != "classify"
    own = "embed" if is_embedder else architecture.use
    if wanted == "auto":
        wanted = own
    elif wanted == "pooling":
        wanted = "embed" if own == "generate" else own
    possible = possible_tasks(hf_config, architecture)
    if wanted == "classify" and "score" in possible:
        return "score"  # it can classify too
    if wanted not in possible:
        raise TacoValidationError(
            f"This model does not support the {wanted!r} task. Supported tasks: {sorted(possible)}. Its architecture "
            f"is {', '.join(getattr(hf_config, 'architectures', None) or [hf_config.model_type])}.",
            parameter="task",
            value=wanted,
        )
    return cast(Task, wanted)


def _task_of_runner(args: EngineArgs) -> str:
    """A task, "pooling" for the model's own one of that kind, or "auto"."""
    if args.runner == "generate" and args.convert in ("embed", "classify"):
        raise TacoValidationError(
            f'runner="generate" contradicts convert={args.convert!r}; drop one of them', parameter="convert"
        )
    if args.convert in ("embed", "classify"):
        return args.convert
    return args.runner


def possible_tasks(hf_config: PretrainedConfig, architecture: Architecture) -> set[str]:
    """The values of `task` that a model can be loaded with."""
    if architecture.use == "classify":
        scores_pairs = getattr(hf_config, "num_labels", None) == 1 and not architecture.is_tokenwise
        return {"embed", "classify"} | ({"score"} if scores_pairs else set())
    if architecture.use == "reward":
        return {"reward"}
    if architecture.is_encoder:
        return {"embed"}
    # A language model has the weights for text, and its hidden states for the rest.
    return {"embed"} if architecture.use == "embed" else {"generate", "embed", "reward"}


def scores_by_tokens(hf_config: PretrainedConfig) -> list[str] | None:
    """Tokens whose logits are the classes (`classifier_from_token` of vLLM, usually given in hf_overrides), or None.

    Sets `num_labels` of the config: two tokens for no and yes make one class, if the config says so.

    Raises:
        TacoValidationError: the tokens are no list of texts, or two are needed.
    """
    tokens = getattr(hf_config, "classifier_from_token", None)
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise TacoValidationError(f"classifier_from_token must be a list of tokens, got {tokens!r}.")
    is_binary = getattr(hf_config, "is_original_qwen3_reranker", False)
    if is_binary or getattr(hf_config, "method", None) == "from_2_way_softmax":
        if len(tokens) != 2:
            raise TacoValidationError(f"classifier_from_token must be two tokens, for no and for yes, got {tokens}.")
        hf_config.num_labels = 1
    else:
        hf_config.num_labels = len(tokens)
    return tokens


def resolve_pooler(
    given: PoolerConfig,
    task: Task,
    hf_config: PretrainedConfig,
    architecture: Architecture,
    files: SentenceTransformersFiles | None,
) -> PoolerSettings:
    """How the model pools for a task other than "generate": what the caller gave, else what its files say.

    Raises:
        TacoValidationError: the caller's config does not fit the model.
    """
    tasks: tuple[str, ...]
    if task == "embed":
        tasks = ("embed", "token_embed")
    elif task == "reward" or architecture.is_tokenwise:
        tasks = ("token_classify",)
    else:
        tasks = ("classify", "token_classify")
    if given.task is not None:
        if given.task not in tasks:
            raise TacoValidationError(
                f"pooler_config: task={given.task!r} is not one of {list(tasks)}, which this model can do",
                parameter="pooler_config",
                value=given.task,
            )
        tasks = (given.task, *(other for other in tasks if other != given.task))
    embeds = task == "embed"
    seq_pooling_type = architecture.seq_pooling_type
    if not embeds:
        # ModernBERT says which vector its classifier was trained on.
        seq_pooling_type = str(getattr(hf_config, "classifier_pooling", seq_pooling_type)).upper()
    elif files is not None and files.seq_pooling_type is not None:
        seq_pooling_type = files.seq_pooling_type
    is_process_reward_model = any("ProcessReward" in name for name in getattr(hf_config, "architectures", None) or ())
    use_activation = given.activates(tasks[0])
    if use_activation is None:
        if embeds:
            use_activation = files is None or files.seq_pooling_type is None or files.normalize
        else:
            use_activation = task != "reward" or is_process_reward_model
    projections = files.projections if files is not None and embeds else ()
    size = num_logits = None
    if not embeds:
        # A language model without a head for rewards makes the logits of all tokens.
        is_headless = task == "reward" and architecture.use != "reward"
        num_logits = hf_config.vocab_size if is_headless else getattr(hf_config, "num_labels", None)
    elif not projections:
        size = int(getattr(hf_config, "word_embed_proj_dim", hf_config.hidden_size))  # OPT
    matryoshka_dimensions = getattr(hf_config, "matryoshka_dimensions", None)
    if matryoshka_dimensions is None and getattr(hf_config, "is_matryoshka", False):
        matryoshka_dimensions = ()
    settings = PoolerSettings(
        tasks=tasks,
        seq_pooling_type=given.seq_pooling_type or seq_pooling_type,
        tok_pooling_type=given.tok_pooling_type or ("STEP" if is_process_reward_model else "ALL"),
        use_activation=use_activation,
        activation=_activation(hf_config, files),
        dimensions=given.dimensions,
        matryoshka_dimensions=None if matryoshka_dimensions is None else tuple(matryoshka_dimensions),
        embedding_size=size,
        num_logits=num_logits,
        logit_mean=given.logit_mean,
        logit_sigma=given.logit_sigma,
        step_tag_id=given.step_tag_id,
        returned_token_ids=None if given.returned_token_ids is None else tuple(given.returned_token_ids),
        projections=projections,
        prompts=files.prompts if files is not None else {},
        include_prompt=files is None or files.include_prompt,
        lower_case=files is not None and files.lower_case,
    )
    if given.dimensions is not None:
        check_dimensions(settings, given.dimensions)
    if given.returned_token_ids is not None:
        check_returned_token_ids(settings, given.returned_token_ids)
    return settings


def _activation(hf_config: PretrainedConfig, files: SentenceTransformersFiles | None) -> Activation:
    """What makes probabilities of a classifier's logits.

    The name that sentence-transformers writes into its files or into config.json comes first, then `problem_type`, then
    the number of classes: several exclude each other, a single one is a yes or no.

    Raises:
        TacoValidationError: a file names a function that is not implemented.
    """
    own: Any = getattr(hf_config, "sentence_transformers", None)
    name = own.get("activation_fn") if isinstance(own, dict) else None
    name = (files.activation if files is not None else None) or name
    name = name or getattr(hf_config, "sbert_ce_default_activation_function", None)
    if name is not None:
        for known in _ACTIVATIONS:
            if str(name).rsplit(".", 1)[-1].lower() == known:
                return known
        raise TacoValidationError(
            f"The activation function {name!r} in this model's files is not implemented; there are Sigmoid, Softmax "
            "and Identity.",
            parameter="model",
            value=name,
        )
    problem_type = getattr(hf_config, "problem_type", None)
    if problem_type == "regression":
        return "identity"
    if problem_type == "multi_label_classification":
        return "sigmoid"
    return "sigmoid" if getattr(hf_config, "num_labels", 2) < 2 else "softmax"
