"""Time, memory, arithmetic: what the benchmarks measure with."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Measured:
    """Seconds and peak memory above what was there before, of one `with` block.

    Attributes:
        seconds: Wall time, after everything queued on the device has finished.
        peak_mb: The highest memory in use less the memory in use at the start, in 10**6 bytes: the
            device's allocator on CUDA, the process's resident set (sampled each 2 ms) otherwise.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Measured:
        synchronise(self._device)
        with suppress(OSError, AttributeError):  # glibc: give back what is free but kept
            ctypes.CDLL(None).malloc_trim(0)
        self._base = self._peak = self._in_use()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._sampler.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        synchronise(self._device)
        self.seconds = time.perf_counter() - self._start
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._sampler.join()
        self.peak_mb = (self._peak - self._base) / 1e6

    def _in_use(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._in_use())


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, a multiplication and an addition each."""
    with _Counter() as counter:
        run()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up torch's formulas. `FlopCounterMode` would set hooks, with which passes are whole."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def matmul_flops_per_second(
    m: int, k: int, n: int, device: torch.device, dtype: torch.dtype, seconds: float = 1.0
) -> float:
    """What the machine reaches in products `[m, k] @ [k, n]`, one after the other."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(m, k, generator=generator).to(device, dtype)
    right = torch.randn(k, n, generator=generator).to(device, dtype)
    for _ in range(3):
        left @ right
    synchronise(device)
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            left @ right
        synchronise(device)
        times += 10
    return 2 * m * k * n * times / (time.perf_counter() - start)


class Stopwatch:
    """Adds up the seconds of named parts of a run."""

    def __init__(self, device: torch.device) -> None:
        self.parts: dict[str, float] = {}
        self._device = device

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = self.now()
        try:
            yield
        finally:
            self.add(name, self.now() - start)

    def now(self) -> float:
        """The time, once the device has caught up."""
        synchronise(self._device)
        return time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        """Count some seconds for a part."""
        self.parts[name] = self.parts.get(name, 0.0) + seconds
