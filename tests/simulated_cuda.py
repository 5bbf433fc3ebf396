"""A CUDA device for machines without one: its tensors compute on the CPU, and its rules are those of CUDA.

Within `simulated_cuda()` torch reports one CUDA device. A tensor on it is a `CudaTensor`, which says that its device is
"cuda:0" and holds a CPU tensor that nobody else sees; operations compute on these, so results are real ones and views
share memory. What a program could do with a CPU tensor but not with one on a GPU fails:

- an operation that takes tensors of both devices raises, unless the one on the host is a single number;
- values reach the host through a copy alone. One with `non_blocking=True` has not arrived when it returns: a new tensor
  holds `poison` and an old one what it held, until an event that was recorded after it is synchronised with, or until
  something waits for the device;
- a copy out of pinned memory reads it late as well: changing the memory in the meantime raises when the copy ends;
- what waits for the device is counted, and raises in `torch.cuda.set_sync_debug_mode("error")`. That is more than
  torch notices there: a `non_blocking` copy that has to wait, as its host memory is not pinned, its type changes or its
  memory has gaps, is one of them;
- new memory is `poison`, the memory in use and its peak are accounted for in steps of 512 bytes, as torch's allocator
  does, and more than there is raises `torch.OutOfMemoryError`.

What it cannot show: whether CUDA has a kernel for an operation and type, what its sums round to, what an operation
takes while it runs, how fast anything is, and what comes of several streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
OTHERS_BYTES = 8 << 20  # held by "other processes"
GRANULE = 512
# What is added to addresses: code that takes one for host memory crashes, as it would on a GPU.
ADDRESS_OFFSET = 1 << 56

aten = torch.ops.aten


class CudaTensor(torch.Tensor):
    """A tensor on the simulated device.

    Attributes:
        inner: the values, on the CPU.
        allocation: the account of its memory, which its views share; None once `data` has moved it to the host.
    """

    inner: torch.Tensor
    allocation: _Allocation | None

    @staticmethod
    def __new__(cls, inner: torch.Tensor, allocation: _Allocation) -> CudaTensor:
        # In inference mode, views of tensors that were made before it are as these are.
        if inner.is_inference() != torch.is_inference_mode_enabled():
            with torch.inference_mode(inner.is_inference()):
                return cls(inner, allocation)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        self.inner, self.allocation = inner, allocation
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Within the simulation its mode comes first.
        raise RuntimeError(f"{func} on a tensor of the simulated device, outside of the simulation")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return HOST if self.allocation is None else DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.allocation is not None

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert (value.shape, value.dtype, value.stride()) == (self.shape, self.dtype, self.stride())
        on_device = isinstance(value, CudaTensor)
        self.inner = value.inner if on_device else value
        self.allocation = value.allocation if on_device else None

    def data_ptr(self) -> int:
        return self.inner.data_ptr() + ADDRESS_OFFSET

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    # Methods for which torch makes the device of the tensor the current one; for that it needs its libraries for CUDA.

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert _simulation is not None
        return _simulation.copy(self, source, non_blocking)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        return self if self.is_contiguous() else self.clone(memory_format=memory_format)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        places = aten.nonzero.default(self)
        return places.unbind(1) if as_tuple else places

    def __int__(self) -> int:
        return int(self.item())

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.item())

    def __invert__(self) -> torch.Tensor:
        return self.bitwise_not()

    def __getitem__(self, index: Any) -> torch.Tensor:
        assert _simulation is not None
        return _simulation.get_item(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        assert _simulation is not None
        _simulation.set_item(self, index, value)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"{self.inner!r} in {self.device}"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with what nobody can take for a result: NaN, or a negative number far from 0."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else 91 if tensor.dtype == torch.uint8 else -91_919_191)


def _poison_small(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor of the host likewise, unless it is large, such as a swap space: its pages are not taken yet."""
    return poison(tensor) if tensor.nbytes <= 1 << 20 else tensor


