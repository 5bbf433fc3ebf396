from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from taco.worker import kv_cache
from taco.worker.kv_cache import KVCache
from taco.worker.worker import Worker


def make_cache(num_blocks=6, num_host_blocks=4, **options):
    options = {"num_layers": 2, "num_kv_heads": 2, "block_size": 4, "head_dim": 8, "dtype": torch.float32} | options
    return KVCache(num_blocks=num_blocks, num_host_blocks=num_host_blocks, device=torch.device("cpu"), **options)


def fill(cache):
    """Gives every block of every tensor a number of its own."""
    for i, tensor in enumerate(tensor for layer in cache.layers for tensor in layer):
        tensor.copy_((torch.arange(len(tensor)) + 100 * i).view(-1, 1, 1, 1).expand_as(tensor))


def numbers(cache, block):
    tensors = [tensor for layer in cache.layers for tensor in layer]
    assert all((tensor[block] == tensor[block, 0, 0, 0]).all() for tensor in tensors)
    return [int(tensor[block, 0, 0, 0]) for tensor in tensors]


def test_swapping_out_and_in_brings_content_to_another_block():
    cache = make_cache()
    fill(cache)
    cache.swap_out([(1, 3), (5, 0)])
    for block in (1, 5):
        for layer in cache.layers:
            for tensor in layer:
                tensor[block] = -1
    cache.swap_in([(3, 2), (0, 1)])
    assert numbers(cache, 2) == [1, 101, 201, 301]
    assert numbers(cache, 1) == [5, 105, 205, 305]
    assert numbers(cache, 4) == [4, 104, 204, 304]


@pytest.mark.parametrize("options", [{}, {"block_size": 1, "head_dim": 1, "num_kv_heads": 3, "dtype": torch.bfloat16}])
@pytest.mark.parametrize(
    "host_blocks", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 5], [5], [6, 1, 4, 3]], ids=lambda blocks: str(blocks)
)
def test_blocks_come_back_from_wherever_they_were_swapped_to(host_blocks, options):
    cache = make_cache(num_host_blocks=7, **options)
    fill(cache)
    device_blocks = [4, 1, 5, 2][: len(host_blocks)]
    before = {block: numbers(cache, block) for block in range(6)}
    cache.swap_out(list(zip(device_blocks, host_blocks, strict=True)))
    assert {block: numbers(cache, block) for block in range(6)} == before
    cache.clear(device_blocks)
    targets = [1, 4, 2, 5][: len(host_blocks)]
    pairs = list(zip(reversed(host_blocks), targets, strict=True))
    for some in (pairs[:1], pairs[1:]):
        if some:
            cache.swap_in(some)
    for source, target in zip(reversed(device_blocks), targets, strict=True):
        assert numbers(cache, target) == before[source]
    assert numbers(cache, 3) == before[3]


def test_swap_space_for_cuda_is_one_pinned_buffer(monkeypatch):
    buffers = []
    monkeypatch.setattr(
        kv_cache, "pinned_empty", lambda shape, dtype: buffers.append(torch.zeros(shape, dtype=dtype)) or buffers[-1]
    )
    cache = make_cache(num_layers=3)
    fill(cache)
    cache.device = torch.device("cuda")  # the tensors stay where they are: only the swap space is made for a GPU
    assert buffers == []
    cache.swap_out([(1, 3), (5, 0)])
    cache.swap_in([(3, 2), (0, 1)])
    [buffer] = buffers
    assert buffer.nbytes == 4 * KVCache.bytes_per_block(3, 2, 4, 8, torch.float32)
    assert numbers(cache, 2) == [1, 101, 201, 301, 401, 501]
    assert numbers(cache, 1) == [5, 105, 205, 305, 405, 505]
    assert [int(number) for number in buffer[:, :, 3, 0, 0, 0].flatten()] == numbers(cache, 2)


def test_shutdown_gives_pinned_memory_back_once_nobody_uses_it(monkeypatch):
    worker = Worker.__new__(Worker)
    worker.device, worker.model, worker.runner = torch.device("cuda"), object(), object()
    calls = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(empty_cache=lambda: calls.append("device")))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: calls.append(worker.runner), raising=False)
    worker.shutdown()
    assert calls == ["device", None]


def test_copying_leaves_the_source():
    cache = make_cache()
    fill(cache)
    cache.copy([(1, 2), (1, 3)])
    assert numbers(cache, 1) == numbers(cache, 2) == numbers(cache, 3) == [1, 101, 201, 301]


def test_cleared_blocks_are_zero_and_others_are_not():
    cache = make_cache()
    fill(cache)
    cache.layers[0][0][2] = float("nan")
    cache.clear([2])
    assert numbers(cache, 2) == [0, 0, 0, 0]
    assert numbers(cache, 3) == [3, 103, 203, 303]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_block_is_what_a_block_takes(dtype):
    cache = make_cache(dtype=dtype)
    total = sum(tensor[0].nbytes for layer in cache.layers for tensor in layer)
    assert KVCache.bytes_per_block(2, 2, 4, 8, dtype) == total


def test_memory_is_taken_when_it_is_written():
    # In a process of its own: one that has run other tests may hold free memory to hand out again.
    code = """if True:
        import psutil, torch
        from taco.worker.kv_cache import lazy_zeros
        rss = lambda: psutil.Process().memory_info().rss
        before = rss()
        tensor = lazy_zeros((256, 1 << 20), torch.uint8)
        assert rss() - before < 64 << 20
        tensor[:128].fill_(1)
        assert rss() - before > 64 << 20
        assert int(tensor[200].sum()) == 0
    """
    subprocess.run([sys.executable, "-c", code], check=True)
