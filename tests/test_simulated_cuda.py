"""The simulated CUDA device: what fails on a real one fails on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taco import LLM
from taco.errors import OutOfMemoryError
from tests.simulated_cuda import OTHERS_BYTES, CudaTensor, SimulatedCuda, simulated_cuda
from tests.tiny_pooling_models import save_model

if torch.backends.cuda.is_built():
    pytest.skip("this torch is one for CUDA", allow_module_level=True)


@pytest.fixture
def device() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as device:
        yield device


@pytest.fixture(params=[False, True], ids=["", "inference mode"])
def inference_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(request.param):
        yield


def on_device(*values: Any, **options: Any) -> torch.Tensor:
    return torch.tensor(values, device="cuda", **options)


def test_results_and_views_are_those_of_the_cpu(device: SimulatedCuda, inference_mode: None) -> None:
    x = torch.randn(2, 3, 4, 8)
    y = x.cuda()
    assert isinstance(y, CudaTensor) and y.is_cuda and y.device == torch.device("cuda:0")
    for compute in (
        lambda x: x.softmax(-1).sum(0),
        lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
        lambda x: F.pad(torch.rms_norm(x, (8,)), (1, 2), value=-1.0),
        lambda x: torch.cat([part.t() for part in x[:, 0, 1:3].unbind(0)], 1),
        lambda x: torch.where(x > 0, x, -torch.inf).topk(3).indices[..., 0].double(),
        lambda x: (x + torch.arange(8, device=x.device) * torch.ones((), device=x.device)).view(torch.int32).long(),
        lambda x: F.linear(x, torch.full((5, 8), 0.5, device=x.device)),
    ):
        torch.testing.assert_close(compute(y).cpu(), compute(x))
    view = y.view(-1)[8:16]
    view += 1
    view[2:4] = 7
    y[0, 0, 1, 4].mul_(2)
    expected = x.clone()
    expected[0, 0, 1] += 1
    expected[0, 0, 1, 2:4] = 7
    expected[0, 0, 1, 4] *= 2
    assert torch.equal(y.cpu(), expected)
    wide = torch.mm(
        on_device([1.0, 2.0], dtype=torch.bfloat16), on_device([3.0], [4.0]).bfloat16(), out_dtype=torch.float32
    )
    assert wide.tolist() == [[11.0]]


def test_devices_do_not_mix(device: SimulatedCuda, inference_mode: None) -> None:
    here, there = torch.ones(3), on_device(1.0, 2.0, 3.0)
    index = torch.tensor([0, 2])
    for mix in (
        lambda: here + there,
        lambda: torch.cat((here, there)),
        lambda: torch.stack((torch.tensor(1.0), there[0])),
        lambda: here + there[0],
        lambda: there.index_select(0, index),
        lambda: there.index_copy_(0, index.cuda(), here[:2]),
        lambda: here[index.cuda()],
        lambda: F.linear(there, torch.ones(2, 3)),
        lambda: torch.ones(3, 3, dtype=torch.int64, device="cuda") @ torch.ones(3, 3, dtype=torch.int64, device="cuda"),
    ):
        with pytest.raises(RuntimeError, match="same device|not implemented"):
            mix()
    with pytest.raises(TypeError, match="cpu"):
        there.numpy()
    assert (there * torch.tensor(2.0)).tolist() == [2, 4, 6], "a number stands for itself"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x[torch.tensor([0])],
        lambda x: x[[0, 1]],
        lambda x: x.__setitem__(torch.tensor([0]), 1),
        lambda x: x.__setitem__(0, 5.0),
        lambda x: x.__setitem__(torch.tensor([0, 2]).pin_memory().cuda(non_blocking=True), 1),
        lambda x: x.view(1, 3).__setitem__((slice(None), torch.tensor([0]).pin_memory().cuda(non_blocking=True)), 1),
        lambda x: x.index_put_([torch.tensor([0]).pin_memory().cuda(non_blocking=True)], torch.tensor(1.0)),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).copy_(x),
        lambda x: torch.ones(3).cuda(non_blocking=True),
        lambda x: torch.ones(3, 2).pin_memory().t().cuda(non_blocking=True),
        lambda x: torch.ones(3).pin_memory().to("cuda", torch.bfloat16, non_blocking=True),
        lambda x: torch.ones(3).copy_(x, non_blocking=True),
        lambda x: torch.tensor([1.0], device="cuda"),
    ],
)
def test_what_waits_is_counted(device: SimulatedCuda, inference_mode: None, wait: Any) -> None:
    x = on_device(1.0, 2.0, 3.0)
    before = device.num_syncs
    wait(x)
    assert device.num_syncs > before
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        wait(x)


def test_ordinary_work_does_not_wait(device: SimulatedCuda, inference_mode: None) -> None:
    x, index = on_device(1.0, 2.0, 3.0), on_device(0, 2)
    torch.cuda.set_sync_debug_mode("error")
    x[index] = x[index] * 2
    x.view(1, 3)[:, 0] = 5.0
    x.view(1, 3)[0] = 5.0
    x[x > 4] = 0
    x.index_fill_(0, index, 1.0)
    x.masked_fill_(x > 1, -torch.inf)
    torch.ones(3).pin_memory().cuda(non_blocking=True)
    x.to("cpu", non_blocking=True)
    torch.empty(4, pin_memory=True)[1:].copy_(x, non_blocking=True)


def test_copies_arrive_with_the_event_that_follows_them(device: SimulatedCuda, inference_mode: None) -> None:
    x = on_device(1.0, 2.0, 3.0)
    events, copies = [], []
    for step in range(2):
        copies.append((x + step).to("cpu", non_blocking=True))
        x[:1] = 9.0  # later than the copy
        events.append(torch.cuda.Event())
        events[-1].record()
    assert copies[0].isnan().all()
    events[0].synchronize()
    assert copies[0].tolist() == [1, 2, 3] and copies[1].isnan().all()
    torch.cuda.synchronize()
    assert copies[1].tolist() == [10, 3, 4]
    numbers = x.long().to("cpu", non_blocking=True)
    assert (numbers < -1000).all()
    x.cpu()  # waits for all that comes before
    assert numbers.tolist() == [9, 2, 3]


def test_pinned_memory_is_read_and_written_in_the_order_of_the_device(device: SimulatedCuda) -> None:
    host, x, y = torch.zeros(2, 3).pin_memory(), on_device(1.0, 2.0, 3.0), on_device(4.0, 5.0, 6.0)
    host[0].copy_(x, non_blocking=True)
    back = host[0].cuda(non_blocking=True)
    host[0].copy_(y, non_blocking=True)
    assert host.tolist() == [[0, 0, 0], [0, 0, 0]], "nothing has arrived yet"
    assert back.tolist() == [1, 2, 3] and host[0].tolist() == [4, 5, 6]
    host[1].cuda(non_blocking=True)
    host[1] = 7
    with pytest.raises(RuntimeError, match="pinned memory was changed"):
        torch.cuda.synchronize()


def test_memory_is_accounted_for(device: SimulatedCuda, inference_mode: None) -> None:
    assert torch.cuda.memory_allocated() == 0
    x = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() == 4096
    view = x[10:]
    y = x + 1
    del x
    assert torch.cuda.memory_allocated() == 8192, "a view keeps its memory"
    del view
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (4096, 8192)
    free, total = torch.cuda.mem_get_info()
    assert total - free == 8192 + OTHERS_BYTES
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info() == (total - 4096 - OTHERS_BYTES, total)
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 4096
    y.data = y.data.to("cpu")
    assert torch.cuda.memory_allocated() == 0 and y.device.type == "cpu" and not y.is_cuda
    y.data = y.data.to("cuda")
    assert torch.cuda.memory_allocated() == 4096 and y.is_cuda and (y == 1).all()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(total, dtype=torch.uint8, device="cuda")


def test_new_memory_holds_nothing_useful(device: SimulatedCuda, inference_mode: None) -> None:
    assert torch.empty(3, device="cuda").isnan().all()
    assert (torch.empty_like(on_device(1, 2)) < -1000).all()
    assert torch.empty(3, pin_memory=True).isnan().all()


def test_nothing_of_it_stays(tmp_path: Path) -> None:
    with simulated_cuda():
        x = on_device(1.0)
    assert not torch.cuda.is_available() and not torch.accelerator.is_available()
    with pytest.raises(RuntimeError, match="outside of the simulation"):
        x + 1
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta


@pytest.mark.parametrize(
    ("num_bytes", "options", "message"),
    [
        (OTHERS_BYTES + (40 << 10), {}, "the weights did not fit .* take a smaller model or data type"),
        (OTHERS_BYTES + (2 << 20), {}, r"a step of \d+ tokens did not fit .* smaller max_num_batched_tokens"),
        (64 << 20, {"num_gpu_blocks_override": 50_000}, "a KV cache of 50000 blocks did not fit"),
        (
            24 << 20,
            {"gpu_memory_utilization": 0.35, "max_num_batched_tokens": 128},
            "one sequence may have max_model_len=130",
        ),
    ],
    ids=["weights", "step", "cache", "budget"],
)
def test_a_device_that_is_too_small_is_an_error_that_says_what_to_do(
    tmp_path: Path, num_bytes: int, options: dict[str, Any], message: str
) -> None:
    save_model(tmp_path, "llama", "AutoModelForCausalLM")
    with simulated_cuda(num_bytes) as device:
        with pytest.raises(OutOfMemoryError, match=message):
            LLM(str(tmp_path), device="cuda", dtype="float32", swap_space=0, **options)
        assert device.memory.allocated == 0
