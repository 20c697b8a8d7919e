"""The same work on many items: one after another here, or side by side on Ray.

Every Ray worker holds one copy of the model and takes an item at a time. What is done to an item
depends on nothing else, so the results are those of a single process. A worker that dies is
replaced, and its item is done again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from transformer_lens_rome.extras import needed

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Work = Callable[..., Any]


def in_order(model: Any, work: Work, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
    """`work(model, record=item)` for each item, in this process."""
    for item in items:
        yield item, work(model, record=item)


def on_workers(
    workers: int, address: str | None, model: Any, work: Work, items: Sequence[Item]
) -> Iterator[tuple[Item, Any]]:
    """The same on Ray, as results come in.

    Args:
        workers: How many copies of the model work side by side; GPUs and cores are shared out.
        address: An existing cluster's, such as "auto"; None: the one that this process is connected
            to, else one on this machine, for this call.
        model: What is copied to the workers.
        work: A function that can be pickled.
        items: What it is done to.

    Raises:
        ImportError: Ray is not installed; the message says which extra has it.
        ValueError: an address, though this process is connected to a cluster.
        NotImplementedError: a model on several devices.
        RuntimeError: an item's worker died three times. What the work raises.
    """
    ray = needed("ray", "distributed")
    if not items:
        return
    with _cluster(ray, workers, address):
        with _in_main_memory(model):
            shipped = ray.put(model)
        pool = _Pool(ray, min(workers, len(items)), shipped, ray.put(work))
        try:
            yield from pool.run(items)
        finally:
            pool.close()


@contextmanager
def _in_main_memory(model: Any) -> Iterator[Any]:
    """The model without a device of its own, since a worker may have others; then back again."""
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1:
        raise NotImplementedError(
            f"a model on several devices ({len(devices)}) is not copied to workers; load it on one"
        )
    (device,) = devices
    if device.type == "cpu":
        yield model
        return
    try:
        yield model.to("cpu")
    finally:
        model.to(device)


class _Worker:
    """What runs in a worker's process."""

    def __init__(self, model: Any, work: Work, threads: int) -> None:
        torch.set_num_threads(threads)
        # Ray shows a worker only the GPUs that it gave to it, and calls them CUDA devices
        self.model = model.to("cuda") if torch.cuda.is_available() else model
        self.work = work

    def __call__(self, item: Any) -> Any:
        return self.work(self.model, record=item)


class _Pool:
    """Workers, and what each of them is doing."""

    def __init__(self, ray: Any, size: int, model: Any, work: Any) -> None:
        self.ray, self.size, self.workers = ray, size, []
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = share_of_cores(size, [int(node.get("CPU", 0)) for node in nodes])
        gpus = share_of_gpus(size, int(sum(node.get("GPU", 0) for node in nodes)))
        actor = ray.remote(num_cpus=cores, num_gpus=gpus)(_Worker)
        self._make = lambda: actor.remote(model, work, cores)
        self.busy: dict[Any, tuple[Any, Any, int]] = {}  # result -> (worker, item, attempt)

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        """Give every idle worker the next item; yield what comes back."""
        waiting = [(item, 1) for item in reversed(items)]
        for _ in range(self.size):
            self._give(self._new(), *waiting.pop())
        while self.busy:
            (ready,), _ = self.ray.wait(list(self.busy))
            worker, item, attempt = self.busy.pop(ready)
            try:
                result = self.ray.get(ready)
            except _deaths(self.ray) as error:
                if attempt == 3:
                    raise RuntimeError(f"three workers died, the last with: {error}") from error
                logger.warning("a worker died and is replaced; its item is done again: %s", error)
                self._end(worker)
                self._give(self._new(), item, attempt + 1)
                continue
            if waiting:
                self._give(worker, *waiting.pop())
            else:  # what it held may be what another worker waits for
                self._end(worker)
            yield item, result

    def _new(self) -> Any:
        self.workers.append(self._make())
        return self.workers[-1]

    def _give(self, worker: Any, item: Any, attempt: int) -> None:
        self.busy[worker.__call__.remote(item)] = worker, item, attempt

    def _end(self, worker: Any) -> None:
        self.workers.remove(worker)
        self.ray.kill(worker)

    def close(self) -> None:
        """End all workers."""
        for worker in list(self.workers):
            self._end(worker)


def _deaths(ray: Any) -> tuple[type[Exception], ...]:
    """What says that a worker is gone, and not that its work failed."""
    names = ("RayActorError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError")
    return tuple(getattr(ray.exceptions, name) for name in names)


def share_of_cores(workers: int, nodes: Sequence[int]) -> int:
    """The most cores a worker can have if all are to run at once on machines of so many cores."""
    for cores in range(max(nodes), 1, -1):
        if sum(node // cores for node in nodes) >= workers:
            return cores
    return 1


def share_of_gpus(workers: int, gpus: int) -> float:
    """One GPU a worker, or the share of one that lets all workers fit."""
    if gpus == 0 or gpus >= workers:
        return min(gpus, 1)
    return int(10_000 / -(-workers // gpus)) / 10_000


@contextmanager
def _cluster(ray: Any, workers: int, address: str | None) -> Iterator[None]:
    """A cluster to work on; one that was there before stays."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                "this process is connected to a Ray cluster already; leave ray_address out, or "
                "call ray.shutdown() first"
            )
        yield
        return
    own = {"address": "local", "include_dashboard": False}
    own["num_cpus"] = max(workers, os.cpu_count() or 1)
    where = own if address is None else {"address": address}
    ray.init(logging_level=logging.WARNING, log_to_driver=False, **where)
    try:
        yield
    finally:
        ray.shutdown()
