"""The sampler: from logits to tokens and their log-probabilities, for the whole batch at once.

| file | what it holds |
|---|---|
| `sampler.py` | `Sampler`: which features a row uses, the order in which they act |
| `feature.py` | the protocol of a feature, and the rows of one call |
| `tables.py` | per-row numbers and lists that are gathered without a loop |
| `processors.py`, `constraints.py`, `penalties.py` | features that edit logits |
| `batch_processors.py` | the engine's logits processors, which edit the logits of a whole call |
| `guided.py` | the feature that keeps outputs within a grammar |
| `thinking.py` | the feature that ends reasoning when its budget is used up |
| `filters.py` | temperature, top-k, top-p, min-p |
| `random.py`, `draw.py` | stateless random numbers, the draw, and traces in its place |
| `watermark.py` | the draw of marked rows |
| `logprobs.py` | log-probabilities |
| `candidates.py` | the most likely tokens of rows whose next token the host chooses |
"""

from __future__ import annotations

from taco.worker.sampler.logprobs import ScoresInTransit, concatenate
from taco.worker.sampler.sampler import Sampler, SamplerOutput

__all__ = ["Sampler", "SamplerOutput", "ScoresInTransit", "concatenate"]
