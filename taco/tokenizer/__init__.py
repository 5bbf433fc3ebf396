"""Loading tokenizers; transformers is imported when the first one is loaded, not before."""

from __future__ import annotations

from taco.tokenizer.loading import load_tokenizer, max_token_id

__all__ = ["load_tokenizer", "max_token_id"]
