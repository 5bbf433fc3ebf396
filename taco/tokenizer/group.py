"""vLLM 0.6's wrapping of a tokenizer, for programs that ask an engine for it."""

from __future__ import annotations

from typing import Any


class TokenizerGroup:
    """The tokenizers of a model and of its LoRA adapters, of which there are none.

    It has the attributes of the tokenizer too.

    Args:
        tokenizer: of the model. `LLM.set_tokenizer` replaces it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def encode(
        self,
        prompt: str,
        request_id: str | None = None,
        lora_request: object = None,
        add_special_tokens: bool | None = None,
    ) -> list[int]:
        """The token ids of a text.

        Args:
            request_id, lora_request: without effect: there is one tokenizer.
            add_special_tokens: None for what the tokenizer does by itself.
        """
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        token_ids: list[int] = self.tokenizer.encode(prompt, **options)
        return token_ids

    def get_lora_tokenizer(self, lora_request: object = None) -> Any:
        """The tokenizer, whatever the request."""
        return self.tokenizer

    def get_max_input_len(self, lora_request: object = None) -> None:
        """None: adapters set no limit."""
