"""Devices that compute: chosen by name, and their errors, which become messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_lite.deferred import torch
from mergekit_lite.errors import RunError, UsageError, counted
from mergekit_lite.ops import CPU

ALL = "cuda:all"
EXPECTED = f"expected cpu, cuda, cuda:0 …, {ALL} or auto"
OF_DEVICE = ("CUDA ", "CUBLAS", "NVIDIA", "HIP ", "out of memory")  # in the text of an error of the device


def chosen_devices(name: str) -> tuple[str, ...]:
    """Return the devices that workers are spread over: every GPU for ``cuda:all``, else one as ``chosen_device``."""
    if name != ALL:
        return (chosen_device(name),)
    chosen_device("cuda")
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def chosen_device(name: str) -> str:
    """Return the device of this name: ``cpu``, ``cuda:0`` … Raises UsageError where it is unknown or missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else CPU
    if name == CPU:
        return CPU
    if name == ALL:
        raise UsageError(f"{ALL} spreads a merge over all GPUs, this takes one device: cpu, cuda, cuda:0 … or auto.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device {name!r}: {EXPECTED}.") from error
    if device.type not in (CPU, "cuda"):
        raise UsageError(f"Device {name!r} is not supported: {EXPECTED}.")
    if device.type == CPU:
        return CPU
    count, index = torch.cuda.device_count(), device.index or 0
    if index >= count:
        built = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
        why = f"torch sees {counted(count, 'CUDA device')}" if built else f"torch {torch.__version__} is without CUDA"
        raise UsageError(f"Device {name!r} is not there: {why}. --device cpu needs none.")
    return f"cuda:{index}"


def kind_of(device: str) -> str:
    """Return ``cpu`` or ``cuda``: devices of one kind are taken to give the same bits."""
    return device.partition(":")[0]


def memory_left(device: str) -> int | None:
    """Return the bytes of memory that are free on a device; None where the system doesn't tell."""
    if chosen_device(device) != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return None
    lines = facts.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


@contextmanager
def explained(device: str) -> Iterator[None]:
    """Turn an error of a device into a RunError that says what to do; every other error passes."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError) and not any(word in text for word in OF_DEVICE):
            raise
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
            text = "its memory ran out. Fewer --threads (from Python also a smaller block) need less"
        raise RunError(
            f"{device}: {text.rstrip('.')}. --device cpu does without it. A command that takes --resume goes on with "
            "what was finished, on another device too."
        ) from error
