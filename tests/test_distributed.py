"""Ray workers give what one process gives, also when one of them dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rome_setting import LAYER
from test_evaluate import RECORDS, evaluate, seconds_apart

from transformer_lens_rome import collect_second_moment, distributed, get_method
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
def ray():
    found = pytest.importorskip("ray", reason="the distributed extra is not installed")
    found.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with distributed._cluster(found, 2, None):
        yield found
    found.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_two_workers_give_what_one_process_gives(gpt2, ray, tmp_path):
    alone = evaluate(gpt2, METHOD, out=tmp_path / "alone" / "ft.jsonl")
    found = evaluate(gpt2, METHOD, out=tmp_path / "ray" / "ft.jsonl", workers=2)
    assert seconds_apart(found.after) == seconds_apart(alone.after)
    assert seconds_apart(found.before) == seconds_apart(alone.before)
    assert list(found.after) == [record.case_id for record in RECORDS]
    assert found.setting == alone.setting

    deadly = Deadly("The tower", str(tmp_path / "marker"))
    survived = evaluate(gpt2, deadly, out=tmp_path / "ray" / "deadly.jsonl", workers=2)
    assert (tmp_path / "marker").exists()
    assert seconds_apart(survived.after) == seconds_apart(alone.after)

    always = dataclasses.replace(deadly, always=True)
    with pytest.raises(RuntimeError, match="three workers died"):
        evaluate(gpt2, always, RECORDS[1:2], out=tmp_path / "ray" / "always.jsonl", workers=2)
    assert ray.is_initialized()


def test_statistics_of_two_workers_are_those_of_one(gpt2, ray):
    texts = [f"The old man of Rome is the best of {n} times. " * (1 + n % 3) for n in range(60)]
    known = {"max_tokens": 900, "batch_size": 4, "max_length": 16, "progress": False}
    alone = collect_second_moment(gpt2, texts, [0, LAYER], **known)
    found = collect_second_moment(gpt2, texts, [0, LAYER], workers=2, **known)
    for layer, moment in alone.items():
        other = found[layer]
        assert other.n_tokens == moment.n_tokens == 900
        torch.testing.assert_close(other.C, moment.C, rtol=1e-12, atol=1e-12)
        assert other.summary() == moment.summary()
        assert other.half_agreement == pytest.approx(moment.half_agreement, abs=1e-6)


def test_without_ray_it_says_which_extra(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'transformer-lens-rome\[distributed\]'"):
        evaluate(gpt2, METHOD, workers=2)


def test_needed_gives_the_module():
    assert needed("json", "any").dumps([1]) == "[1]"
