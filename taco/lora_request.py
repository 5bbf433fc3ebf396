"""Requests for adapters of a model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from taco.errors import EmptyAdapterPathError, TacoValidationError
from taco.struct_fields import WithStructFields


@dataclass(eq=False)
class LoRARequest(WithStructFields):
    """Names the adapter that a prompt is run with. Two requests are equal if their names are.

    Args:
        lora_name: name of the adapter, not empty.
        lora_int_id: its number, >= 1, unique for each adapter.
        lora_path: folder of the adapter.
        lora_local_path: old name of lora_path (deprecated).
        long_lora_max_len: context length of an adapter trained for a longer one than the model's.
        base_model_name: the model that the adapter belongs to.
        load_inplace: load again under the same number, replacing the adapter.
        is_3d_lora_weight: the weights of all experts come in one tensor.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    lora_local_path: str | None = None
    long_lora_max_len: int | None = None
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_local_path:
            warnings.warn("lora_local_path is deprecated, use lora_path.", DeprecationWarning, stacklevel=3)
            self.lora_path = self.lora_path or self.lora_local_path
        for name in ("lora_name", "lora_path"):
            value: Any = getattr(self, name)
            if not (isinstance(value, str) and value):
                error = EmptyAdapterPathError if name == "lora_path" else TacoValidationError
                raise error(f"{name} must be a non-empty string, got {value!r}.", parameter=name)
        if isinstance(self.lora_int_id, bool) or not isinstance(self.lora_int_id, int) or self.lora_int_id < 1:
            raise TacoValidationError(
                f"lora_int_id must be an int of at least 1, got {self.lora_int_id!r}.", parameter="lora_int_id"
            )

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def path(self) -> str:
        return self.lora_path

    @property
    def local_path(self) -> str:
        return self.lora_path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)


@dataclass(eq=False)
class PromptAdapterRequest(WithStructFields):
    """Names a prompt adapter of vLLM 0.6, for programs that make such objects; to pass one is an error.

    Args:
        prompt_adapter_name: name of the adapter.
        prompt_adapter_id: its number, >= 1, unique for each adapter.
        prompt_adapter_local_path: folder of the adapter.
        prompt_adapter_num_virtual_tokens: tokens that it puts before a prompt.
    """

    prompt_adapter_name: str
    prompt_adapter_id: int
    prompt_adapter_local_path: str
    prompt_adapter_num_virtual_tokens: int

    @property
    def adapter_id(self) -> int:
        return self.prompt_adapter_id

    @property
    def name(self) -> str:
        return self.prompt_adapter_name

    @property
    def local_path(self) -> str:
        return self.prompt_adapter_local_path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptAdapterRequest) and self.prompt_adapter_id == other.prompt_adapter_id

    def __hash__(self) -> int:
        return hash(self.prompt_adapter_id)
