"""A simulated GPU: tensors of ``cuda:0``, ``cuda:1`` … that a CPU holds, as strict as GPUs are where a CPU forgives.

What it notes as a fault, or refuses as CUDA does:

- tensors of two devices in one operation;
- what one stream wrote, used on another before the host waited for the first; memory that is written or given back
  while another stream may still read it;
- a copy that doesn't wait, from or to memory that isn't pinned; memory that changes while such a copy may still read
  it. What such a copy writes is there only when its stream was waited for: until then the host sees 0xAA.

It computes as CUDA does where that is not what the CPU does: division by a number multiplies by the rounded reciprocal,
a product is rounded before ``addcmul`` adds it. With ``last_bits`` sums, products of matrices and functions such as
``exp`` come out larger or smaller by up to that share: a device adds in an order of its own. Sums of whole numbers are
exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mergekit_lite import deferred

UNWRITTEN = 0xAA
INEXACT = {"sum", "mean", "dot", "mm", "bmm", "matmul", "addmm", "exp", "log", "log_", "softmax", "_softmax", "pow"}
MOVES = {"to", "_to_copy"}
MAKERS = ("arange", "empty", "full", "ones", "zeros")  # of tensors on a device
WAITS = {"item", "_local_scalar_dense", "equal", "is_nonzero", "bincount"}
CPU = torch.device("cpu")


class Stream:
    """One queue of a device: how much was queued, how much of that the host waited for, and copies under way."""

    def __init__(self, gpus: SimulatedGpus, device: object = None) -> None:
        self.gpus = gpus
        self.device = gpus.current_device if device is None else torch.device(str(device))
        self.queued = self.finished = 0
        self.copies: list[Callable[[], object]] = []

    def synchronize(self) -> None:
        """Wait: what was queued is done."""
        self.gpus.waits += 1
        copies, self.copies = self.copies, []
        for finish in copies:
            finish()
        self.finished = self.queued

    def wait_stream(self, other: Stream) -> None:
        """Do what is queued from now on after what ``other`` has queued (here by waiting for it)."""
        other.synchronize()


class Memory:
    """Memory of a device: who wrote it last, and who read it since, each with its place in that stream's queue."""

    def __init__(self, owner: Stream) -> None:
        self.owner = owner
        self.written = (owner, owner.queued)
        self.read: dict[Stream, int] = {}

    def __del__(self) -> None:
        for stream, place in [self.written, *self.read.items()]:
            if stream is not self.owner and place > stream.finished:
                self.owner.gpus.faults.add("memory given back while another stream may still use it")

    def use(self, stream: Stream, operation: str, write: bool) -> None:
        """Note that an operation queued on a stream uses it."""
        last = [self.written, *(self.read.items() if write else ())]
        if any(other is not stream and place > other.finished for other, place in last):
            self.owner.gpus.faults.add(f"{operation}: uses what another stream was not waited for")
        if write:
            self.written, self.read = (stream, stream.queued), {}
        else:
            self.read[stream] = stream.queued


