"""A training run so far, and the file from which it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transformer_lens_rome.files.fields import fits
from transformer_lens_rome.files.tensors import check_finite, read_tensors, write_tensors

if TYPE_CHECKING:
    from transformer_lens_rome.methods.hypernetworks.training import Training

_FORMAT = "transformer_lens_rome.training.1"
_POSITIVE = ("_sq", ".step", ".squares", ".n")  # Adam's values and MEND's, never below zero


@dataclass
class State:
    """A training run so far.

    Attributes:
        network: What is trained.
        adam: Its optimiser.
        step: Steps made.
        seconds: Time they took.
        curve: One entry for each validation, see `validate`.
        best: The best network's tensors.
    """

    network: nn.Module
    adam: torch.optim.Adam
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def new(cls, network: nn.Module, settings: Training) -> State:
        """A run of no steps; parameters of the name alpha have a learning rate of their own."""
        named = list(network.named_parameters())
        groups = [{"params": [p for name, p in named if name != "alpha"], "lr": settings.lr}]
        if alpha := [p for name, p in named if name == "alpha"]:
            groups.append(
                {
                    "params": alpha,
                    "lr": settings.lr if settings.alpha_lr is None else settings.alpha_lr,
                }
            )
        return cls(network, torch.optim.Adam(groups))

    @property
    def best_step(self) -> int:
        """The step of the best validation, the first of equal ones."""
        return int(min(self.curve, key=lambda entry: entry["loss"])["step"])

    def save(self, path: Path, info: Mapping[str, Any]) -> None:
        """Write all that a run needs to go on."""
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for i, values in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in values.items()}
        own = {"format": _FORMAT, "step": self.step, "seconds": self.seconds, "curve": self.curve}
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        write_tensors(path, copies, {**own, "run": info})

    def load(self, path: Path, info: Mapping[str, Any]) -> None:
        """Go on where a run was when it was saved.

        Raises:
            ValueError: the file holds another run, or is damaged.
        """
        tensors, found = read_tensors(path, _FORMAT)
        if (run := found.get("run")) != info:
            run = run if isinstance(run, dict) else {}
            other = sorted(k for k in info if run.get(k) != info[k])
            raise ValueError(f"{path} holds another training run ({other}); give another file")
        try:
            self._check(tensors, found)
        except ValueError as error:
            raise ValueError(f"{path} is a damaged training file ({error}); delete it") from error
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.network.load_state_dict(parts["network"])
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["adam"].items():
            i, _, rest = name.partition(".")
            values.setdefault(int(i), {})[rest] = tensor
        self.adam.load_state_dict({**self.adam.state_dict(), "state": values})
        self.step, self.seconds, self.curve = found["step"], found["seconds"], found["curve"]
        self.best = parts["best"]

    def _check(self, tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
        """Refuse anything but what `save` writes for this network."""
        like = self.network.state_dict()
        wanted = {f"{part}.{name}": t for part in ("network", "best") for name, t in like.items()}
        for i, parameter in enumerate(p for g in self.adam.param_groups for p in g["params"]):
            if any(name.startswith(f"adam.{i}.") for name in tensors):  # Adam knows no others
                wanted[f"adam.{i}.step"] = torch.zeros(())
                wanted |= {f"adam.{i}.{n}": parameter for n in ("exp_avg", "exp_avg_sq")}
        for name in wanted.keys() | tensors.keys():
            mine, theirs = wanted.get(name), tensors.get(name)
            if mine is None or theirs is None or mine.shape != theirs.shape:
                raise ValueError(f"{name[:60]} is missing, of another shape, or not known")
            if mine.dtype != theirs.dtype or (name.endswith(_POSITIVE) and (theirs < 0).any()):
                raise ValueError(f"{name[:60]} is of another type, or below zero")
            if not mine.is_floating_point() and not torch.equal(mine, theirs.to(mine.device)):
                raise ValueError(f"{name[:60]} is not what this run's data make it")
        check_finite(tensors)
        step, seconds, curve = (found.get(name) for name in ("step", "seconds", "curve"))
        if type(step) is not int or not 0 <= step < 2**53 or not fits(seconds, float):
            raise ValueError("its step or seconds is no number")
        for entry in curve if isinstance(curve, list) and curve else [None]:
            whole = isinstance(entry, dict) and {"step", "loss"} <= set(entry)
            if not whole or not all(fits(value, float) for value in entry.values()):
                raise ValueError("its curve is not a list of validations")
            if type(entry["step"]) is not int or not 0 <= entry["step"] <= step:
                raise ValueError(f"its curve has a validation at step {entry['step']!r:.40}")
