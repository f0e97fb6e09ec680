"""A Ray cluster to work on: joined where one runs, or started on this machine, and left or stopped at the end."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.stores.cache import is_caching
from mergekit_lite.engine.devices import chosen_devices
from mergekit_lite.engine.ray_head import Head, head_of
from mergekit_lite.engine.ray_machine import File
from mergekit_lite.engine.ray_workers import GPU_THREADS, Cluster
from mergekit_lite.errors import RunError, UsageError, one_line
from mergekit_lite.ops import CPU

LOCAL = re.compile(r"local:([1-9]\d{0,3})")
PLACE = re.compile(r"[^/]+:\d+")
ADVICE = "ray start --head starts one here; --ray local:2 needs none"
EXPECTED = (
    "expected auto (the cluster this machine is part of), the address of one as HOST:PORT, or local:N workers here"
)
OBJECT_STORE = 128 << 20  # bytes; what workers do is kept there, no weights
LATE = 100  # tenths of a second that they may take
OWN, DRAWN = "mergekit-lite-ray-", 8  # what the names of folders begin with, and characters that follow
LONGEST_FOLDER = 41  # bytes; sockets lie up to 64 deeper, and systems take paths of 103 (macOS) or 107
TRIES, GAVE_UP = 3, "timed out"  # Ray waits 30 s for each of its processes, which is too short on a busy machine
QUIET = {  # settings of Ray by environment variables: no usage statistics are sent, no tips given
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def check_address(address: str, device: str) -> None:
    """Raise UsageError where an address of a cluster can't be one, Ray is missing, or an option is not for it."""
    if address != "auto" and not LOCAL.fullmatch(address) and (address.startswith("local") or ":" not in address):
        raise UsageError(f"--ray {address}: {EXPECTED}.")
    if device not in (CPU, "cuda", "cuda:all"):
        raise UsageError(f"--ray takes --device cpu or cuda, which are all GPUs that the cluster has, not {device}.")
    if is_caching():
        raise UsageError("--fetch-cache is for workers on this machine: those that --ray has fetch for themselves.")
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs Ray, on every machine: pip install 'mergekit-lite[ray]'")


def _check_head(address: str) -> None:
    """Raise UsageError where nothing answers at an address: Ray would try it for minutes, with lines of its log."""
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if PLACE.fullmatch(named) and not Head(named).answers():
        raise UsageError(f"--ray {address}: no such cluster is there ({named} takes no connection). {ADVICE}.")


def workers_of(
    ray: str | Cluster | None, device: str = CPU, workers: int | None = None, threads: int = GPU_THREADS
) -> AbstractContextManager[Cluster | None]:
    """Return the context of the workers that an option ``ray`` names: None for none, an open cluster as it is."""
    return connected(ray, device, workers, threads) if isinstance(ray, str) else nullcontext(ray)


def devices_of(ray: str | Cluster | None, device: str) -> tuple[str, ...]:
    """Return the devices to compute on, as each worker sees them. Raises UsageError where one is not there."""
    if ray is None:
        return chosen_devices(device)
    check_address(ray if isinstance(ray, str) else "auto", device)
    return (CPU,) if device == CPU else ("cuda:0",)


def files_of(checkpoints: Iterable[Checkpoint]) -> list[File]:
    """Return the weight files of some models, as machines have to see them."""
    return [(str(file.path), file.size, file.mtime_ns) for one in checkpoints for file in one.files]


@contextmanager
def connected(
    address: str, device: str = CPU, workers: int | None = None, threads: int = GPU_THREADS
) -> Iterator[Cluster]:
    """Give the workers of a cluster, which is joined or started when the first tasks are there, and left at the end.

    Args:
        address: ``auto``, ``HOST:PORT``, or ``local:N``.
        device: ``cpu``, or ``cuda`` for every GPU of the cluster.
        workers: the largest number of them; by default one for each processor or GPU.
        threads: of each worker with a GPU.

    Raises UsageError as ``check_address``, and where nothing answers at the address.
    """
    check_address(address, device)
    local = LOCAL.fullmatch(address)
    if local is None:
        _check_head(address)
    with ExitStack() as stack:

        def connect() -> None:
            ray = _quiet_ray()
            if not ray.is_initialized():  # else the caller's own connection serves
                folder = stack.enter_context(_own_folder())
                stack.enter_context(_silenced(ray))
                stack.callback(_stop, ray)
                _start(ray, address, int(local[1]) if local else 0, folder)

        yield Cluster(connect, local=local is not None, gpus=device != CPU, most=workers, threads=threads)


def _quiet_ray() -> Any:
    """Import Ray, set to say and send nothing by itself."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return ray


def _start(ray: Any, address: str, local: int, empty: str) -> None:
    """Connect this process to a cluster, or start one with ``local`` processors.

    Ray gives the working folder of this process to all workers as a place to import modules from. It may be a
    stranger's model, so it is shown an ``empty`` folder, which takes what Ray writes.
    """
    options: dict[str, Any] = {"address": address}
    if local:
        options = {"address": "local", "num_cpus": local, "object_store_memory": OBJECT_STORE, "_temp_dir": empty}
        options |= {"include_dashboard": False}
    here, at_signal = os.getcwd(), signal.getsignal(signal.SIGTERM)  # noqa: PTH109
    try:
        os.chdir(empty)
        for further in reversed(range(TRIES)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
                break
            except Exception as error:
                if not (local and further and GAVE_UP in str(error).lower()):
                    raise
                _stop(ray)
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"--ray {address}: no such cluster is there ({one_line(error, 200)}). {ADVICE}.") from error
    except Exception as error:
        raise RunError(f"--ray {address}: Ray can't be started: {one_line(error, 400)}") from error
    finally:
        os.chdir(here)
        with suppress(TypeError, ValueError):  # in another thread than the main one nothing was changed
            signal.signal(signal.SIGTERM, at_signal)


@contextmanager
def _silenced(ray: Any) -> Iterator[None]:
    """Keep Ray from printing what happens to its machines: it prints logs, and we say it in our words."""
    worker: Any = getattr(ray._private, "worker", None)
    printing = getattr(worker, "print_to_stdstream", None)
    if printing is None:
        yield
        return
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printing


def _short_folder() -> str:
    """Return where temporary files go, or /tmp where that has too long a name for sockets, as on macOS."""
    place = tempfile.gettempdir()
    is_long = len(os.fsencode(place)) + 1 + len(OWN) + DRAWN > LONGEST_FOLDER
    return "/tmp" if is_long and os.path.isdir("/tmp") else place  # noqa: PTH112


@contextmanager
def _own_folder() -> Iterator[str]:
    """Make an empty folder, and remove it at the end with what Ray leaves in it: some of its processes end late."""
    folder = tempfile.mkdtemp(prefix=OWN, dir=_short_folder())
    try:
        yield folder
    finally:
        for _ in range(LATE):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.lexists(folder):
                break
            time.sleep(0.1)


def _stop(ray: Any) -> None:
    """Leave the cluster; what this process started ends. From one without a head there is no leaving: it would wait."""
    if ray.is_initialized() and not head_of(ray).answers():
        atexit.unregister(ray.shutdown)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
