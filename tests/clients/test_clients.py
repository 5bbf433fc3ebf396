"""Programs written for vLLM, as they are published, through the alias: `make test-clients`.

Each runs in a process of its own with the real SmolLM2-135M-Instruct in float32, and its answers are compared with
those of transformers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
QUESTIONS = ["What is the capital of France?", "Name three colours."]
PROMPTS = ["The capital of France is", "One, two, three,"]
VERSIONS = ["0.6", "0.33"]

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; see `make test-clients`")


def run(*arguments: object, cwd: Path | None = None) -> None:
    """Runs a Python program and shows what it wrote if it fails."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "0.3",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]


def run_through_alias(version: str, *arguments: object, cwd: Path | None = None) -> None:
    run("-m", "taco.vllm", "--vllm-version", version, *arguments, cwd=cwd)


@pytest.fixture(scope="session")
def model_folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged GGUF file as a folder of transformers, which the programs read configs and tokenizers from."""
    needs("accelerate")  # what transformers reads GGUF files with
    import torch
    from transformers import AutoModelForCausalLM

    from taco.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32)
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    load_tokenizer(str(smollm2_path)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def expected(model_folder: Path) -> dict[str, str]:
    """First lines that transformers generates, by prompt or question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def first_line(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(output, skip_special_tokens=True).split("\n")[0]

    def as_chat(question: str) -> str:
        message = {"role": "user", "content": question}
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    texts = {prompt: first_line(prompt) for prompt in PROMPTS}
    texts |= {question: first_line(as_chat(question)) for question in QUESTIONS}
    assert len(set(texts.values())) == len(texts) and all(texts.values())
    return texts


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("program", "module", "inputs"),
    [
        ("use_langchain.py", "langchain_community", PROMPTS),
        ("use_llama_index.py", "llama_index", PROMPTS),
        ("use_alpaca_eval.py", "alpaca_eval", PROMPTS),
        ("use_outlines.py", "outlines", QUESTIONS),
        ("use_distilabel.py", "distilabel", QUESTIONS),
    ],
)
def test_texts_are_those_of_transformers(
    program: str,
    module: str,
    inputs: Sequence[str],
    version: str,
    model_folder: Path,
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    needs(module)
    run_through_alias(version, HERE / "programs" / program, model_folder, tmp_path / "out.json", *inputs)
    assert json.loads((tmp_path / "out.json").read_text()) == [expected[text] for text in inputs]


def test_outlines_restricts_an_answer(model_folder: Path, tmp_path: Path) -> None:
    needs("outlines")
    run_through_alias("0.33", HERE / "programs" / "use_outlines_choice.py", model_folder, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[0] in ("Yes", "No")


TASKS = "taco_generate,taco_loglikelihood,taco_rolling"


def lm_eval(model: str, settings: str, output: Path, *options: str) -> list[str]:
    arguments = ["-m", "lm_eval", "run", "--model", model, "--model_args", settings, "--include_path", "."]
    return [*arguments, "--tasks", TASKS, "--output_path", str(output), "--log_samples", *options]


def samples(folder: Path) -> dict[tuple[str, int], Any]:
    """Responses by task and document."""
    found: dict[tuple[str, int], Any] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            if name.startswith("samples_"):
                task = next(task for task in TASKS.split(",") if name.startswith(f"samples_{task}_"))
                for line in (Path(root) / name).read_text().splitlines():
                    sample = json.loads(line)
                    found[task, sample["doc_id"]] = sample["resps"][0][0]
    return found


@pytest.mark.parametrize(("version", "options"), [("0.6", []), ("0.33", ["--apply_chat_template"])])
def test_lm_eval_gives_the_numbers_of_its_transformers_backend(
    version: str, options: list[str], model_folder: Path, tmp_path: Path
) -> None:
    needs("lm_eval")
    settings = f"pretrained={model_folder},dtype=float32,"
    run(*lm_eval("hf", settings + "max_length=512", tmp_path / "hf", "--device", "cpu", *options), cwd=HERE / "tasks")
    taco = lm_eval("vllm", settings + "max_model_len=512", tmp_path / "taco", *options)
    run_through_alias(version, *taco, cwd=HERE / "tasks")

    theirs, ours = samples(tmp_path / "hf"), samples(tmp_path / "taco")
    num_questions = len((HERE / "tasks" / "questions.jsonl").read_text().splitlines())
    assert theirs.keys() == ours.keys() and len(ours) == 3 * num_questions
    for (task, doc_id), their_answer in theirs.items():
        answer = ours[task, doc_id]
        if task == "taco_generate":
            assert answer == their_answer
        elif task == "taco_loglikelihood":
            assert float(answer[0]) == pytest.approx(float(their_answer[0]), abs=1e-3)
            assert answer[1] == their_answer[1]  # whether it is the most likely continuation
        else:
            assert float(answer) == pytest.approx(float(their_answer), abs=1e-3)