class DeviceTensor(torch.Tensor):
    """A tensor on a simulated GPU: ``raw`` are its elements, ``memory`` is shared by all views of them."""

    raw: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device, memory: Memory) -> DeviceTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=device,
        )
        tensor.raw, tensor.memory = raw, memory
        return tensor  # type: ignore[no-any-return]

    def __repr__(self, **_: object) -> str:
        return f"DeviceTensor({self.raw}, {self.device})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over what torch does in C++ with the device's own library, which is not there."""
        gpus = next(part for part in _flat(args) if isinstance(part, cls)).memory.owner.gpus
        if function is torch.Tensor.__getitem__:
            return gpus.wrapped(args[0].raw[args[1]], args[0].device, [args[0]])
        if function is torch.Tensor.__setitem__:
            place = gpus.wrapped(args[0].raw[args[1]], args[0].device, [args[0]])
            return place.copy_(args[2]) if isinstance(args[2], torch.Tensor) else place.fill_(args[2])
        if function is torch.Tensor.copy_:
            return gpus.copied(*args, **(kwargs or {}))
        if function is torch.where:
            args = [part if isinstance(part, torch.Tensor) else torch.tensor(part) for part in args]
        if function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if function is torch.Tensor.__float__:
            return float(args[0].cpu())
        with torch._C.DisableTorchFunctionSubclass():  # type: ignore[attr-defined]
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one operation."""
        kwargs = kwargs or {}
        first = next(part for part in _flat((*args, *kwargs.values())) if isinstance(part, cls))
        return first.memory.owner.gpus.run(function, args, kwargs)


class SimulatedGpus:
    """Some simulated GPUs, in the place of ``torch.cuda``.

    Attributes:
        faults: what would be wrong on a real one.
        contexts: the devices that something was done on.
        uploads: the bytes of each copy to a device.
        pinned: address and bytes of what is pinned now; ``most_pinned`` the most bytes so far.
        waits: how often the host waited.
        used: the streams that something was queued on.
        before: called before each operation on a device; what it raises is the device's error.
    """

    def __init__(self, count: int = 1, last_bits: float = 0.0) -> None:
        self.count = count
        self.last_bits = last_bits
        self.faults: set[str] = set()
        self.contexts: set[torch.device] = set()
        self.uploads: list[int] = []
        self.pinned: dict[int, int] = {}
        self.most_pinned = 0
        self.waits = 0
        self.used: set[Stream] = set()
        self.before: Callable[[str], None] = lambda operation: None
        self._local = threading.local()
        self._default = {}
        self._default = {number: Stream(self, f"cuda:{number}") for number in range(count)}

    # --- torch.cuda ---------------------------------------------------------------------------------------------------

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of ``torch.cuda``."""
        cudart = SimpleNamespace(cudaHostRegister=self._pin, cudaHostUnregister=self._unpin)
        for name, stand_in in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: self.count,
            "get_device_name": lambda device=None: "simulated GPU",
            "cudart": lambda: cudart,
            "Stream": lambda device=None: Stream(self, device),
            "stream": self.stream,
            "device": self.device,
            "synchronize": self.synchronize,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        to = torch.Tensor.to
        patch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: self._to(to, tensor, args, kwargs))
        for name in MAKERS:
            make = partial(self._make, getattr(torch, name))
            patch.setattr(torch, name, make)
            patch.setattr(deferred.torch, name, make)
        # Tensors of a class of one's own have no version counter in inference mode: the same arithmetic without it.
        patch.setattr(deferred.torch, "inference_mode", lambda mode=True: torch.no_grad())

    @property
    def current_device(self) -> torch.device:
        """The device of the thread."""
        return getattr(self._local, "device", torch.device("cuda:0"))

    @property
    def current_stream(self) -> Stream:
        """The stream of the thread, by default that of its device."""
        return getattr(self._local, "stream", None) or self._default[self.current_device.index or 0]

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        """Compute on a device by default."""
        before = self.current_device
        self._local.device = self._indexed(torch.device(str(device)))
        try:
            yield
        finally:
            self._local.device = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Queue on a stream."""
        before = getattr(self._local, "stream", None)
        self._local.stream = stream
        try:
            with self.device(stream.device):
                yield
        finally:
            self._local.stream = before

    def synchronize(self, device: object = None) -> None:
        """Wait for every stream."""
        for stream in [*self.used, *self._default.values()]:
            stream.synchronize()

    def _pin(self, address: int, nbytes: int, flags: int) -> int:
        self.contexts.add(self.current_device)
        self.pinned[address] = nbytes
        self.most_pinned = max(self.most_pinned, sum(self.pinned.values()))
        return 0

    def _unpin(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def _to(self, to: Callable[..., torch.Tensor], tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        place = kwargs.get("device", args[0] if args else None)
        if isinstance(place, DeviceTensor):
            place, args = place.device, (place.device, place.dtype)
        is_place = isinstance(place, torch.device | str)
        if isinstance(tensor, DeviceTensor) or not is_place or torch.device(place).type != "cuda":
            return to(tensor, *args, **kwargs)
        dtypes = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.dtype)]
        given = {"self": tensor, "device": place, "dtype": dtypes[0] if dtypes else None}
        return self._moved("to", given | {"non_blocking": kwargs.get("non_blocking", False)})

    def _make(self, make: Callable[..., torch.Tensor], *args: Any, device: object = None, **kwargs: Any) -> Any:
        if device is None or torch.device(str(device)).type != "cuda":
            pinned = kwargs.pop("pin_memory", False)
            made = make(*args, device=device, **kwargs)
            if pinned:
                self._pin(made.data_ptr(), made.nbytes, 0)
            return made
        place = self._indexed(torch.device(str(device)))
        self.before(str(make))
        self._queue(self.current_stream, place)
        return DeviceTensor(make(*args, **kwargs), place, Memory(self.current_stream))

    # --- operations ---------------------------------------------------------------------------------------------------

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Carry out one operation of aten."""
        name = function._schema.name.removeprefix("aten::")
        self.before(name)
        stream = self.current_stream
        arguments = _arguments(function)
        given = dict(zip(arguments, args, strict=False)) | kwargs
        if name in MOVES:
            return self._moved(name, given)
        if name == "copy_":
            return self.copied(given["self"], given["src"], given.get("non_blocking", False))
        flat = _flat(given.values())
        tensors = [part for part in flat if isinstance(part, DeviceTensor)]
        strangers = [part for part in flat if isinstance(part, torch.Tensor) and not isinstance(part, DeviceTensor)]
        device = tensors[0].device
        if any(tensor.dim() for tensor in strangers) or any(each.device != device for each in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, {device}")
        self._queue(stream, device)
        for argument, part in given.items():
            for tensor in _flat((part,)):
                if isinstance(tensor, DeviceTensor):
                    tensor.memory.use(stream, name, arguments[argument])
        if name in WAITS:
            stream.synchronize()
        raw_args, raw_kwargs = [_raw(part) for part in args], {key: _raw(part) for key, part in kwargs.items()}
        if "device" in raw_kwargs:
            raw_kwargs["device"] = CPU
        raw = self._computed(function, name, raw_args, raw_kwargs)
        if isinstance(raw, list | tuple):
            return [self.wrapped(part, device, tensors) for part in raw]
        return self.wrapped(raw, device, tensors) if isinstance(raw, torch.Tensor) else raw

    def wrapped(self, raw: torch.Tensor, device: torch.device, inputs: list[DeviceTensor]) -> Any:
        """Return a result as a tensor of the device: an input itself, a view of one, or a new one."""
        for tensor in inputs:
            if tensor.raw is raw:
                return tensor
        address = raw.untyped_storage().data_ptr()
        shared = [tensor.memory for tensor in inputs if tensor.raw.untyped_storage().data_ptr() == address and address]
        return DeviceTensor(raw, device, shared[0] if shared else Memory(self.current_stream))

    def _computed(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in ("div", "div_") and not (isinstance(args[1], torch.Tensor)) and args[0].is_floating_point():
            reciprocal = (1 / torch.tensor(args[1], dtype=args[0].dtype)).item()
            return args[0].mul_(reciprocal) if name == "div_" else args[0] * reciprocal
        if name == "addcmul_":
            return args[0].add_(args[1] * args[2])
        raw = function(*args, **kwargs)
        if not self.last_bits or name not in INEXACT or not raw.is_floating_point() or _are_whole(args):
            return raw
        share = max(self.last_bits, torch.finfo(raw.dtype).eps)
        last = (raw.view({4: torch.int32, 8: torch.int64}[raw.element_size()]) & 0xFF).double()
        factors = 1 + share * (last - 127.5) / 127.5  # as good as random, and the same every time
        return raw.mul_(factors) if name.endswith("_") else raw * factors.to(raw.dtype)

    def _queue(self, stream: Stream, device: torch.device) -> None:
        if stream.device != device:
            stream = self._default[device.index]
        self.contexts.add(device)
        self.used.add(stream)
        stream.queued += 1

    def _moved(self, name: str, given: dict[str, Any]) -> Any:
        """Return a tensor on another device, or in another dtype."""
        stream = self.current_stream
        source, other = given["self"], given.get("other")
        dtype = given.get("dtype") or (other.dtype if other is not None else source.dtype)
        device = given.get("device") or (other.device if other is not None else source.device)
        device = self._indexed(torch.device(device))
        is_here = isinstance(source, DeviceTensor) and self._indexed(source.device) == device
        if is_here and dtype == source.dtype and not given.get("copy", False) and name == "to":
            return source
        if isinstance(source, DeviceTensor):
            self._queue(stream, self._indexed(source.device))
            source.memory.use(stream, name, False)
        if device == CPU:
            stream.synchronize()
            return source.raw.to(dtype, copy=True)
        self._queue(stream, device)
        if not isinstance(source, DeviceTensor):
            self._upload(stream, source, given.get("non_blocking", False))
        raw = source.raw if isinstance(source, DeviceTensor) else source
        return DeviceTensor(raw.to(dtype, copy=True), device, Memory(stream))

    def copied(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Copy into a tensor that is there."""
        stream = self.current_stream
        for tensor, write in ((target, True), (source, False)):
            if isinstance(tensor, DeviceTensor):
                self._queue(stream, self._indexed(tensor.device))
                tensor.memory.use(stream, "copy_", write)
        if isinstance(target, DeviceTensor):
            if not isinstance(source, DeviceTensor):
                self._upload(stream, source, non_blocking)
            target.raw.copy_(source.raw if isinstance(source, DeviceTensor) else source)
            return target
        assert isinstance(source, DeviceTensor)
        result = source.raw.to(target.dtype, copy=True).view(target.shape)
        if not non_blocking:
            stream.synchronize()
            target.copy_(result)
            return target
        self._demand_pinned(target)
        target.view(torch.uint8).fill_(UNWRITTEN)
        stream.copies.append(partial(target.copy_, result))
        return target

    def _upload(self, stream: Stream, source: torch.Tensor, non_blocking: bool) -> None:
        self.uploads.append(source.nbytes)
        if not non_blocking:
            stream.synchronize()
            return
        self._demand_pinned(source)
        before = source.clone()

        def check() -> None:
            if not torch.equal(source.view(torch.uint8), before.view(torch.uint8)):
                self.faults.add("memory changed while a copy to the device might still read it")

        stream.copies.append(check)

    def _demand_pinned(self, tensor: torch.Tensor) -> None:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not any(address <= begin and end <= address + nbytes for address, nbytes in list(self.pinned.items())):
            self.faults.add("a copy that should not wait, from or to memory that is not pinned")

    def _indexed(self, device: torch.device) -> torch.device:
        return device if device.type != "cuda" or device.index is not None else self.current_device


def _are_whole(args: Any) -> bool:
    """Return whether all numbers are whole: their sums are exact in any order."""
    tensors = [part for part in _flat(args) if isinstance(part, torch.Tensor) and part.is_floating_point()]
    return bool(tensors) and all(torch.equal(tensor, tensor.round()) for tensor in tensors)


def _flat(parts: Iterable[Any]) -> list[Any]:
    """Return arguments of an operation, lists of tensors taken apart."""
    flat: list[Any] = []
    for part in parts:
        if isinstance(part, list | tuple):
            flat.extend(part)
        else:
            flat.append(part)
    return flat


def _raw(part: Any) -> Any:
    if isinstance(part, list | tuple):
        return [_raw(one) for one in part]
    return part.raw if isinstance(part, DeviceTensor) else part


@cache
def _arguments(function: Any) -> dict[str, bool]:
    """Return the names of an operation's arguments, and whether each is written to."""
    arguments = function._schema.arguments
    return {each.name: each.alias_info is not None and each.alias_info.is_write for each in arguments}
