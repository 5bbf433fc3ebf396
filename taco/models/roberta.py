"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT with positions counted from the padding token on, and another classifier."""

from __future__ import annotations

from typing import Any

from taco.layers.base import Module
from taco.layers.linear import Linear
from taco.models.bert import BertClassifier, BertForPooling
from taco.models.pooling import is_tokenwise


class RobertaForPooling(BertForPooling):
    prefix = "roberta"
    name_prefixes = ("roberta.", "")

    def find_first_position(self, config: Any) -> int:
        return config.pad_token_id + 1

    def make_classifier(self, config: Any) -> Module:
        if is_tokenwise(config):
            return Linear(config.hidden_size, config.num_labels, "classifier", bias=True)
        return BertClassifier(config.hidden_size, config.num_labels, "classifier.dense", "classifier.out_proj")
