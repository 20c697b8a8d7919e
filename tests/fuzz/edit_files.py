"""Edits, statistics and trained editors, to be fuzzed."""

import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz import mutations as mutate
from fuzz.format import REQUEST, TENSORS, ZIP, Format, model, saved, tokenizer
from helpers import released_editors, tiny_models
from helpers.editor_setting import random_editor
from helpers.rome_setting import factored_edit, random_edit

from transformer_lens_rome import SecondMoment, get_method, load_edit
from transformer_lens_rome.edits.health import FactHealth
from transformer_lens_rome.edits.kinds import DenseEdit
from transformer_lens_rome.methods import History
from transformer_lens_rome.methods.hypernetworks import knowledge_editor
from transformer_lens_rome.methods.hypernetworks.mend import MendNetwork
from transformer_lens_rome.methods.hypernetworks.published_editors import convert_editor
from transformer_lens_rome.methods.hypernetworks.training import Training
from transformer_lens_rome.methods.hypernetworks.training_state import State
from transformer_lens_rome.model.adapter import Weight

# ---------------------------------------------------------------- edits


def _use_edit(edit: Any) -> None:
    tensors = edit.tensors()
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    for where, change in edit.changes().items():
        assert where.layer >= 0 and change.ndim == (1 if where.name == "b_out" else 2)
    edit.scale(-0.5).digest, edit._repr_html_(), repr(edit)
    with tempfile.NamedTemporaryFile() as file:
        edit.save(file.name)
        other = load_edit(file.name)
    assert other.digest == edit.digest and other.request == edit.request


def _edits(*chosen: Any) -> Format:
    return Format(saved(*chosen), TENSORS, load_edit, _use_edit)


def _small(edit: Any) -> Any:
    health = dataclasses.replace(edit.health, losses=(2.0, 1.0), p_after=0.9, warnings=("look",))
    known = {"config": {"steps": 20, "prefix_lengths": [[5, 10]]}, "health": health}
    return dataclasses.replace(edit, **known, provenance={"model": "tiny", "prefixes": ["", "a"]})


def rank_one() -> Format:
    """RankOneEdit."""
    return _edits(_small(random_edit(model())), random_edit(model(), seed=1))


def dense() -> Format:
    """DenseEdit: of low rank, with a bias, and without factors."""
    edits = [random_edit(model(), rank=2), random_edit(model(), rank=2, bias=True)]
    whole = DenseEdit(layer=0, request=REQUEST, left=torch.randn(6, 4))
    return _edits(*map(_small, edits), whole)


def factored() -> Format:
    """FactoredEdit."""
    places = [Weight("W_out", 1), Weight("W_in", 0)]
    one = factored_edit(model(), places)
    facts = (FactHealth("le", 0.1, 0.9, 20, (2.0, 1.0), 3, (1.5,), (4.0, 1.0), ("look",)),) * 2
    health = dataclasses.replace(one.health, facts=facts)
    other = dataclasses.replace(REQUEST, target_new="Oslo")
    many = dataclasses.replace(one, requests=(one.request, other), health=health)
    return _edits(_small(one), factored_edit(model(), places[:1]), many)


def _use_history(found: History) -> None:
    assert all(torch.isfinite(keys).all() for keys in found.keys.values())
    longer = found.extended(found.keys, 2)
    assert longer.n_facts == found.n_facts + 2 and repr(longer)


def history() -> Format:
    """History."""
    keys = {layer: torch.randn(6, 3) for layer in (0, 2)}
    whole = History(keys, 3, torch.randn(8), "tiny", False)
    return Format(saved(whole), TENSORS, History.load, _use_history)


# ---------------------------------------------------------------- statistics


def _use_moment(found: SecondMoment) -> None:
    total = found.sum_kk
    assert torch.isfinite(total).all() and total.shape == total.T.shape
    assert (total.diagonal() >= 0).all()
    found.summary(), repr(found)
    found.solve(torch.ones(found.d_mlp), ridge=1e-3)
    found.merge(found)


def statistics() -> Format:
    """SecondMoment."""
    keys = torch.randn(50, 6, dtype=torch.float64)
    full = SecondMoment(keys.T @ keys, 50, 3, False, torch.randn(8), "two texts", 0.5)
    return Format(saved(full, SecondMoment.identity(4)), TENSORS, SecondMoment.load, _use_moment)


def npz() -> Format:
    """The authors' statistics."""
    seeds, keys = [], np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    for dtype in (np.float32, np.float64):
        file = io.BytesIO()
        total = (keys.T @ keys).astype(dtype)
        np.savez(file, **{"mom2.mom2": total, "mom2.count": 50, "mom2.constructor": "x"})
        seeds.append(file.getvalue())
    return Format(seeds, ZIP, SecondMoment.from_npz, _use_moment)


# ---------------------------------------------------------------- trained editors


def _narrow() -> None:
    for width in ("LSTM_WIDTH", "H_WIDTH", "HEAD_WIDTH"):
        setattr(knowledge_editor, width, 8)


def _use_editor(method: Any) -> None:
    method.has_seen(REQUEST), repr(method)
    _use_edit(method.prepared(model()).compute(model(), REQUEST))


def _read_editor(path: Path) -> Any:
    kind = "ke" if b'\\"kind\\": \\"ke' in path.read_bytes()[:5000] else "mend"
    return get_method(kind).load(path)


def editor() -> Format:
    """A trained editor: KE and MEND of tiny width."""
    _narrow()
    places = [Weight("W_out", 1)]
    editors = [random_editor(model(), kind, matrices=places) for kind in ("ke", "mend")]
    return Format(saved(*editors), TENSORS, _read_editor, _use_editor)


INFO = {"kind": "mend", "hashes": ["0" * 64], "train": ["a1", "b2"], "settings": {"lr": 0.1}}


def _state(steps: int) -> State:
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())
    network = MendNetwork({Weight("W_out", 1): (4, 3)})
    state = State.new(network, Training(lr=1e-3, alpha_lr=1e-2))
    for state.step in range(1, steps + 1):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.adam.step()
        state.curve.append({"step": state.step, "before": 3.0, "loss": 1 / state.step})
        state.best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return state


def _read_state(path: Path) -> State:
    state = _state(0)
    state.load(path, INFO)
    return state


def _use_state(state: State) -> None:
    assert 0 <= state.best_step <= state.step
    for parameter in state.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.adam.step()
    state.network.load_state_dict(state.best)
    f"{state.seconds:.1f}"


def training() -> Format:
    """A training run that was stopped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        seeds = []
        for steps in (2, 3):
            _state(steps).save(path, INFO)
            seeds.append(path.read_bytes())
    return Format(seeds, TENSORS, _read_state, _use_state)


def published() -> Format:
    """The paper's editors: pickles in a zip, as published and stripped."""
    hf, seeds = tiny_models.tiny_hf("gpt2", tokenizer()), []
    network = released_editors.ReleasedMend(hf, released_editors.inner_names("gpt2"))
    whole = released_editors.published(network, hf.config)
    for content in (whole, dict(network.state_dict())):
        file = io.BytesIO()
        torch.save(content, file)
        seeds.append(file.getvalue())
    read = lambda path: convert_editor(path, model(), counterfact=False)  # noqa: E731
    return Format(seeds, (*ZIP, mutate.damaged_pickle), read, lambda found: saved(found))
