"""Process many items: sequentially in this process, or in parallel on Ray.

Every Ray worker has one copy of the model and processes one item at a time. The result for an item
depends only on that item, so the results equal those of a single process. A worker that dies is
replaced, and its item is processed again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from transformer_lens_rome.extras import needed
from transformer_lens_rome.model.protocol import Model

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Work = Callable[..., Any]


def in_order(model: Model, work: Work, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
    """Yield each item and `work(model, item)`, computed in this process."""
    for item in items:
        yield item, work(model, item)


def on_workers(
    workers: int, address: str | None, model: Model, work: Work, items: Sequence[Item]
) -> Iterator[tuple[Item, Any]]:
    """Yield each item and its result from Ray workers, in the order of completion.

    An exception that `work` raises is raised here.

    Args:
        workers: The number of copies of the model; GPUs and cores are divided among them.
        address: The address of an existing cluster, such as "auto". None uses the cluster that this
            process is connected to, or else starts one on this machine for this call.
        model: The model, which is copied to the workers.
        work: A function that can be pickled.
        items: The items to process.

    Raises:
        ImportError: Ray is not installed; the message gives the pip command.
        ValueError: `address` is given, but this process is already connected to a cluster.
        NotImplementedError: The model is on several devices.
        RuntimeError: Three workers died while processing the same item.
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
def _in_main_memory(model: Model) -> Iterator[Any]:
    """Move the model to the CPU within this context, since a worker may have other devices."""
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1:
        raise NotImplementedError(
            f"a model on several devices ({len(devices)}) cannot be copied to workers; "
            "load it on one device"
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
    """The actor in a worker's process."""

    def __init__(self, model: Model, work: Work, threads: int) -> None:
        torch.set_num_threads(threads)
        # Ray shows a worker only the GPUs that it gave to it, and calls them CUDA devices
        self.model = model.to("cuda") if torch.cuda.is_available() else model
        self.work = work

    def __call__(self, item: Any) -> Any:
        return self.work(self.model, item)


class _Pool:
    """The workers and their current items."""

    def __init__(self, ray: Any, size: int, model: Model, work: Any) -> None:
        self.ray, self.size = ray, size
        self.workers: list[Any] = []
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = share_of_cores(size, [int(node.get("CPU", 0)) for node in nodes])
        gpus = share_of_gpus(size, int(sum(node.get("GPU", 0) for node in nodes)))
        actor = ray.remote(num_cpus=cores, num_gpus=gpus)(_Worker)
        self._make = lambda: actor.remote(model, work, cores)
        self.busy: dict[Any, tuple[Any, Any, int]] = {}  # result -> (worker, item, attempt)

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        """Give every idle worker the next item; yield the items and results."""
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
                logger.warning("a worker died; a new one processes its item again: %s", error)
                self._end(worker)
                self._give(self._new(), item, attempt + 1)
                continue
            if waiting:
                self._give(worker, *waiting.pop())
            else:  # another worker may be waiting for its cores or GPU
                self._end(worker)
            yield item, result

    def _new(self) -> Any:
        """Start a worker."""
        self.workers.append(self._make())
        return self.workers[-1]

    def _give(self, worker: Any, item: Any, attempt: int) -> None:
        """Start processing an item on a worker."""
        self.busy[worker.__call__.remote(item)] = worker, item, attempt

    def _end(self, worker: Any) -> None:
        """Stop a worker."""
        self.workers.remove(worker)
        self.ray.kill(worker)

    def close(self) -> None:
        """End all workers."""
        for worker in list(self.workers):
            self._end(worker)


def _deaths(ray: Any) -> tuple[type[Exception], ...]:
    """Return the exceptions that mean that a worker has died, not that its work raised."""
    names = ("RayActorError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError")
    return tuple(getattr(ray.exceptions, name) for name in names)


def share_of_cores(workers: int, nodes: Sequence[int]) -> int:
    """Return the most cores per worker with which all workers run at once on the nodes."""
    for cores in range(max(nodes), 1, -1):
        if sum(node // cores for node in nodes) >= workers:
            return cores
    return 1


def share_of_gpus(workers: int, gpus: int) -> float:
    """Return one GPU per worker, or the largest share of one with which all workers fit."""
    if gpus == 0 or gpus >= workers:
        return min(gpus, 1)
    return int(10_000 / -(-workers // gpus)) / 10_000


@contextmanager
def _cluster(ray: Any, workers: int, address: str | None) -> Iterator[None]:
    """Connect to a cluster within this context; an existing connection is kept."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                "this process is connected to a Ray cluster already; omit ray_address, or "
                "call ray.shutdown() first"
            )
        yield
        return
    options: dict[str, Any] = {"address": address}
    if address is None:
        cores = max(workers, os.cpu_count() or 1)
        options = {"address": "local", "include_dashboard": False, "num_cpus": cores}
    ray.init(logging_level=logging.WARNING, log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()
