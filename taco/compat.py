"""Behaviour that differs between vLLM 0.6 and vLLM 0.33; the only place that knows of versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from taco.errors import TacoValidationError


@dataclass(frozen=True)
class Behaviour:
    """Choices where both versions' documented behaviour cannot hold at once.

    What one version does better and nobody can rely on in the other is not a choice: samples of one seeded prompt
    differ, a failing batch leaves nothing behind, chat templates are not given a second start token, and prefix
    caching, which does not change outputs, is on.

    Args:
        use_generation_config_defaults: without sampling parameters, those of the model's generation_config.json apply
            (`generation_config` is "auto" by default) instead of neutral ones.
        drops_transformers_defaults: values of that file that transformers 4 has by default, such as a top_k of 50, are
            as if they were not there.
        dtype_auto_float32: what dtype="auto" makes of a float32 checkpoint on an accelerator: "float16" (bfloat16 for
            Gemma 2), or "platform", the type that the device prefers.
        prefix_caching_default: prefix caching without `enable_prefix_caching`.
        priority_needs_policy: a priority other than 0 needs scheduling_policy="priority"; else it is an error.
        overlong_prompt: a prompt that does not fit into the context ends at once with finish_reason "length"
            ("length_result"), or is refused ("error").
        length_cap_extra_token: a sequence may reach max_model_len + 1 tokens, so a prompt of max_model_len tokens still
            yields one; otherwise it ends at max_model_len.
        checks_min_tokens_against_context: without `max_tokens`, a `min_tokens` that does not fit into the context after
            the prompt is an error; otherwise the context ends the sequence.
        echo_text_of_token_prompts: `RequestOutput.prompt` is the text given beside token ids, instead of None.
        logprobs_after_processing: log-probabilities are those of the distribution drawn from (after penalties,
            temperature, top-k, top-p, ...; prompt tokens: after temperature and filters) instead of the model's own. It
            decides the default of `logprobs_mode`. Where it is False, prompts are raw in "processed" modes too.
        rank_counts_ties: the rank of a token is the number of tokens at least as likely, instead of one more than the
            number of more likely ones.
        decoded_token_in_context: `Logprob.decoded_token` is what the token adds to the text, so that the parts join to
            it, instead of the token decoded alone.
        checks_stop_token_ids: stop_token_ids outside the vocabulary are an error; otherwise they have no effect.
        stop_string_order: of several stop strings in new text, the first in the "list" or the one "earliest" complete.
        min_tokens_end_before_stop_strings: a stop string counts only if a token after the first `min_tokens` completes
            it, instead of the last of them or a later one.
        ending_token_beats_stop_string: where the text of an ending token, shown as `include_stop_str_in_output` asks,
            completes a stop string, the token is what ended the text, instead of the string.
        beam_score_includes_prompt: the length in a beam's score counts the prompt, without the end-of-sequence token;
            otherwise the generated tokens, with it.
        beam_text_keeps_special_tokens: texts of `LLM.beam_search` show special tokens, whatever the parameters say.
        beam_logprobs_have_text: log-probabilities of `LLM.beam_search` have the texts of the tokens.
        developer_becomes_system: a chat message of the role "developer" gets the role "system" where the template does
            not mention the former.
        drops_malformed_tool_arguments: arguments of tool calls that are not valid JSON are {} to the chat template,
            with a warning, instead of an error.
        engine_tokenizer_is_group: `LLMEngine.tokenizer` is a `TokenizerGroup` around the tokenizer.
        pooling_needs_prompts: an empty list of prompts for a pooling model is an error, instead of making an empty
            list.
        progress_counts_samples: the progress bar counts each of the `n` samples of a prompt, and its tokens for each.
        tokenizer_is_awaited: `AsyncLLMEngine.get_tokenizer` returns an awaitable instead of the tokenizer.
    """

    use_generation_config_defaults: bool
    drops_transformers_defaults: bool
    dtype_auto_float32: Literal["float16", "platform"]
    prefix_caching_default: bool
    priority_needs_policy: bool
    overlong_prompt: Literal["length_result", "error"]
    length_cap_extra_token: bool
    checks_min_tokens_against_context: bool
    echo_text_of_token_prompts: bool
    logprobs_after_processing: bool
    rank_counts_ties: bool
    decoded_token_in_context: bool
    checks_stop_token_ids: bool
    stop_string_order: Literal["list", "earliest"]
    min_tokens_end_before_stop_strings: bool
    ending_token_beats_stop_string: bool
    beam_score_includes_prompt: bool
    beam_text_keeps_special_tokens: bool
    beam_logprobs_have_text: bool
    developer_becomes_system: bool
    drops_malformed_tool_arguments: bool
    engine_tokenizer_is_group: bool
    pooling_needs_prompts: bool
    progress_counts_samples: bool
    tokenizer_is_awaited: bool


V0_6 = Behaviour(
    use_generation_config_defaults=False,
    drops_transformers_defaults=True,
    dtype_auto_float32="float16",
    prefix_caching_default=True,
    priority_needs_policy=True,
    overlong_prompt="length_result",
    length_cap_extra_token=True,
    checks_min_tokens_against_context=False,
    echo_text_of_token_prompts=False,
    logprobs_after_processing=True,
    rank_counts_ties=False,
    decoded_token_in_context=True,
    checks_stop_token_ids=False,
    stop_string_order="list",
    min_tokens_end_before_stop_strings=False,
    ending_token_beats_stop_string=True,
    beam_score_includes_prompt=True,
    beam_text_keeps_special_tokens=True,
    beam_logprobs_have_text=True,
    developer_becomes_system=False,
    drops_malformed_tool_arguments=False,
    engine_tokenizer_is_group=True,
    pooling_needs_prompts=False,
    progress_counts_samples=False,
    tokenizer_is_awaited=True,
)

V0_33 = Behaviour(
    use_generation_config_defaults=True,
    drops_transformers_defaults=False,
    dtype_auto_float32="platform",
    prefix_caching_default=True,
    priority_needs_policy=False,
    overlong_prompt="error",
    length_cap_extra_token=False,
    checks_min_tokens_against_context=True,
    echo_text_of_token_prompts=True,
    logprobs_after_processing=False,
    rank_counts_ties=True,
    decoded_token_in_context=False,
    checks_stop_token_ids=True,
    stop_string_order="earliest",
    min_tokens_end_before_stop_strings=True,
    ending_token_beats_stop_string=False,
    beam_score_includes_prompt=False,
    beam_text_keeps_special_tokens=False,
    beam_logprobs_have_text=False,
    developer_becomes_system=True,
    drops_malformed_tool_arguments=True,
    engine_tokenizer_is_group=False,
    pooling_needs_prompts=True,
    progress_counts_samples=True,
    tokenizer_is_awaited=False,
)

DEFAULT_VERSION = "0.6"
_PRESETS = {"0.6": V0_6, "0.33": V0_33}
_default_version = DEFAULT_VERSION


def behaviour_for(version: str | None = None) -> Behaviour:
    """The preset of a vLLM version such as "0.6", "0.6.6.post1" or "0.33.0"; of the default version for None.

    Raises:
        TacoValidationError: there is no preset for it.
    """
    version = _default_version if version is None else str(version)
    series = ".".join(version.split(".")[:2])
    if series not in _PRESETS:
        raise TacoValidationError(
            f"There is no behaviour for version {version!r}; choose one of {list(_PRESETS)}.",
            parameter="version",
            value=version,
        )
    return _PRESETS[series]


def set_default_version(version: str = DEFAULT_VERSION) -> None:
    """Sets the version that holds in this process where none is given: the one that a program believes to import.

    Raises:
        TacoValidationError: there is no preset for it.
    """
    global _default_version
    behaviour_for(version)
    _default_version = version