class _Memory:
    """What the allocator of the device has handed out."""

    def __init__(self, total_bytes: int) -> None:
        self.total = total_bytes - OTHERS_BYTES
        self.allocated = self.peak = self.reserved = 0
        self.lock = threading.RLock()  # tensors die in any thread, and while another one is made

    def take(self, num_bytes: int) -> None:
        with self.lock:
            if self.allocated + num_bytes > self.total:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {num_bytes} bytes. The simulated GPU has {self.total}, of "
                    f"which {self.allocated} are allocated."
                )
            self.allocated += num_bytes
            self.peak = max(self.peak, self.allocated)
            self.reserved = max(self.reserved, self.allocated)

    def give_back(self, num_bytes: int) -> None:
        with self.lock:
            self.allocated -= num_bytes


class _Allocation:
    """Memory of one storage; it is given back when the last tensor that uses it is gone."""

    __slots__ = ("_memory", "_num_bytes")

    def __init__(self, memory: _Memory, num_bytes: int) -> None:
        num_bytes = -(-num_bytes // GRANULE) * GRANULE
        memory.take(num_bytes)
        self._memory, self._num_bytes = memory, num_bytes

    def __del__(self) -> None:
        if hasattr(self, "_num_bytes"):
            self._memory.give_back(self._num_bytes)


class SimulatedCuda:
    """The device, and torch's view of it.

    Attributes:
        num_syncs: how often something has waited for the device, events aside.
    """

    def __init__(self, total_bytes: int) -> None:
        self.memory = _Memory(total_bytes)
        self.num_syncs = 0
        self.sync_debug_mode = "default"
        # What the device still has to do with host memory, in order, and the number of what it has done.
        self._in_flight: list[_Write | _Read] = []
        self._num_done = 0
        self._pinned: dict[int, StorageWeakRef] = {}

    # Time

    def time(self) -> int:
        """How much the device has been given to do with host memory."""
        return self._num_done + len(self._in_flight)

    def finish(self, time: int | None = None) -> None:
        """The device does what it had been given to do by then, or all of it."""
        count = len(self._in_flight) if time is None else max(0, time - self._num_done)
        done, self._in_flight = self._in_flight[:count], self._in_flight[count:]
        self._num_done += len(done)
        with torch.inference_mode():  # the device may write where torch does not let the host write
            for copy in done:
                copy.finish()

    def wait(self, reason: str) -> None:
        """The host waits for the device."""
        self.num_syncs += 1
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {reason}")
        if self.sync_debug_mode == "warn":
            warnings.warn(f"called a synchronizing CUDA operation: {reason}", stacklevel=3)
        self.finish()

    # Copies

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Declares the memory of a host tensor pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        if len(self._pinned) % 1024 == 0:
            self._pinned = {key: storage for key, storage in self._pinned.items() if not storage.expired()}
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        storage = self._pinned.get(tensor.untyped_storage()._cdata)
        return storage is not None and not storage.expired()

    def _wait_for_copy(self, what: str, host: torch.Tensor, non_blocking: bool, is_direct: bool) -> bool:
        """Waits for a copy, unless the device does it by itself; whether it has waited.

        Args:
            is_direct: it neither needs another tensor on the host in between, which would not be pinned.
        """
        if non_blocking and is_direct and self.is_pinned(host):
            return False
        self.wait(what if not non_blocking else f"{what} that goes through host memory which is not pinned")
        return True

    def read_host(self, source: torch.Tensor, dtype: torch.dtype, non_blocking: bool) -> torch.Tensor:
        """The values that a copy to the device takes from a host tensor, which is not to be changed."""
        is_direct = source.dtype == dtype and source.is_contiguous()
        if self._wait_for_copy("a copy from host to device", source, non_blocking, is_direct):
            return source
        values = self._as_the_device_sees(source)
        self._in_flight.append(_Read(source, values))
        return values

    def _as_the_device_sees(self, host: torch.Tensor) -> torch.Tensor:
        """A copy of what a host tensor will hold when the device has done what comes before."""
        key = host.untyped_storage()._cdata
        writes = [
            copy for copy in self._in_flight if isinstance(copy, _Write) and copy.target.untyped_storage()._cdata == key
        ]
        before = [write.target.clone() for write in writes]
        for write in writes:
            write.finish()
        values = host.clone()
        for write, old in zip(reversed(writes), reversed(before), strict=True):
            write.target.copy_(old)
        return values

    def write_host(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        """Copies values of the device to a host tensor."""
        is_direct = target.is_contiguous()  # types are changed on the device
        if self._wait_for_copy("a copy from device to host", target, non_blocking, is_direct):
            target.copy_(source)
        else:
            self._in_flight.append(_Write(target, source.to(target.dtype, copy=True)))

    # Operations

    def wrap(self, inner: torch.Tensor) -> CudaTensor:
        """A tensor of the device with memory of its own."""
        return CudaTensor(inner, _Allocation(self.memory, inner.untyped_storage().nbytes()))

    def dispatch(self, mode: _Mode, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation, of this device or of the host."""
        call = _Call(func, args, kwargs)
        if not call.on_device and call.target != DEVICE:
            result = call.run()
            return self.pin(_poison_small(result)) if kwargs.get("pin_memory") else result
        operation = _operation(func)
        if operation.is_composite:
            with mode:
                return func.decompose(*args, **kwargs)
        return (operation.special or SimulatedCuda.compute)(self, call)

    def compute(self, call: _Call) -> Any:
        """Runs an operation on the values and wraps its results."""
        operation = _operation(call.func)
        call.check(operation)
        if operation.waits:
            self.wait(str(call.func))
        result = call.run()
        if call.target == HOST:
            return result
        if isinstance(result, torch.Tensor):
            wrapped = self._wrap_result(call, result, operation.is_view)
            if operation.leaves_memory:
                poison(result)
            return wrapped
        if isinstance(result, (tuple, list)):
            return type(result)(
                self._wrap_result(call, part, operation.is_view) if isinstance(part, torch.Tensor) else part
                for part in result
            )
        return result

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """`target.copy_(source, non_blocking)`."""
        return _copy(self, _Call(aten.copy_.default, (target, source, non_blocking), {}))

    def _wrap_result(self, call: _Call, inner: torch.Tensor, is_view: bool) -> torch.Tensor:
        if is_view:
            for tensor in call.on_device:
                if tensor.inner is inner:  # an operation in place
                    assert tensor.shape == inner.shape, f"{call.func} has changed the shape of a tensor in place"
                    return tensor
            for tensor in call.on_device:
                if _share_memory(inner, tensor.inner):
                    return CudaTensor(inner, tensor.allocation)  # type: ignore[arg-type]
        return self.wrap(inner)

    def get_item(self, tensor: CudaTensor, index: Any) -> torch.Tensor:
        """`tensor[index]`."""
        if not tensor.is_cuda:
            return tensor.inner[index]
        found = tensor.inner[self._inner_index(index)]
        return CudaTensor(found, tensor.allocation) if _share_memory(found, tensor.inner) else self.wrap(found)

    def set_item(self, tensor: CudaTensor, index: Any, value: Any) -> None:
        """`tensor[index] = value`."""
        if isinstance(value, CudaTensor):
            value = value.inner
        elif not isinstance(value, (int, float)):
            self.wait("setting items to values of the host")
        elif not _fills(index, tensor.dim()):
            self.wait("writing a number at indices: it comes from the host")
        is_number = isinstance(value, (int, float)) or value.dim() == 0
        tensor.inner[self._inner_index(index, fills=is_number)] = value

    def _inner_index(self, index: Any, fills: bool = False) -> Any:
        """The index for the inner tensor.

        Args:
            fills: a single number is written there, for which torch does not count the places of a mask.
        """
        if isinstance(index, tuple):
            return tuple(self._inner_index(part, fills) for part in index)
        if isinstance(index, CudaTensor):
            if index.dtype in (torch.bool, torch.uint8) and not fills:
                self.wait("indexing with a mask")
            elif index.dim() == 0:
                self.wait("indexing with a number of the device")
            return index.inner
        if isinstance(index, (torch.Tensor, np.ndarray, list)):
            self.wait("indexing with values of the host")
        return index

    # torch.cuda

    def event_class(self) -> type:
        """What stands in for `torch.cuda.Event`."""
        device = self

        class Event:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._time = 0

            def record(self) -> None:
                self._time = device.time()

            def synchronize(self) -> None:
                device.finish(self._time)

        return Event

    def set_sync_debug_mode(self, mode: str) -> None:
        assert mode in ("default", "warn", "error")
        self.sync_debug_mode = mode

    def empty_cache(self) -> None:
        self.memory.reserved = self.memory.allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.memory.peak = self.memory.allocated

    def patches(self) -> list[Any]:
        """What replaces torch's functions, as context managers."""
        memory = self.memory
        cuda: dict[str, Any] = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "synchronize": lambda device=None: self.finish(),
            "empty_cache": self.empty_cache,
            "mem_get_info": lambda device=None: (memory.total - memory.reserved, memory.total + OTHERS_BYTES),
            "memory_allocated": lambda device=None: memory.allocated,
            "memory_reserved": lambda device=None: memory.reserved,
            "max_memory_allocated": lambda device=None: memory.peak,
            "reset_peak_memory_stats": self.reset_peak_memory_stats,
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "Event": self.event_class(),
            "device": lambda device: contextlib.nullcontext(),
        }
        accelerator: dict[str, Any] = {
            "is_available": lambda: True,
            "current_accelerator": lambda: DEVICE,
            "empty_host_cache": lambda: None,
        }
        to, tensor = torch.Tensor.to, torch.tensor

        def indexed(target: Any) -> Any:
            """A device with its number, without which torch asks its libraries for CUDA for the current one."""
            is_device = isinstance(target, (str, torch.device))
            return DEVICE if is_device and torch.device(target) == torch.device("cuda") else target

        def to_indexed(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return to(self, *map(indexed, args), **{name: indexed(value) for name, value in kwargs.items()})

        def tensor_indexed(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            # By itself it would make the tensor without asking modes.
            made = tensor(*args, **kwargs)
            return made if device is None else made.to(device)

        run = threading.Thread.run

        def run_with_device(thread: threading.Thread) -> None:
            with _Mode(self):  # torch's modes are those of a thread
                run(thread)

        return [
            *(mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()),
            *(mock.patch.object(torch.accelerator, name, value, create=True) for name, value in accelerator.items()),
            mock.patch.object(torch.Tensor, "to", to_indexed),
            mock.patch.object(torch, "tensor", tensor_indexed),
            mock.patch.object(torch.Tensor, "cuda", lambda tensor, **options: tensor.to(DEVICE, **options)),
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor.clone())),
            mock.patch.object(torch.Tensor, "is_pinned", self.is_pinned),
            mock.patch.object(threading.Thread, "run", run_with_device),
            # Triton's kernels take addresses of a real device. Their candidates decline, and torch's operators answer.
            mock.patch("taco.kernels.triton.usable", lambda: False),
        ]


@contextlib.contextmanager
def simulated_cuda(total_bytes: int = 1 << 30) -> Iterator[SimulatedCuda]:
    """Within this context torch has a CUDA device.

    Args:
        total_bytes: memory of the device, as far as its account goes; what is in use is taken from the host.
    """
    global _simulation
    assert not torch.cuda.is_available() and _simulation is None, "there is a device already"
    _device_constructors()  # torch remembers, for `with torch.device(...)`, what it finds under the names of functions
    device = _simulation = SimulatedCuda(total_bytes)
    try:
        with contextlib.ExitStack() as stack:
            for patch in device.patches():
                stack.enter_context(patch)
            with _Mode(device):
                yield device
    finally:
        _simulation = None


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def simulated_and_real_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test on the simulated device, where torch is made for CPUs, and by `make test-gpu` on a real one."""
    if request.param == "real":
        yield
    elif torch.backends.cuda.is_built():
        pytest.skip("this torch is one for CUDA")
    else:
        monkeypatch.setattr("taco.worker.worker.gc.collect", lambda: 0)  # a third of the time of these tests
        with simulated_cuda():
            yield


_simulation: SimulatedCuda | None = None


class _Mode(TorchDispatchMode):
    """Within this context operations of the thread come to the device first."""

    def __init__(self, device: SimulatedCuda) -> None:
        super().__init__()
        self._device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip the compiler, torch would import it first, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.dispatch(self, func, args, kwargs or {})


def _fills(index: Any, num_dims: int) -> bool:
    """Whether a number written at this index is an argument of what the device does, and no tensor of its own."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, torch.Tensor) and part.dtype not in (torch.bool, torch.uint8) for part in parts):
        return False
    return not (len(parts) == num_dims and all(isinstance(part, int) for part in parts))


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class _Write:
    """A copy to host memory that is under way."""

    def __init__(self, target: torch.Tensor, values: torch.Tensor) -> None:
        self.target, self._values = target, values

    def finish(self) -> None:
        self.target.copy_(self._values)


class _Read:
    """A copy from contiguous host memory that is under way."""

    def __init__(self, source: torch.Tensor, values: torch.Tensor) -> None:
        self._source, self._taken = source, _bytes(values)

    def finish(self) -> None:
        if _bytes(self._source) != self._taken:
            raise RuntimeError("pinned memory was changed before the device had copied it")


def _bytes(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


class _Operation:
    """What is to be known of an operation of torch, found once.

    Attributes:
        is_composite: torch makes it of others, on every device; in inference mode it comes here undivided. Some of them
            stay so, to save time: what they are made of takes no memory and never waits.
        is_view: results may share memory with arguments.
        takes_numbers: a tensor of the host with a single number is welcome in place of one of the device.
        waits: a value that goes to the host, or the size of a result, depends on values of the device.
    """

    def __init__(self, func: Any) -> None:
        packet = func.overloadpacket
        is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        self.is_composite = is_composite and packet not in _WHOLE
        self.is_view = any(result.alias_info is not None for result in func._schema.returns)
        self.takes_numbers = torch.Tag.pointwise in func.tags or packet in _TAKES_NUMBERS
        # Indices that are masks are looked for where they are.
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        self.waits = bool(tags & set(func.tags)) and packet is not aten.index
        self.is_product = packet in _PRODUCTS
        self.leaves_memory = packet in _UNINITIALISED
        self.special = _SPECIAL.get(packet)


_operation = functools.cache(_Operation)


class _Call:
    """One operation with its arguments.

    Attributes:
        args, kwargs: with the inner tensors in place of those of the device, and the host in place of it.
        on_device: its tensors of the device.
        on_host: its tensors of the host.
        target: device of new tensors; None where no argument is of a device.
    """

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.func = func
        self.on_device: list[CudaTensor] = []
        self.on_host: list[torch.Tensor] = []
        self.target: torch.device | None = None
        self.args = list(map(self._take, args))
        self.kwargs = {name: self._take(value) for name, value in kwargs.items()}
        if self.target is None and self.on_device:
            self.target = DEVICE

    def _take(self, value: Any) -> Any:
        if isinstance(value, CudaTensor):
            (self.on_host if value.allocation is None else self.on_device).append(value)
            return value.inner
        if isinstance(value, torch.Tensor):
            self.on_host.append(value)
        elif isinstance(value, torch.device):
            self.target = DEVICE if value.type == "cuda" else value
            return HOST if value.type == "cuda" else value
        elif type(value) is list or type(value) is tuple:
            return type(value)(map(self._take, value))
        return value

    def run(self) -> Any:
        if self.kwargs.get("pin_memory"):
            self.kwargs["pin_memory"] = False
        return self.func(*self.args, **self.kwargs)

    def check(self, operation: _Operation) -> None:
        """Raises where a real device would."""
        if any(tensor.dim() or not operation.takes_numbers for tensor in self.on_host):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {self.func} got some on cuda:0 and some on cpu"
            )
        if operation.is_product and not self.on_device[0].dtype.is_floating_point:
            raise RuntimeError(f'"{self.func}" not implemented for {self.on_device[0].dtype} on CUDA')


def _to_copy(device: SimulatedCuda, call: _Call) -> torch.Tensor:
    (source,) = call.args
    ignored = ("device", "non_blocking", "pin_memory")
    options = {name: value for name, value in call.kwargs.items() if name not in ignored}
    non_blocking = bool(call.kwargs.get("non_blocking"))
    if not call.on_device:
        source = device.read_host(source, options.get("dtype") or source.dtype, non_blocking)
    values = aten._to_copy(source, **options)
    if call.target == DEVICE:
        return device.wrap(values)
    result = poison(torch.empty_like(values))
    if non_blocking:
        device.pin(result)  # so does torch
    device.write_host(result, values, non_blocking)
    return result


def _copy(device: SimulatedCuda, call: _Call) -> torch.Tensor:
    target, source = call.args[:2]
    non_blocking = bool(call.args[2]) if len(call.args) > 2 else bool(call.kwargs.get("non_blocking"))
    wrapped = call.on_device[0]
    if target is not wrapped.inner:
        device.write_host(target, source, non_blocking)
        return target
    target.copy_(device.read_host(source, target.dtype, non_blocking) if call.on_host else source)
    return wrapped


def _index(device: SimulatedCuda, call: _Call) -> Any:
    """Reads or writes at indices. They may be on the host, and are then copied first."""
    if not any(call.args[0] is tensor.inner for tensor in call.on_device):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    for index in call.args[1]:
        if index is None:
            continue
        if any(index is tensor for tensor in call.on_host):
            device.wait("indexing with values of the host")
            call.on_host = [tensor for tensor in call.on_host if tensor is not index]
        elif index.dtype in (torch.bool, torch.uint8):
            device.wait("indexing with a mask")
    if len(call.args) > 2 and any(call.args[2] is tensor for tensor in call.on_host):
        device.wait("writing a number at indices: it comes from the host")
    return device.compute(call)


def _mm(device: SimulatedCuda, call: _Call) -> Any:
    """CPUs lack the product whose result has another type."""
    if call.func is not getattr(aten.mm, "dtype", None):
        return device.compute(call)
    call.check(_operation(call.func))
    x, y, dtype = call.args
    return device.wrap(torch.mm(x.to(dtype), y.to(dtype)))


_SPECIAL: dict[Any, Callable[[SimulatedCuda, _Call], Any]] = {
    aten._to_copy: _to_copy,
    aten.copy_: _copy,
    aten.index: _index,
    aten.index_put: _index,
    aten.index_put_: _index,
    aten._index_put_impl_: _index,
    aten.mm: _mm,
}
_UNINITIALISED = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}
_WHOLE = {aten.reshape, aten.flatten, aten.unflatten, aten.linear, aten.matmul, aten.chunk, aten.view_as, aten.narrow}
_TAKES_NUMBERS = {aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_}
_TAKES_NUMBERS |= {aten.index_put, aten.index_put_, aten._index_put_impl_}
_PRODUCTS = {aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addmv, aten.mv, aten.dot}
