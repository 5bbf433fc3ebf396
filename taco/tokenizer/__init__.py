"""Loading tokenizers; transformers is imported when the first one is loaded, not before."""

from __future__ import annotations

from taco.tokenizer.loading import add_vocabulary_limits, load_tokenizer

__all__ = ["add_vocabulary_limits", "load_tokenizer"]
