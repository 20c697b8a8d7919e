"""What a process and a model hold: memory, tensors, hooks, attributes, files, threads, bytes."""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

from transformer_lens_rome.files.cache import cache_folder
from transformer_lens_rome.model.fingerprint import Fingerprint

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Memory of this process now, after garbage and what the allocator keeps free are given up."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGE


def live_tensors() -> tuple[int, int]:
    """How many tensors Python can reach, and the bytes of their storages, each counted once."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return len(tensors), sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def footprint(model: Any) -> dict[str, int | str]:
    """Everything that a call could leave behind, as numbers and digests to be compared."""
    gc.collect()
    tensors, held = live_tensors()
    return {
        "live tensors": tensors,
        "bytes in live tensors": held,
        "objects that cannot be freed": len(gc.garbage),
        **_of_model(model),
        **_of_process(),
    }


def _of_model(model: Any) -> dict[str, int | str]:
    """What is on the model's modules and parameters."""
    modules, parameters = list(model.modules()), list(model.parameters())
    flags = [p.requires_grad for p in parameters] + [m.training for m in modules]
    buffers = [hashlib.sha256(repr(b.tolist()).encode()).digest() for b in model.buffers()]
    return {
        "hooks on modules": sum(map(_hooks, modules)),
        "entries in hook points' contexts": sum(len(getattr(m, "ctx", ())) for m in modules),
        "entries in modules' dictionaries": sum(map(_entries, modules)),
        "attributes of parameters": sum(len(vars(p)) for p in parameters),
        "gradients": sum(p.grad is not None for p in parameters),
        "parametrised modules": sum(map(parametrize.is_parametrized, modules)),
        "requires_grad and training flags": hashlib.sha256(bytes(flags)).hexdigest()[:12],
        "buffers": hashlib.sha256(b"".join(buffers)).hexdigest()[:12],
        "parameters (sha256)": Fingerprint.of(model).digest[:12],
    }


def _hooks(module: Any) -> int:
    """PyTorch's hooks and TransformerLens's, forward and backward."""
    names = [name for name in vars(module) if name.endswith("hooks")]
    return sum(len(vars(module)[name]) for name in names)


def _entries(module: Any) -> int:
    """What a module holds, and what the containers that it holds hold."""
    held = vars(module).values()
    return len(held) + sum(len(one) for one in held if isinstance(one, (dict, list, set, tuple)))


def _of_process() -> dict[str, int | str]:
    """Files, threads, handlers, bars and caches."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    loggers = [one for one in loggers if isinstance(one, logging.Logger)]
    ours = [
        one
        for one in gc.get_objects()
        if type(one) is functools._lru_cache_wrapper
        and str(one.__module__).startswith("transformer_lens_rome")
    ]
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads of Python": threading.active_count(),
        "threads": len(os.listdir("/proc/self/task")),
        "log handlers and filters": sum(len(one.handlers) + len(one.filters) for one in loggers),
        "progress bars": len(getattr(tqdm, "_instances", ())),
        "entries in the package's lru caches": sum(one.cache_info().currsize for one in ours),
        "temporary files": _files(tempfile.gettempdir()),
        "files in the cache folder": _files(cache_folder()),
        "gradients enabled": int(torch.is_grad_enabled()),
        "torch's random state": hashlib.sha256(
            torch.random.get_rng_state().numpy().tobytes()
        ).hexdigest()[:12],
    }


def _files(folder: Any) -> int:
    return sum(path.is_file() for path in Path(folder).rglob("*"))


def grown(before: dict[str, int | str], after: dict[str, int | str]) -> list[str]:
    """The names of what is more, or other, than before; less of something is no leak."""
    worse = []
    for name, old in before.items():
        new = after[name]
        if new > old if isinstance(old, int) and isinstance(new, int) else new != old:
            worse.append(name)
    return worse


def slope(samples: Sequence[float], per_sample: float) -> float:
    """Growth a cycle between the second and the last quarter of some samples, by their medians.

    The first quarter is where allocators and caches fill up; medians pass over single peaks.
    """
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return (median(last) - median(second)) / (2 * quarter * per_sample)


def run(cycles: Iterable[Callable[[], Any]], samples: int) -> tuple[list[int], float]:
    """Run some cycles; resident memory at equal distances, and the cycles between two samples."""
    cycles = list(cycles)
    every = max(1, len(cycles) // samples)
    memory = []
    for number, cycle in enumerate(cycles, start=1):
        cycle()
        if number % every == 0:
            memory.append(resident_bytes())
    return memory, every


class Interrupted(Exception):
    """Raised half-way."""


class InterruptAt(TorchDispatchMode):
    """While it is on, the n-th tensor operation raises, once; counts operations."""

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, raise or run."""
        self.count += 1
        if self.count == self.n:
            raise Interrupted(f"operation {self.n}")
        return func(*args, **(kwargs or {}))
