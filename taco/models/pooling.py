"""Models that end in a pooler: a decoder or an encoder whose head, if any, makes logits of classes.

What is pooled, and how, is the business of `taco.worker.pooler`; a model only says what its head computes.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from taco.errors import UnsupportedFeatureError
from taco.layers.base import Module, as_parameter
from taco.layers.linear import Linear
from taco.models.base import CausalLM, Model
from taco.models.registry import Use


class PoolingModel(Model):
    """A model whose hidden states are pooled.

    Attributes:
        use: "embed" (no head), "classify" or "reward" (a head makes logits of pooled or of all hidden states).
        num_logits: number of what `compute_logits` returns for a vector; `hidden_size` without a head.
        takes_token_types: whether `forward` has a further argument token_type_ids, int64 [T] or None for zeros.
    """

    use: ClassVar[Use] = "embed"
    takes_token_types: ClassVar[bool] = False

    num_logits: int


class EncoderModel(PoolingModel):
    """A model in which tokens see those after them too. It keeps nothing between steps, so it has no KV cache, and
    every text is computed in one step."""

    num_layers = 0
    num_kv_heads = head_dim = 0


def is_tokenwise(config: Any) -> bool:
    """Whether a classifier of the configuration is for single tokens."""
    return any(name.endswith("ForTokenClassification") for name in config.architectures or ())


class ScoreMLP(Module):
    """Two linear layers with ReLU between them (reward models of the Qwen2 family)."""

    def __init__(self, size: int, num_labels: int, name: str) -> None:
        super().__init__()
        self.first = Linear(size, size, f"{name}.0", bias=True)
        self.second = Linear(size, num_labels, f"{name}.2", bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))


class DecoderForPooling(PoolingModel):
    """Comes before a `CausalLM` among the bases of a class and takes the place of its head.

    A classifier may be made of the language model's head: of the rows for the tokens `config.score_token_ids`. For a
    single class these are two tokens, the first for no and the second for yes.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score: Module | None = None
        if self.use == "reward" and not any(name.endswith("RewardModel") for name in config.architectures or ()):
            self.num_logits = self.vocab_size  # a language model whose logits of some tokens are the reward
            return
        self.score_token_ids: list[int] | None = getattr(config, "score_token_ids", None)
        if self.score_token_ids is None:
            self.head = None
            self.ignored_weights = (*self.ignored_weights, "lm_head.weight")
        self.hidden_size = self.num_logits = size = self.num_features or self.hidden_size
        if self.score_token_ids is not None:
            pass  # made of the language model's head when it is loaded
        elif self.use == "classify":
            self.score = Linear(size, config.num_labels, "score", bias=False)
        elif self.use == "reward":
            self.score = ScoreMLP(size, config.num_labels, "score")
        else:
            self.ignored_weights += ("score.*",)
        if self.score is not None or self.score_token_ids is not None:
            self.num_logits = config.num_labels

    def finalize(self, max_model_len: int | None = None) -> None:
        if self.use == "classify" and self.score_token_ids is not None:
            rows = self.head.weight[torch.tensor(self.score_token_ids, device=self.head.weight.device)]
            if len(rows) == 2 and self.num_logits == 1:
                # The softmax over two logits is the sigmoid of their difference.
                rows = (rows[1:].float() - rows[:1].float()).to(rows.dtype)
            with torch.device(rows.device):
                self.score = Linear(self.hidden_size, len(rows), "score", bias=False)
            self.score.weight = as_parameter(rows)
            self.head = None
        super().finalize(max_model_len)

    def forward(self, *batch: Any) -> torch.Tensor:
        hidden = super().forward(*batch)
        return hidden if self.head is not None else self.features(hidden)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            return super().compute_logits(hidden)
        return (hidden if self.score is None else self.score(hidden)).float()


@functools.cache
def pooling_class(model_class: type[Model], use: Use) -> type[PoolingModel]:
    """A model class with the head that a use needs, instead of the one it has.

    Raises:
        UnsupportedFeatureError: the model has no such head.
    """
    if issubclass(model_class, EncoderModel):
        if use == "reward":
            raise UnsupportedFeatureError(
                f"There are no reward models of the kind {model_class.__name__}.", parameter="task", value=use
            )
        bases: tuple[type, ...] = (model_class,)
    else:
        assert issubclass(model_class, CausalLM)
        bases = (DecoderForPooling, model_class)
    return type(f"{model_class.__name__}To{use.capitalize()}", bases, {"use": use})
