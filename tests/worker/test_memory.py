from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from taco.errors import OutOfMemoryError
from taco.layers.linear import Linear
from taco.worker import memory

SHAPE = memory.CacheGeometry(num_layers=2, num_kv_heads=2, head_dim=8, block_bytes=1000)


def make_config(
    *,
    max_model_len=100,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    device="cpu",
    fit=False,
    max_logprobs=20,
    **cache,
):
    cache = {
        "block_size": 16,
        "num_gpu_blocks_override": None,
        "kv_cache_memory_bytes": None,
        "cpu_kv_cache_bytes": None,
        "swap_space_bytes": 0,
    } | cache
    return SimpleNamespace(
        cache_config=SimpleNamespace(**cache),
        scheduler_config=SimpleNamespace(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        ),
        model_config=SimpleNamespace(
            fit_max_model_len=fit, dtype=torch.float32, logits_processors=(), max_logprobs=max_logprobs
        ),
        watermark_config=None,
        device_config=SimpleNamespace(device=device),
    )


def test_the_budget_is_spent_but_not_on_blocks_nobody_could_use():
    assert memory.num_blocks(make_config(), SHAPE, 20_500) == 20
    assert memory.num_blocks(make_config(), SHAPE, 10**9) == 1 + 4 * 7


@pytest.mark.parametrize("budget", [0, 999, 7_999])
def test_too_small_a_budget_fails_with_arguments_that_work(budget):
    with pytest.raises(OutOfMemoryError) as caught:
        memory.num_blocks(make_config(), SHAPE, budget)
    text = str(caught.value)
    assert "kv_cache_memory_bytes=8000" in text
    assert memory.num_blocks(make_config(), SHAPE, 8000) == 8
    if budget > 2000:
        assert '("auto" takes what fits)' in text
        fitting = int(text.split("Pass max_model_len=")[1].split()[0])
        assert memory.num_blocks(make_config(max_model_len=fitting), SHAPE, budget)
        with pytest.raises(OutOfMemoryError):
            memory.num_blocks(make_config(max_model_len=fitting + 1), SHAPE, budget)


def test_an_override_that_is_too_small_names_one_that_works():
    with pytest.raises(OutOfMemoryError, match="num_gpu_blocks_override=8 or more"):
        memory.num_blocks(make_config(num_gpu_blocks_override=7), SHAPE, 0)
    assert memory.num_blocks(make_config(num_gpu_blocks_override=8), SHAPE, 0) == 8


def test_a_length_left_to_us_is_fitted():
    assert memory.num_blocks(make_config(fit=True), SHAPE, 3500) == 3


def test_the_cpu_budget_is_as_stated_or_modest(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 6 * memory.GIB)
    assert memory.cpu_kv_budget(make_config(), 2 * memory.GIB) == 2 * memory.GIB
    assert memory.cpu_kv_budget(make_config(kv_cache_memory_bytes=5), 0) == 5
    assert memory.cpu_kv_budget(make_config(cpu_kv_cache_bytes=6), 0) == 6
    with pytest.raises(OutOfMemoryError, match=f"kv_cache_memory_bytes={4 * memory.GIB} or less; half of that leaves"):
        memory.cpu_kv_budget(make_config(kv_cache_memory_bytes=5 * memory.GIB), 2 * memory.GIB)
    fitting = make_config(kv_cache_memory_bytes=4 * memory.GIB)
    assert memory.cpu_kv_budget(fitting, 2 * memory.GIB) == 4 * memory.GIB
    with pytest.raises(OutOfMemoryError, match=r"a KV cache of 6\.00 GiB .* beside the 512\.0 MiB that a step"):
        memory.cpu_kv_budget(make_config(kv_cache_memory_bytes=6 * memory.GIB), memory.GIB // 2)
    with pytest.raises(OutOfMemoryError, match="a smaller max_num_batched_tokens"):
        memory.cpu_kv_budget(make_config(), 6 * memory.GIB)
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 100 * memory.GIB)
    assert memory.cpu_kv_budget(make_config(), 0) == memory.DEFAULT_CPU_KV_BYTES


def test_the_swap_space_has_to_fit_beside_the_cache(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 6 * memory.GIB)
    assert memory.cpu_kv_budget(make_config(swap_space_bytes=2 * memory.GIB), 2 * memory.GIB) == memory.GIB
    with pytest.raises(OutOfMemoryError, match=f"a swap space of 3.00 GiB: pass kv_cache_memory_bytes={memory.GIB} or"):
        memory.cpu_kv_budget(
            make_config(kv_cache_memory_bytes=5 << 30, swap_space_bytes=3 * memory.GIB), 2 * memory.GIB
        )
    with pytest.raises(OutOfMemoryError, match=r"a smaller max_num_batched_tokens \(it is 64\) or swap_space"):
        memory.cpu_kv_budget(make_config(swap_space_bytes=4 * memory.GIB), 2 * memory.GIB)

    memory.check_swap_space(make_config(swap_space_bytes=6 * memory.GIB))
    with pytest.raises(OutOfMemoryError, match=r"a swap space of 7\.00 GiB .* only 6\.00 GiB .* pass swap_space=3 or"):
        memory.check_swap_space(make_config(swap_space_bytes=7 * memory.GIB))


