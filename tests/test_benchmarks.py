"""The benchmark for GPUs runs from end to end with toy shapes on the CPU, so that it does when there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_gpu_benchmark_writes_every_figure(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [path] = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["memory_bytes_per_s"] > 0 and result["products_per_s"] > 0
    assert list(result["models"]) == ["smollm2-135m", "qwen3-0.6b", "llama-3.1-8b"]
    for name, model in result["models"].items():
        account = model["account_bytes"]
        assert account["sum"] == account["weights"] + account["kv_cache"] + account["step"]
        assert list(model["workloads"]) == ["one", "batch", "prefill", "prefix"]
        for workload_name, workload in model["workloads"].items():
            has_peer = name == "smollm2-135m" and workload_name in ("one", "batch")
            assert list(workload["figures"]) == (["taco", "transformers"] if has_peer else ["taco"])
            assert workload["limit"] > 0  # of products in bfloat16, which taco passes where the processor has none
            assert all(figure > 0 for figure in workload["figures"]["taco"])
            assert 0 < workload["host_ms"] <= workload["step_ms"]
            assert workload["parts_ms"]["op decoder_layer"] > 0
