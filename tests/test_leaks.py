"""Nothing stays behind after many edits and traces; `python -m leaks` in this folder runs more."""

from __future__ import annotations

import logging
import os
import tempfile

import pytest
import torch
from conftest import make_model, newest, once_a_class
from leaks.__main__ import survivors, users
from leaks.cycles import tiny_setting
from leaks.footprint import InterruptAt, Interrupted, footprint, grown, run, slope

from transformer_lens_rome import apply_edit
from transformer_lens_rome.model.adapter import owner, w_out

pytestmark = [pytest.mark.slow, once_a_class]


@pytest.fixture
def setting(gpt2, tmp_path, monkeypatch):
    """A tiny model with edits of every kind, and a temporary folder of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("transformer_lens_rome"), "level", logging.ERROR)
    return tiny_setting(gpt2)


def left_by(setting, cycles):
    """What is there after some cycles that was not there before them."""
    setting.settle()
    before = footprint(setting.model)
    run(cycles, 1)
    setting.settle()
    return grown(before, footprint(setting.model))


def test_nothing_grows_with_edits_and_traces(setting):
    run([*setting.edits(10), *setting.traces(2)], 1)
    assert left_by(setting, setting.edits(20)) == []
    assert left_by(setting, setting.traces(3)) == []


@newest
def test_memory_does_not_grow(setting):
    """A copy of W_out, 16 kB, that stays in every cycle would be four times what is allowed."""
    kept, model = [], setting.model
    leaking = [lambda: kept.append(torch.ones_like(w_out(model, 1))) for _ in range(100)]
    assert slope(*run(leaking, 16)) > setting.tolerance
    assert slope(*run([setting.lost_and_reverted] * 100, 16)) < setting.tolerance


def test_an_interrupted_cycle_was_interrupted(setting):
    """Every fault is reached, so the cycles with one do not pass because nothing happened."""
    with pytest.raises(Interrupted), InterruptAt(30):
        setting.several_out_of_order()
    with InterruptAt(10**6) as counter:
        setting.several_out_of_order()
    assert 30 < counter.count < 10**6


PLANTS = {
    "live tensors": lambda s, kept: kept.append(torch.ones(3)),
    "hooks on modules": lambda s, kept: s.model.blocks[0].register_forward_hook(print),
    "entries in hook points' contexts": lambda s, kept: s.model.hook_dict["hook_embed"].ctx.update(
        a=1
    ),
    "entries in modules' dictionaries": lambda s, kept: s.model.__dict__.setdefault("_seen", [1]),
    "attributes of parameters": lambda s, kept: setattr(owner(w_out(s.model, 1)), "_seen", 1),
    "requires_grad and training flags": lambda s, kept: s.model.blocks[1].ln1.train(),
    "parameters (sha256)": lambda s, kept: apply_edit(s.model, s.dense),
    "open files": lambda s, kept: kept.append(tempfile.TemporaryFile()),
    "temporary files": lambda s, kept: os.close(tempfile.mkstemp()[0]),
    "log handlers and filters": lambda s, kept: logging.root.addHandler(logging.NullHandler()),
}


@newest
def test_what_stays_is_seen(setting, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    kept, before = [], footprint(setting.model)
    for name, plant in PLANTS.items():
        plant(setting, kept)
        now = footprint(setting.model)
        assert name in grown(before, now)
        before = now
    kept[-1].close()


def test_a_model_goes_when_it_is_let_go(model_class, tokenizer, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformer_lens_rome"), "level", logging.ERROR)

    def make():
        return tiny_setting(make_model(model_class, "gpt2", tokenizer))

    assert survivors(make) == []


@newest
def test_a_model_that_is_kept_is_seen(setting):
    assert survivors(lambda: setting) == list(users(setting))
