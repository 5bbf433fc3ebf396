"""What every model offers to the worker, and the frame that the dense decoders share.

A model is built under `torch.device("meta")`, gets its weights from a loader that follows `weight_entries`, is
finalised, and from then on maps packed batches of tokens to hidden states. It knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, ClassVar

import torch
from torch import nn

from taco.errors import UnsupportedFeatureError
from taco.kernels.metadata import AttentionMetadata
from taco.layers.base import Layer
from taco.layers.decoder import DecoderLayer, DecoderLayerConfig
from taco.layers.embedding import Embedding, LMHead
from taco.layers.norm import RMSNorm
from taco.layers.rotary import RotaryEmbedding
from taco.models.loader.checkpoint import WeightEntry
from taco.models.loader.update import Placement, Weights, update_weights

KVCaches = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Model(nn.Module):
    """What maps packed batches of tokens to hidden states, and these to logits.

    Attributes:
        num_layers, num_kv_heads, head_dim: shape of the KV cache; 0 layers for a model without one.
        vocab_size: number of token ids.
        hidden_size: width of what `forward` returns.
        max_position: number of positions the model is made for; None if any.
        name_prefixes: prefixes under which checkpoints have the tensors of the bare model (without its head). Layers
            use the first one.
        ignored_weights: fnmatch patterns of tensors that checkpoints may have and the model has no use for.
        placement: what `load_weights` needs to know, set by the worker; None for a model whose weights never change.
        missing_weights: names of those that have not come yet since the weights were dropped.
        num_weight_updates: how often weights were replaced.
    """

    name_prefixes: ClassVar[tuple[str, ...]] = ("model.", "")

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    hidden_size: int
    max_position: int | None
    ignored_weights: tuple[str, ...] = ()
    placement: Placement | None = None
    missing_weights: Set[str] = frozenset()
    num_weight_updates: int = 0

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv_caches: KVCaches, meta: AttentionMetadata
    ) -> torch.Tensor:
        """Runs one step.

        Args:
            input_ids: int64 [T].
            positions: int64 [T], position of each token in its row.
            kv_caches: keys and values of each layer, see `AttentionMetadata`.

        Returns:
            [T, hidden_size], after the final norm.
        """
        raise NotImplementedError

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] as returned by `forward` -> float32 [N, number of logits], what the head makes of it."""
        raise NotImplementedError

    def weight_entries(self) -> list[WeightEntry]:
        """What to read from a checkpoint, and where it goes."""
        entries: list[WeightEntry] = []
        for path, module in self.named_modules():
            if not isinstance(module, Layer):
                continue

            def declare(
                name: str,
                shape: tuple[int, ...],
                param: str,
                *,
                dim: int | None = None,
                offset: int = 0,
                transpose: bool = False,
                path: str = path,
            ) -> None:
                entries.append(
                    WeightEntry(
                        name,
                        shape,
                        f"{path}.{param}",
                        dim=dim,
                        offset=offset,
                        transpose=transpose,
                        aliases=self._aliases(name),
                    )
                )

            module.declare_weights(declare)
        return entries

    def finalize(self, max_model_len: int | None = None) -> None:
        """Prepares for computing; called once, after the weights have been loaded.

        Args:
            max_model_len: length of the longest sequence to come; by default `max_position`.
        """
        device = next(self.parameters()).device
        for module in list(self.modules()):
            if isinstance(module, Layer):
                module.finalize()
            elif isinstance(module, RotaryEmbedding):
                module.finalize(device, max_model_len or module.max_position)
        self.expose_attributes()

    def expose_attributes(self) -> None:
        """Called whenever parameters have been exchanged for others."""
        for module in self.modules():
            # As plain attributes parameters and submodules are found without nn.Module.__getattr__, whose half
            # microsecond adds up to some percent of a decode step of a small model.
            module.__dict__.update(module._parameters | module._modules)

    def load_weights(self, weights: Weights) -> set[str]:
        """Replaces weights of the model while it is in use.

        The prefix cache is reset, and requests that run are computed anew, with the tokens that they have.

        Args:
            weights: tensors under their names in checkpoints of Hugging Face, as a mapping or as pairs; any part of the
                weights, in any order, on any device, of any floating-point type of 16 bits or more. Each is copied when
                it comes. Tensors that the model has no use for (a head that is tied) are passed over.

        Returns:
            The names of the tensors that were taken.

        Raises:
            TacoValidationError: a name, a shape or a type is wrong. Nothing was changed if `weights` is a mapping or a
                sequence; of an iterator, the tensors before that one were taken.
            EngineAsleepError: the weights were moved away from their device by `LLM.sleep`.
        """
        return update_weights(self, weights)

    def _aliases(self, name: str) -> tuple[str, ...]:
        first, *others = self.name_prefixes
        return tuple(other + name.removeprefix(first) for other in others) if name.startswith(first) else ()