def test_a_step_takes_more_with_more_tokens_and_wider_layers():
    def step_bytes(num_tokens: int, size: int) -> int:
        layer = torch.nn.Sequential(Linear(size, 2 * size, "a", bias=False), Linear(2 * size, size, "b", bias=False))
        model = SimpleNamespace(layers=[layer, layer], vocab_size=100)
        return memory.cpu_step_bytes(make_config(max_num_batched_tokens=num_tokens), model)

    logits = memory.LOGITS_BYTES["cpu"] // 400 * 400 + (memory.WHOLE_LOGITS_COPIES - 1) * memory.BLOCK_ENTRIES_CPU * 4
    scores = 10 * 21 * memory.SCORE_BYTES
    assert step_bytes(10, 8) == logits + scores + 2 * 10 * 6 * 8 * 4


def test_log_probabilities_of_the_whole_vocabulary_are_counted():
    few, all_but_one, whole = (
        memory.sampling_bytes(make_config(max_logprobs=number), 16, 1000, "cuda") for number in (20, 999, 2000)
    )
    assert all_but_one - few == 16 * 979 * memory.SCORE_BYTES
    sorting = (memory.SORTED_LOGITS_COPIES - memory.WHOLE_LOGITS_COPIES) * 16 * 1000 * 4
    assert whole - all_but_one == 16 * memory.SCORE_BYTES + sorting


def test_available_memory_is_plausible():
    assert 10 << 20 < memory.available_host_bytes() < 1 << 50


def make_group(folder, *, limit, used, **stat):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {number}\n" for name, number in stat.items()))


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of a machine with much memory, and the file that names the group of this process."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    (tmp_path / "groups").mkdir()
    (tmp_path / "own").write_text("4:memory:/old\n0::/\n")
    return tmp_path / "groups", tmp_path / "own"


def test_file_pages_of_a_container_are_available(groups):
    make_group(groups[0], limit=1000, used=900, anon=300, inactive_file=350, active_file=150, shmem=100)
    assert memory.available_host_bytes(*groups) == 1000 - 900 + 350 + 150
    make_group(groups[0], limit=1000, used=900, anon=900)
    assert memory.available_host_bytes(*groups) == 100
    make_group(groups[0], limit=1000, used=1100, anon=1100)
    assert memory.available_host_bytes(*groups) == 0


def test_the_tightest_group_around_the_process_counts(groups):
    make_group(groups[0], limit=5000, used=1000)
    make_group(groups[0] / "jobs", limit=3000, used=1000)
    make_group(groups[0] / "jobs" / "own", limit=9000, used=1000)
    make_group(groups[0] / "other", limit=1, used=1)
    for own, available in [("/", 4000), ("/jobs", 2000), ("/jobs/own", 2000), ("/not/visible", 4000), ("/../up", 4000)]:
        groups[1].write_text(f"0::{own}\n")
        assert memory.available_host_bytes(*groups) == available, own


def test_groups_of_version_1_have_limits_too(groups):
    groups[1].write_text("7:cpu,cpuacct:/jobs\n4:hugetlb,memory:/jobs/own\n")
    root = groups[0] / "memory"
    for folder, limit in [(root, 9223372036854771712), (root / "jobs", 3000), (root / "jobs" / "own", 2500)]:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text("1000\n")
        (folder / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 100\ntotal_active_file 50\n")
    assert memory.available_host_bytes(*groups) == 2500 - 1000 + 150
    groups[1].write_text("4:memory:/docker/not/visible\n")  # as in a container, which sees its own group as the root
    assert memory.available_host_bytes(*groups) == 10**12
    (root / "memory.limit_in_bytes").write_text("1200\n")
    assert memory.available_host_bytes(*groups) == 1200 - 1000 + 150


def test_without_a_limit_the_machine_counts(groups):
    assert memory.available_host_bytes(*groups) == 10**12
    make_group(groups[0], limit="max", used=900)
    assert memory.available_host_bytes(*groups) == 10**12
    groups[1].unlink()
    assert memory.available_host_bytes(*groups) == 10**12


def test_running_out_of_device_memory_says_what_to_change():
    with pytest.raises(OutOfMemoryError, match=r"^a step did not fit .*\(CUDA out of memory\. Tried.*\): pass x=1\.$"):
        with memory.explain_device_memory("a step", "pass x=1"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nlong table")
    with pytest.raises(RuntimeError, match="^another$"), memory.explain_device_memory("a step", "pass x=1"):
        raise RuntimeError("another")


def test_logits_slices_keep_to_their_budget():
    for vocab_size in (100, 49152, 262144, 10**9):
        rows = memory.logits_rows(vocab_size, "cpu")
        assert rows >= 1 and (rows == 1 or rows * vocab_size * 4 <= memory.LOGITS_BYTES["cpu"])
