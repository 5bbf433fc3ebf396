"""Transformers as the oracle, in float32, from the same weights."""

from __future__ import annotations

from pathlib import Path

import torch

TIE = 1e-4  # logits this close may come in either order


def build(path: str | Path):
    """The transformers model of a folder or GGUF file, in float32."""
    from transformers import AutoModelForCausalLM

    from taco.models.loader.opening import open_checkpoint
    from taco.models.loader.source import load_hf_config, resolve_model

    source = resolve_model(str(path))
    config = load_hf_config(source)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    state = model.state_dict()
    checkpoint = open_checkpoint(source, load_format="auto", hf_config=config)
    with torch.no_grad():
        for name in checkpoint.infos():
            state[name].copy_(checkpoint.read(name))
    checkpoint.close()
    model.tie_weights()
    return model


class Reference:
    """Answers whether given tokens are what greedy decoding would have chosen, one forward pass a sequence."""

    def __init__(self, path: str | Path) -> None:
        self.model = build(path)
        self._known: set[tuple[int, ...]] = set()
        self._prompt_logprobs: dict[tuple[int, ...], list[float]] = {}

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[len(token_ids), vocab] float32."""
        return self.model(torch.tensor([token_ids])).logits[0].float()

    def check_greedy(self, prompt: list[int], output: list[int]) -> None:
        """Asserts that every token of `output` is the most likely one, or tied with it."""
        key = (*prompt, -1, *output)
        if key in self._known:
            return
        logits = self.logits([*prompt, *output])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        short = logits.amax(1) - chosen
        assert (short <= TIE).all(), f"token {int((short > TIE).nonzero()[0])} of the output is not the most likely one"
        self._known.add(key)

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """Log-probability of each prompt token but the first."""
        key = tuple(prompt)
        if key not in self._prompt_logprobs:
            logprobs = self.logits(prompt)[:-1].log_softmax(1)
            self._prompt_logprobs[key] = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        return self._prompt_logprobs[key]


def english_prompts(tokenizer, lengths) -> list[list[int]]:
    """Token ids cut out of Python's own help, one prompt a length."""
    from pydoc_data.topics import topics

    text = " ".join(list(topics.values())[:12])
    ids = tokenizer.encode(text, add_special_tokens=False)
    start, prompts = 0, []
    for length in lengths:
        if start + length > len(ids):
            start = start % 97 + 1
        prompts.append(ids[start : start + length])
        start += length
    return prompts
