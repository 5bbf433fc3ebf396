"""Texts per second of taco beside transformers (and sentence-transformers, if it is installed), in one run.

    python benchmarks/embed.py [--model FOLDER] [--dtype float32] [--threads N] [--repeats 5] [--json FILE]

The workload: 256 English texts of about 68 tokens, from strings to normalised vectors; all-MiniLM-L6-v2 unless a model
with mean pooling is given. transformers computes padded batches of texts sorted by length, and pools over their masks,
as sentence-transformers does. Engines take turns; a figure is the median of the repeats. The vectors of all engines are
compared first. The limit is what the products of the linear layers alone would allow at the measured peak of the matrix
library.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from taco import LLM, __version__
from taco.entrypoints.demo_model import packaged_model
from taco.kernels.linear import linear, pack_weight

NUM_TEXTS = 256
NUM_WORDS = (38, 66)  # of a text: about 68 tokens in all
PEER_BATCH = 32


def make_texts() -> list[str]:
    """Pieces of ordinary English: the topics of Python's own help."""
    from pydoc_data.topics import topics

    words = [word for word in " ".join(topics.values()).split() if word.strip(".,:;()").isalpha()]
    rng = random.Random(0)
    starts = [rng.randrange(len(words) - NUM_WORDS[1]) for _ in range(NUM_TEXTS)]
    return [" ".join(words[start : start + rng.randint(*NUM_WORDS)]) for start in starts]


class Taco:
    name = "taco"

    def __init__(self, model: str, dtype: str) -> None:
        self.llm = LLM(model, task="embed", dtype=dtype)

    def run(self, texts: list[str]) -> np.ndarray:
        return self.llm.embed(texts, output="numpy", use_tqdm=False)


class Transformers:
    name = "transformers"

    def __init__(self, model: str, dtype: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.model = transformers.AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(self, texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        vectors = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for first in range(0, len(texts), PEER_BATCH):
            rows = order[first : first + PEER_BATCH]
            batch = self.tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][:, :, None]
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return vectors


class SentenceTransformers:
    name = "sentence-transformers"

    def __init__(self, model: str, dtype: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})

    def run(self, texts: list[str]) -> np.ndarray:
        vectors = self.model.encode(texts, batch_size=PEER_BATCH, show_progress_bar=False, normalize_embeddings=True)
        return np.asarray(vectors, np.float32)


def peak_products(dtype: torch.dtype, size: int) -> float:
    """Operations/s of a product of 512 rows with a packed weight [4 size, size]."""
    x, packed = torch.randn(512, size).to(dtype), pack_weight(torch.randn(4 * size, size).to(dtype))
    times = []
    for _ in range(40):
        started = time.perf_counter()
        linear(x, packed)
        times.append(time.perf_counter() - started)
    return 2 * 512 * 4 * size * size / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = args.model or str(packaged_model("minilm"))
    texts = make_texts()
    taco = Taco(model, args.dtype)
    engines: list[Any] = [taco, Transformers(model, args.dtype)]
    try:
        engines.append(SentenceTransformers(model, args.dtype))
    except ImportError:
        print("sentence-transformers is not installed")
    vectors = [engine.run(texts) for engine in engines]  # a warm-up, too
    for engine, found in zip(engines[1:], vectors[1:], strict=True):
        print(f"largest difference to {engine.name}: {np.abs(found - vectors[0]).max():.1e}")
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for _ in range(args.repeats):
        for engine in engines:
            started = time.perf_counter()
            engine.run(texts)
            times[engine.name].append(time.perf_counter() - started)

    config = taco.llm.model_config.hf_config
    tokenizer = taco.llm.get_tokenizer()
    num_tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    size = config.hidden_size
    params = config.num_hidden_layers * (4 * size * size + 2 * size * config.intermediate_size)
    limit = NUM_TEXTS * peak_products(getattr(torch, args.dtype), size) / (2 * params * num_tokens)
    rates = {name: [NUM_TEXTS / seconds for seconds in found] for name, found in times.items()}
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(
        f"{platform.machine()}, {args.threads} threads, {date.today()}; taco {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {Path(model).name} in {args.dtype}, {NUM_TEXTS} texts, "
        f"{num_tokens / NUM_TEXTS:.0f} tokens each"
    )
    print(f"limit {limit:.0f} texts/s")
    for name, found in rates.items():
        ratio = "" if name == "taco" else f", ratio {medians['taco'] / medians[name]:.2f}"
        print(f"{name}: {medians[name]:.1f} texts/s ({min(found):.1f} to {max(found):.1f}){ratio}")
    if args.json:
        head = {"date": str(date.today()), "taco": __version__, "torch": torch.__version__, "threads": args.threads}
        head |= {"transformers": transformers.__version__, "model": Path(model).name, "dtype": args.dtype}
        args.json.write_text(json.dumps(head | {"limit": limit, "texts_per_s": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
