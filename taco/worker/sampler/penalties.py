"""Repetition, frequency and presence penalties, from the distinct tokens of each row and their counts."""

from __future__ import annotations

import numpy as np
import torch

from taco.plan import NewRow
from taco.worker.sampler.feature import Feature, Selection
from taco.worker.sampler.tables import RaggedRows, RowArray
from taco.worker.transfer import to_device


class Penalties(Feature):
    """Lowers the logits of tokens that occurred.

    In this order: `repetition_penalty` r divides positive logits of the tokens of prompt and output by r and multiplies
    the others by r (Keskar et al., "CTRL", 2019); `frequency_penalty` is subtracted once for each occurrence in the
    output; `presence_penalty` once for each token that occurs in the output.
    """

    follows_output = True

    def __init__(self, vocab_size: int, num_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._repetition = RowArray(num_rows, np.float32, device)
        self._frequency = RowArray(num_rows, np.float32, device)
        self._presence = RowArray(num_rows, np.float32, device)
        # The distinct tokens of each row, those of the prompt first, then in the order in which the output brought
        # them; the number is how often the output has each.
        self._table = RaggedRows(num_rows)
        self._places: dict[int, dict[int, int]] = {}  # of each row: token id -> index of its pair
        self._outputs: dict[int, list[int]] = {}
        self._num_prompt_ids = np.zeros(num_rows, np.int64)

    def add(self, new: NewRow) -> bool:
        params, row = new.params, new.row
        if params.repetition_penalty == 1 and not params.frequency_penalty and not params.presence_penalty:
            return False
        self._repetition.set(row, params.repetition_penalty)
        self._frequency.set(row, params.frequency_penalty)
        self._presence.set(row, params.presence_penalty)
        prompt_ids = list(dict.fromkeys(filter(self._is_known, new.token_ids[: new.num_prompt_tokens])))
        self._places[row] = {token_id: index for index, token_id in enumerate(prompt_ids)}
        self._num_prompt_ids[row] = len(prompt_ids)
        self._table.set(row, prompt_ids)
        self._outputs[row] = []
        self.append(row, new.token_ids[new.num_prompt_tokens :])
        return True

    def remove(self, row: int) -> None:
        self._table.clear(row)
        del self._places[row], self._outputs[row]

    def append(self, row: int, token_ids: list[int]) -> None:
        places = self._places[row]
        for token_id in token_ids:
            self._outputs[row].append(token_id)
            if not self._is_known(token_id):
                continue
            index = places.get(token_id)
            if index is None:
                places[token_id] = len(places)
                self._table.extend(row, (token_id,), 1.0)
            else:
                self._table.increment(row, index, 1.0)

    def rollback(self, row: int, num_tokens: int) -> None:
        places, output = self._places[row], self._outputs[row]
        for _ in range(num_tokens):
            token_id = output.pop()
            if not self._is_known(token_id):
                continue
            # Pairs of the output are in the order of their first tokens, so the one that empties is the last.
            if places[token_id] == len(places) - 1 >= self._num_prompt_ids[row] and token_id not in output:
                del places[token_id]
                self._table.pop(row)
            else:
                self._table.increment(row, places[token_id], -1.0)

    def apply(self, selection: Selection, logits: torch.Tensor) -> None:
        device = logits.device
        sources, token_ids, counts = self._table.gather(selection.rows)
        index = to_device(selection.positions[sources] * self._vocab_size + token_ids, device)
        source = to_device(sources, device)
        count = to_device(counts, device)
        repetition = self._repetition.on_device(selection.rows)[source]
        frequency = self._frequency.on_device(selection.rows)[source]
        presence = self._presence.on_device(selection.rows)[source]
        values = logits.view(-1)[index]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values = values - frequency * count
        values = values - presence * (count > 0)
        logits.view(-1)[index] = values

    def _is_known(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size
