"""The tokenizer of a model, from its folder, from the Hub, or from a GGUF file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from taco.errors import TacoValidationError, UnsupportedFeatureError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from taco.models.loader.source import ModelSource

logger = logging.getLogger(__name__)

TOKENIZER_MODES = ("auto", "slow")


def load_tokenizer(
    source: ModelSource | str,
    *,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | bool | None = None,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        source: a model that was found, or a folder, a .gguf file or a Hub id.
        tokenizer_mode: "auto"; "slow" is accepted and loads the same, because transformers 5 has one implementation
            of each tokenizer.
        trust_remote_code: run the tokenizer code that the model brings.
        revision, download_dir, hf_token: see `resolve_model`; they matter where `source` is a Hub id.
        options: passed on to the tokenizer's class, such as `truncation_side`.

    Raises:
        TacoValidationError: there is no tokenizer, or it cannot be built.
        UnsupportedFeatureError: an unknown mode, or a kind of tokenizer in a GGUF file that is not supported.
    """
    from taco.models.loader.source import resolve_model

    if tokenizer_mode not in TOKENIZER_MODES:
        raise UnsupportedFeatureError(
            f"tokenizer_mode={tokenizer_mode!r} is not supported; these are: {', '.join(TOKENIZER_MODES)}.",
            parameter="tokenizer_mode",
            value=tokenizer_mode,
        )
    if tokenizer_mode == "slow":
        logger.warning('tokenizer_mode="slow": transformers 5 has one implementation of each tokenizer, which is used.')
    if isinstance(source, str):
        source = resolve_model(
            source, revision=revision, download_dir=download_dir, hf_token=hf_token, load_format="dummy"
        )
    if source.kind == "gguf":
        from taco.tokenizer.gguf import build_gguf_tokenizer

        return build_gguf_tokenizer(source.path, **options)

    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # transformers and the code of models raise errors of any class
        raise TacoValidationError(
            f"The tokenizer of {source.path} cannot be loaded ({error}). Pass tokenizer= with a folder or Hub id that "
            "has one, or prompts as token ids with skip_tokenizer_init=True.",
            parameter="tokenizer",
            value=source.path,
        ) from error


def max_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id, added tokens included; the vocabulary may have gaps, so it can exceed its size."""
    return max(tokenizer.get_vocab().values())
