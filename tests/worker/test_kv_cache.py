from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from taco.errors import OutOfMemoryError
from taco.worker import kv_cache
from taco.worker.kv_cache import KVCache, lazy_zeros
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


@pytest.fixture
def pinned(monkeypatch):
    """The buffers of swap space for CUDA, made of ordinary memory; caches take it although they are on the CPU."""
    buffers = []
    monkeypatch.setattr(
        kv_cache, "pinned_empty", lambda shape, dtype: buffers.append(torch.zeros(shape, dtype=dtype)) or buffers[-1]
    )

    def make(**options):
        cache = make_cache(num_host_blocks=0, **options)
        cache.device = torch.device("cuda")  # the tensors stay where they are: only the swap space is made for a GPU
        cache._num_host_blocks = 11
        cache._allocate_swap_space()
        cache.device = torch.device("cpu")
        return cache

    return make, buffers


def test_blocks_cross_between_the_device_and_any_piece_of_pinned_memory(pinned):
    make, buffers = pinned
    cache = make(num_layers=3, num_blocks=9)
    assert [buffer.shape[2] for buffer in buffers] == [10, 1]  # of 768 bytes: 8 KiB, and the rest
    fill(cache)
    before = [numbers(cache, block) for block in range(9)]
    cache.swap_out([(1, 10), (5, 9), (2, 8), (7, 0), (8, 1)])
    assert [int(number) for number in buffers[1][:, :, 0, 0, 0, 0].flatten()] == before[1]
    assert [int(number) for number in buffers[0][:, :, 9, 0, 0, 0].flatten()] == before[5]
    cache.clear([1, 2, 5, 7, 8])
    cache.swap_in([(10, 3), (9, 1), (8, 2), (0, 6), (1, 4)])
    assert [numbers(cache, block) for block in (3, 1, 2, 6, 4)] == [before[block] for block in (1, 5, 2, 7, 8)]
    assert numbers(cache, 5) == [0] * 6


@pytest.mark.parametrize("block_bytes", [4096, 368_640, 2 << 20, 1_234_567])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 1000, 1024, 11_650])
def test_pinned_memory_that_torch_rounds_up_is_little_more_than_what_is_asked_for(num_blocks, block_bytes):
    pieces = kv_cache.pinned_pieces(num_blocks, block_bytes)
    assert sum(pieces) == num_blocks and min(pieces) > 0
    taken = sum(1 << (count * block_bytes - 1).bit_length() for count in pieces)
    assert taken <= (num_blocks + len(pieces)) * block_bytes
    assert len(pieces) <= num_blocks.bit_length() + 1


def test_swap_space_is_taken_with_the_cache_and_its_error_says_what_to_lower(monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: out of memory\nhints")

    monkeypatch.setattr(kv_cache.KVCache, "_allocate_swap_space", fail)
    with pytest.raises(
        OutOfMemoryError, match=r"swap space .*\(CUDA error: out of memory\): pass a smaller swap_space"
    ):
        make_cache()
    make_cache(num_host_blocks=0)


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


def test_swap_space_on_a_cpu_takes_memory_block_by_block():
    # 64 blocks of 4 MiB in tensors of 64 KiB each, of which four blocks are used.
    code = """if True:
        import psutil, torch
        from taco.worker.kv_cache import KVCache
        rss = lambda: psutil.Process().memory_info().rss
        cache = KVCache(num_layers=32, num_blocks=6, num_host_blocks=64, num_kv_heads=4, block_size=64, head_dim=128,
                        dtype=torch.bfloat16, device=torch.device("cpu"))
        for layer in cache.layers:
            for tensor in layer:
                tensor.fill_(1)
        cache.copy([(1, 2)])
        before = rss()
        cache.swap_out([(1, 0), (2, 1), (3, 2), (4, 3)])
        assert rss() - before < 32 << 20, (rss() - before) / (1 << 20)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_taken_when_it_is_written_and_given_back_when_it_is_freed():
    # In a process of its own, in which the allocator holds pieces as large as these (after pieces of so much are freed,
    # glibc no longer takes them from the system and gives them back to it).
    code = """if True:
        import psutil, torch
        from taco.worker.kv_cache import lazy_zeros
        rss = lambda: psutil.Process().memory_info().rss
        for size in range(1, 32):
            torch.ones(size << 20, dtype=torch.uint8)
        before = rss()
        tensors = [lazy_zeros((16, 1 << 20), torch.uint8) for _ in range(16)]
        assert rss() - before < 64 << 20, "taken at once"
        for tensor in tensors[:8]:
            tensor.fill_(1)
        assert rss() - before > 64 << 20
        assert not any(int(tensor.sum()) for tensor in tensors[8:])
        kept = torch.ones(1 << 20, dtype=torch.uint8)  # above them, if they are in the allocator's heap
        del tensor, tensors
        assert rss() - before < 64 << 20, "not given back"
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_zeros_of_any_shape_and_type():
    for shape in ((0, 2, 3), (3,), (5, 7, 2), (1 << 20, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            zeros = lazy_zeros(shape, dtype)
            assert zeros.shape == shape and zeros.dtype == dtype and not zeros.any()
            assert zeros.is_contiguous() and torch.equal(zeros.add_(1), torch.ones(shape, dtype=dtype))
