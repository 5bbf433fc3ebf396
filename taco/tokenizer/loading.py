"""The tokenizer of a model, from its folder, from the Hub, or from a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taco.errors import TacoValidationError, UnsupportedFeatureError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from taco.models.loader.source import ModelSource

TOKENIZER_MODES = ("auto", "slow", "mistral")


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
        tokenizer_mode: "auto" loads Hugging Face's files, with the fast implementation where there is one. "slow" loads
            the one in Python, which few tokenizers of transformers 5 have, BERT's among them, and some that models
            bring. "mistral" loads Mistral's files, tekken.json or tokenizer.model.vN, with mistral-common.
        trust_remote_code: run the tokenizer code that the model brings.
        revision, download_dir, hf_token: see `resolve_model`; they matter where `source` is a Hub id.
        options: passed on to the tokenizer's class, such as `truncation_side`.

    Raises:
        TacoValidationError: there is no tokenizer, none of the wanted mode, or it cannot be built; or "mistral" lacks
            its package.
        UnsupportedFeatureError: an unknown mode, or a kind of tokenizer in a GGUF file that is not supported.
    """
    from taco.models.loader.source import resolve_model

    if tokenizer_mode not in TOKENIZER_MODES:
        raise UnsupportedFeatureError(
            f"tokenizer_mode={tokenizer_mode!r} is not supported; these are: {', '.join(TOKENIZER_MODES)}.",
            parameter="tokenizer_mode",
            value=tokenizer_mode,
        )
    if isinstance(source, str):
        source = resolve_model(
            source, revision=revision, download_dir=download_dir, hf_token=hf_token, load_format="dummy"
        )
    if tokenizer_mode == "mistral":
        return _load_mistral(source.path, options)
    if source.kind == "gguf":
        if tokenizer_mode == "slow":
            raise _no_slow_tokenizer(source.path, "GGUF files have")
        from taco.tokenizer.gguf import build_gguf_tokenizer

        return build_gguf_tokenizer(source.path, **options)

    from transformers import AutoTokenizer

    try:
        if tokenizer_mode == "slow":
            return _load_slow(source.path, trust_remote_code, options)
        # Not what is installed decides between Hugging Face's and Mistral's files, but the mode.
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, mistral_format=False, **options
        )
        if _is_misread(tokenizer, source.path):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(source.path, **options)
        return tokenizer
    except TacoValidationError:
        raise
    except Exception as error:  # transformers and the code of models raise errors of any class
        raise TacoValidationError(
            f"The tokenizer of {source.path} cannot be loaded ({error}). Pass tokenizer= with a folder or Hub id that "
            "has one, or prompts as token ids with skip_tokenizer_init=True.",
            parameter="tokenizer",
            value=source.path,
        ) from error


def _is_misread(tokenizer: PreTrainedTokenizerBase, path: str) -> bool:
    """Whether transformers took a byte-level vocabulary for one of sentencepiece, and so loses the spaces.

    Versions before 5.22 do where the class that a model names is Llama's, as those of DeepSeek's distilled models.
    """
    file = Path(path) / "tokenizer.json"
    if type(tokenizer).__name__ != "LlamaTokenizer" or not file.is_file():
        return False
    published = json.loads(file.read_bytes()).get("decoder") or {}
    loaded = json.loads(tokenizer._tokenizer.decoder.__getstate__())
    return published.get("type") == "ByteLevel" and loaded["type"] != "ByteLevel"


def _load_slow(path: str, trust_remote_code: bool, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    import transformers
    from transformers import AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    classes = get_tokenizer_config(path).get("auto_map", {})
    if isinstance(classes, dict):
        classes = classes.get("AutoTokenizer")
    if trust_remote_code and classes and classes[0] is not None:  # the slow one, the fast one
        tokenizer_class = get_class_from_dynamic_module(classes[0], path)
        return tokenizer_class.from_pretrained(path, trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(
        path, trust_remote_code=trust_remote_code, mistral_format=False, **options
    )
    if not tokenizer.is_fast:
        return tokenizer
    name = type(tokenizer).__name__
    slow_class = getattr(transformers, f"{name}Legacy", None)
    if slow_class is None:
        raise _no_slow_tokenizer(path, f"transformers {transformers.__version__} has for {name}")
    return slow_class.from_pretrained(path, **options)


def _no_slow_tokenizer(path: str, who: str) -> TacoValidationError:
    return TacoValidationError(
        f'tokenizer_mode="slow": the tokenizer of {path} has no implementation in Python; the fast one is all that '
        f'{who}. Use tokenizer_mode="auto".',
        parameter="tokenizer_mode",
        value="slow",
    )


def _load_mistral(path: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        import mistral_common  # noqa: F401

        from taco.tokenizer.mistral import load_mistral_tokenizer
    except ImportError as error:
        raise TacoValidationError(
            'tokenizer_mode="mistral" needs the package mistral-common in a version that transformers works with: '
            f'pip install "taco-llm[mistral]" ({error}).',
            parameter="tokenizer_mode",
            value="mistral",
        ) from error
    return load_mistral_tokenizer(path, **options)


def add_vocabulary_limits(tokenizer: Any) -> None:
    """Gives a tokenizer the attributes that vLLM's tokenizers have besides those of transformers.

    `max_token_id` is the largest token id, added tokens included; the vocabulary may have gaps, so it can exceed its
    size. `max_chars_per_token` is the length of the longest token as the vocabulary writes it.
    """
    if not hasattr(tokenizer, "max_token_id"):
        vocab = tokenizer.get_vocab()
        tokenizer.max_token_id = max(vocab.values())
        tokenizer.max_chars_per_token = max(map(len, vocab))