class CausalLM(Model):
    """A language model that predicts the next token: its logits are those of the `vocab_size` tokens.

    Attributes:
        head: the projection to the vocabulary.
        num_features: width of what `features` returns; None for `hidden_size`.
    """

    num_features: int | None = None

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden_size] as returned by `forward` -> [N, num_features], what other heads than `head` take."""
        return hidden


class DenseCausalLM(CausalLM):
    """Embedding, `DecoderLayer`s, RMS norm, head: the Llama family. A model says how its layers differ."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        require_causal(config)
        self.num_layers = config.num_hidden_layers
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        layer_configs = [self.layer_config(config, layer_idx) for layer_idx in range(self.num_layers)]
        self.num_kv_heads = layer_configs[0].num_kv_heads
        self.head_dim = layer_configs[0].head_dim
        self.ignored_weights = ("lm_head.weight",) if config.tie_word_embeddings else ()

        self.embedding = Embedding(self.vocab_size, self.hidden_size, "model.embed_tokens")
        rotaries = self.make_rotaries(config)
        self.layers = nn.ModuleList(
            DecoderLayer(layer_idx, f"model.layers.{layer_idx}", layer_config, rotaries[layer_idx])
            for layer_idx, layer_config in enumerate(layer_configs)
        )
        self.norm = RMSNorm(
            self.hidden_size, "model.norm", layer_configs[0].eps, plus_one=layer_configs[0].norm_plus_one
        )
        self.head = LMHead(
            self.vocab_size,
            self.hidden_size,
            "lm_head",
            tied=self.embedding if config.tie_word_embeddings else None,
        )
        self.max_position = min(rotary.max_position for rotary in rotaries)

    def layer_config(self, config: Any, layer_idx: int) -> DecoderLayerConfig:
        """What the layers look like."""
        raise NotImplementedError

    def make_rotaries(self, config: Any) -> list[RotaryEmbedding]:
        """The rotary embedding of each layer; layers with the same settings share one."""
        return [RotaryEmbedding(config, self.head_dim)] * self.num_layers

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden_size]."""
        return self.embedding(input_ids)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, kv_caches: KVCaches, meta: AttentionMetadata
    ) -> torch.Tensor:
        x, residual = self.embed(input_ids), None
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x, residual = layer(x, residual, positions, kv_cache, meta)
        x, _ = self.norm(x, residual)
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def sliding_window(config: Any, layer_idx: int) -> int | None:
    """The window of a layer: that of its layer type where the configuration has types, else the one of all layers.

    Raises:
        UnsupportedFeatureError: the layer is of a type that is no attention over past tokens.
    """
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None or layer_types[layer_idx] == "sliding_attention":
        return config.sliding_window
    if layer_types[layer_idx] == "full_attention":
        return None
    raise UnsupportedFeatureError(
        f"Layers of the type {layer_types[layer_idx]!r} in this model's configuration (layer_types) are not "
        "implemented; there are 'full_attention' and 'sliding_attention'.",
        parameter="model",
        value=layer_types[layer_idx],
    )


def require_causal(config: Any) -> None:
    """Checks that tokens see those before them alone.

    Raises:
        UnsupportedFeatureError: they do not.
    """
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedFeatureError(
            f"This {config.model_type} model wants attention in both directions (is_causal, "
            "use_bidirectional_attention), which is not implemented for decoders.",
            parameter="model",
        )


def require_settings(config: Any, **settings: Any) -> None:
    """Checks that the configuration keeps to the values that are implemented, or leaves a setting out (or None).

    Raises:
        UnsupportedFeatureError: it does not.
    """
    for name, implemented in settings.items():
        value = getattr(config, name, None)
        if value is not None and value != implemented:
            raise UnsupportedFeatureError(
                f"{name}={value!r} in this model's configuration is not implemented for {config.model_type}; only "
                f"{implemented!r} is.",
                parameter="model",
                value=value,
            )
