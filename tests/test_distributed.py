"""Ray workers give what one process gives, also when one of them dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, newest, once_a_class
from helpers.evaluation_setting import RECORDS, assert_alike, evaluate, seconds_apart
from helpers.rome_setting import LAYER

from transformer_lens_rome import distributed, get_method
from transformer_lens_rome.extras import needed

METHOD = get_method("ft", layer=LAYER, steps=2)


@dataclass(frozen=True)
class Deadly:
    """FT, but the first process that is asked about one subject is killed."""

    subject: str
    marker: str
    always: bool = False

    def compute(self, model, request, *, seed=0):
        if request.subject == self.subject and (self.always or not Path(self.marker).exists()):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return METHOD.compute(model, request, seed=seed)


@pytest.fixture
def model_class():
    """One class: starting workers takes long."""
    return CLASSES[0]


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray", reason="the distributed extra is not installed")
    found.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # by default they wait for everyone else
        with distributed._cluster(found, 2, None):
            yield found
    found.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@once_a_class
@pytest.mark.slow
def test_two_workers_give_what_one_process_gives(gpt2, ray, tmp_path):
    """Also when one of them dies on the way."""
    deadly = Deadly("The tower", str(tmp_path / "marker"))
    found = evaluate(gpt2, deadly, out=tmp_path / "ray" / "deadly.jsonl", workers=2)
    assert (tmp_path / "marker").exists()  # and so this process is not killed
    alone = evaluate(gpt2, deadly, out=tmp_path / "alone" / "deadly.jsonl")
    assert_alike(seconds_apart(found.after), seconds_apart(alone.after))
    assert_alike(seconds_apart(found.before), seconds_apart(alone.before))
    assert list(found.after) == [record.case_id for record in RECORDS]
    assert found.setting == alone.setting


@newest
@pytest.mark.slow
def test_a_record_at_which_three_workers_die_is_an_error(gpt2, ray, tmp_path):
    always = Deadly("The tower", str(tmp_path / "marker"), always=True)
    evaluate(gpt2, None, RECORDS[1:2], out=tmp_path / "unedited.jsonl")  # needs no workers
    with pytest.raises(RuntimeError, match="three workers died"):
        evaluate(gpt2, always, RECORDS[1:2], out=tmp_path / "always.jsonl", workers=2)
    assert ray.is_initialized()


@newest
@pytest.mark.slow
def test_a_failing_work_ends_the_workers(gpt2, ray):
    with pytest.raises(ZeroDivisionError):
        list(distributed.on_workers(2, None, gpt2, divided, [1, 0, 2, 3]))
    until = time.monotonic() + 30
    while state(ray) and time.monotonic() < until:
        time.sleep(0.2)
    assert not state(ray)
    assert list(distributed.on_workers(2, None, gpt2, divided, [])) == []
    with pytest.raises(ValueError, match="connected to a Ray cluster already"):
        list(distributed.on_workers(2, "auto", gpt2, divided, [1]))


def divided(model, number):
    return model.cfg.n_layers / number


def state(ray):
    """How much of the cluster is in use."""
    free, whole = ray.available_resources(), ray.cluster_resources()
    return whole["CPU"] - free.get("CPU", 0)


def test_a_model_is_shipped_from_main_memory_or_refused():
    both = torch.nn.ParameterList([torch.zeros(1), torch.zeros(1, device="meta")])
    with pytest.raises(NotImplementedError, match="several devices"):
        with distributed._in_main_memory(both):
            pass
    here = torch.nn.ParameterList([torch.zeros(1)])
    with distributed._in_main_memory(here) as shipped:
        assert shipped is here


@pytest.mark.parametrize(
    ("workers", "nodes", "cores"),
    [(1, [8], 8), (2, [2], 1), (2, [64], 32), (3, [8, 8], 4), (4, [10] * 100, 10), (9, [2, 2], 1)],
)
def test_cores_are_shared_so_that_all_fit(workers, nodes, cores):
    assert distributed.share_of_cores(workers, nodes) == cores
    assert workers > sum(nodes) or sum(node // cores for node in nodes) >= workers


@pytest.mark.parametrize("workers", range(1, 9))
@pytest.mark.parametrize("gpus", range(5))
def test_gpus_are_shared_so_that_all_fit(workers, gpus):
    share = distributed.share_of_gpus(workers, gpus)
    if gpus == 0:
        assert share == 0
    else:
        assert 0 < share <= 1 and gpus * int(1 / share + 1e-9) >= workers


def test_without_ray_it_says_which_extra(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'transformer-lens-rome\[distributed\]'"):
        evaluate(gpt2, METHOD, workers=2)


def test_needed_gives_the_module():
    assert needed("json", "any").dumps([1]) == "[1]"
