"""What `leaks.py` repeats: edits of every kind and traces, whole or interrupted half-way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from leaks.footprint import InterruptAt

from transformer_lens_rome import (
    DenseEdit,
    EditRequest,
    RomeConfig,
    SecondMoment,
    applied,
    apply_edit,
    causal_trace,
    compute_rome_edit,
    get_method,
    load_edit,
    revert_all,
    rome_edit,
)
from transformer_lens_rome.edits.kinds import FactoredEdit
from transformer_lens_rome.model.adapter import Weight, parameter, w_out, weight_hash

REQUEST = EditRequest("{} is in", "The Space Needle", "Paris")
PREFIXES = ("", "The old man said.", "In the best of times.")
KINDS = ("resid", "mlp", "attn")


class Setting:
    """A model and one edit of every kind for it."""

    def __init__(self, model: Any, layer: int, moment: SecondMoment, steps: int = 3) -> None:
        self.model, self.layer, self.moment = model, layer, moment
        self.options = {
            "layer": layer,
            "second_moment": moment,
            "prefixes": PREFIXES,
            "config": RomeConfig(steps=steps),
            "progress": False,
        }
        self.rank_one = compute_rome_edit(model, REQUEST, **self.options)
        known = {"layer": layer, "request": REQUEST, "model_hash": self.rank_one.model_hash}
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        d_mlp, d_model = w_out(model, layer).shape
        has_bias = parameter(model, Weight("b_out", layer)) is not None
        bias = 0.01 * draw(d_model) if has_bias else None
        self.dense = DenseEdit(
            left=0.01 * draw(d_mlp, 2), right=draw(2, d_model), bias=bias, **known
        )
        places = [Weight("W_out", layer), Weight("W_in", layer - 1)]
        shapes = {where: parameter(model, where).shape for where in places}
        self.factored = FactoredEdit.of(
            {
                at: (0.01 * draw(rows, 2), draw(2, columns))
                for at, (rows, columns) in shapes.items()
            },
            {where: weight_hash(parameter(model, where)) for where in places},
            request=REQUEST,
        )

    @property
    def tolerance(self) -> float:
        """Bytes a cycle."""
        return w_out(self.model, self.layer).nbytes / 4

    # ---------------------------------------------------------------- cycles

    def settle(self) -> None:
        """Leave behind what these two always leave behind."""
        self.edited_in_with()
        self.trace("resid")

    def edited_in_with(self) -> None:
        """A new ROME edit, on and off."""
        with rome_edit(self.model, REQUEST, **self.options) as done:
            assert done.active and done.health

    def several_out_of_order(self) -> None:
        """One of every kind, the first undone first."""
        edits = (self.rank_one, self.dense, self.factored)
        for one in [apply_edit(self.model, edit) for edit in edits]:
            one.revert()

    def lost_and_reverted(self) -> None:
        """Nobody keeps the handle; `revert_all` finds the edits."""
        apply_edit(self.model, self.dense)
        apply_edit(self.model, self.rank_one.scale(0.5))
        revert_all(self.model)

    def through_a_file(self) -> None:
        """Saved, read, applied from the file."""
        with tempfile.TemporaryDirectory() as folder:
            for edit in (self.rank_one, self.dense, self.factored):
                edit.save(Path(folder) / "edit.safetensors")
                with applied(self.model, load_edit(Path(folder) / "edit.safetensors")):
                    pass

    def fine_tuned(self) -> None:
        """Another method's edit."""
        with applied(self.model, get_method("ft", steps=2).compute(self.model, REQUEST)):
            pass

    def interrupted(self, cycle: Callable[[], None], at: int) -> None:
        """A cycle that raises at one tensor operation; then a clean model is asked for."""
        fault = InterruptAt(at)
        try:
            with fault:
                cycle()
        except Exception:  # ours, or what others made of it
            if fault.count < at:
                raise
        revert_all(self.model)

    def edits(self, n: int) -> Iterator[Callable[[], None]]:
        """N cycles, every other one with an exception, each time at another place."""
        every = (
            self.edited_in_with,
            self.several_out_of_order,
            self.lost_and_reverted,
            self.through_a_file,
            self.fine_tuned,
        )
        lengths = {cycle: operations(cycle) for cycle in every}
        for i in range(n):
            cycle = every[i // 2 % len(every)]
            at = 1 + i * 7919 % lengths[cycle]
            yield partial(self.interrupted, cycle, at) if i % 2 else cycle

    def trace(self, kind: str, n_samples: int = 3) -> None:
        """One causal trace."""
        prompt = REQUEST.text
        causal_trace(
            self.model, prompt, REQUEST.subject, kind=kind, n_samples=n_samples, progress=False
        )

    def traces(self, n: int) -> Iterator[Callable[[], None]]:
        """N traces, every fifth one with an exception."""
        lengths = {kind: operations(partial(self.trace, kind)) for kind in KINDS}
        for i in range(n):
            kind = KINDS[i % 3]
            cycle, at = partial(self.trace, kind), 1 + i * 7919 % lengths[kind]
            yield partial(self.interrupted, cycle, at) if i % 5 == 4 else cycle


def operations(cycle: Callable[[], None]) -> int:
    """How many tensor operations a cycle takes."""
    with InterruptAt() as counter:
        cycle()
    return counter.count


def tiny_setting(model: Any) -> Setting:
    """A setting for a tiny model, with random statistics."""
    d_mlp = len(w_out(model, 1))
    keys = torch.randn(1000, d_mlp, generator=torch.Generator().manual_seed(0)).double()
    return Setting(model, 1, SecondMoment.from_moment(keys.T @ keys / 1000, 1000))
