"""The same work on many items: one after another here, or side by side on Ray.

Every Ray worker holds one copy of the model and takes an item at a time. What is done to an item
depends on nothing else, so the results are those of a single process. A worker that dies is
replaced, and its item is done again.
"""

from __future__ import annotations

import logging
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
        workers: How many copies of the model work side by side; with GPUs, one each.
        address: An existing cluster's, such as "auto"; None: one on this machine, for this call.
        model: What is copied to the workers.
        work: A function that can be pickled.
        items: What it is done to.

    Raises:
        ImportError: Ray is not installed; the message says which extra has it.
        RuntimeError: an item's worker died three times, or the work itself failed.
    """
    ray = needed("ray", "distributed")
    with _cluster(ray, workers, address):
        pool = _Pool(ray, min(workers, len(items)), ray.put(_Shipped(model)), ray.put(work))
        try:
            yield from pool.run(items)
        finally:
            pool.close()


class _Shipped:
    """A model on its way to another process, with its device left behind."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def here(self) -> Any:
        """The model, on this process's GPU if Ray gave it one."""
        if torch.cuda.is_available():
            self.model.to("cuda")
        return self.model


class _Worker:
    """What runs in a worker's process."""

    def __init__(self, shipped: _Shipped, work: Work, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, self.work = shipped.here(), work

    def __call__(self, item: Any) -> Any:
        return self.work(self.model, record=item)


class _Pool:
    """Workers, and what each of them is doing."""

    def __init__(self, ray: Any, size: int, model: Any, work: Any) -> None:
        self.ray, self.size = ray, size
        cores, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        threads = max(1, cores // size)
        resources = {"num_cpus": 1, "num_gpus": 1 if gpus >= size else gpus / size}
        actor = ray.remote(**resources)(_Worker)
        self.new_worker = lambda: actor.remote(model, work, threads)
        self.busy: dict[Any, tuple[Any, Any, int]] = {}  # result -> (worker, item, attempt)

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Any]]:
        """Give every idle worker the next item; yield what comes back."""
        waiting = [(item, 1) for item in reversed(items)]
        for _ in range(self.size):
            self._give(self.new_worker(), *waiting.pop())
        while self.busy:
            (ready,), _ = self.ray.wait(list(self.busy))
            worker, item, attempt = self.busy.pop(ready)
            try:
                result = self.ray.get(ready)
            except self.ray.exceptions.RayActorError as error:
                if attempt == 3:
                    raise RuntimeError(f"three workers died at {item!r:.80}: {error}") from error
                logger.warning("a worker died and is replaced; its item is done again")
                self._give(self.new_worker(), item, attempt + 1)
                continue
            if waiting:
                self._give(worker, *waiting.pop())
            yield item, result

    def _give(self, worker: Any, item: Any, attempt: int) -> None:
        self.busy[worker.__call__.remote(item)] = worker, item, attempt

    def close(self) -> None:
        """End the workers that are still at something."""
        for worker, _, _ in self.busy.values():
            self.ray.kill(worker)


@contextmanager
def _cluster(ray: Any, workers: int, address: str | None) -> Iterator[None]:
    """A cluster to work on; one that was there before stays."""
    if ray.is_initialized():
        yield
        return
    own = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **own)
    try:
        yield
    finally:
        ray.shutdown()
