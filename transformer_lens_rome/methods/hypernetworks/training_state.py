"""The state of a training run, and the file from which the run resumes."""

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
_POSITIVE = ("_sq", ".step", ".squares", ".n")  # values of Adam and MEND that are never negative


@dataclass
class State:
    """The state of a training run.

    Attributes:
        network: The network that is trained.
        adam: Its optimiser.
        step: Number of steps so far.
        seconds: Time of these steps and validations, in seconds.
        curve: One entry for each validation, see `validate`.
        best: The tensors of the best network.
    """

    network: nn.Module
    adam: torch.optim.Adam
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def new(cls, network: nn.Module, settings: Training) -> State:
        """Construct the state of a run at step 0; the parameter alpha has its own learning rate."""
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
        """Return the step of the best validation, the first of equal ones."""
        return int(min(self.curve, key=lambda entry: entry["loss"])["step"])

    def save(self, path: Path, info: Mapping[str, Any]) -> None:
        """Write everything that a run needs to resume."""
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for i, values in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in values.items()}
        own = {"format": _FORMAT, "step": self.step, "seconds": self.seconds, "curve": self.curve}
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        write_tensors(path, copies, {**own, "run": info})

    def load(self, path: Path, info: Mapping[str, Any]) -> None:
        """Restore the state of a saved run.

        Raises:
            ValueError: the file contains another run, or is damaged.
        """
        tensors, metadata = read_tensors(path, _FORMAT)
        if (run := metadata.get("run")) != info:
            run = run if isinstance(run, dict) else {}
            other = sorted(k for k in info if run.get(k) != info[k])
            raise ValueError(f"{path} contains another training run ({other}); pass another file")
        try:
            self._check(tensors, metadata)
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
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.curve = metadata["curve"]
        self.best = parts["best"]

    def _check(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Raise ValueError unless `save` could have written this for the network."""
        own = self.network.state_dict()
        wanted = {f"{part}.{name}": t for part in ("network", "best") for name, t in own.items()}
        for i, parameter in enumerate(p for g in self.adam.param_groups for p in g["params"]):
            if any(
                name.startswith(f"adam.{i}.") for name in tensors
            ):  # Adam has no state for the others
                wanted[f"adam.{i}.step"] = torch.zeros(())
                wanted |= {f"adam.{i}.{n}": parameter for n in ("exp_avg", "exp_avg_sq")}
        for name in wanted.keys() | tensors.keys():
            like, read = wanted.get(name), tensors.get(name)
            if like is None or read is None or like.shape != read.shape:
                raise ValueError(f"{name[:60]} is missing, unknown, or of another shape")
            if like.dtype != read.dtype or (name.endswith(_POSITIVE) and (read < 0).any()):
                raise ValueError(f"{name[:60]} is of another dtype, or negative")
            if not like.is_floating_point() and not torch.equal(like, read.to(like.device)):
                raise ValueError(f"{name[:60]} does not fit this run's data")
        check_finite(tensors)
        step, seconds, curve = (metadata.get(name) for name in ("step", "seconds", "curve"))
        if type(step) is not int or not 0 <= step < 2**53 or not fits(seconds, float):
            raise ValueError("its step or seconds is not a valid number")
        entries: list[Any] = curve if isinstance(curve, list) and curve else [None]
        for entry in entries:
            complete = isinstance(entry, dict) and {"step", "loss"} <= set(entry)
            if not complete or not all(fits(value, float) for value in entry.values()):
                raise ValueError("its curve is not a list of validations")
            if type(entry["step"]) is not int or not 0 <= entry["step"] <= step:
                raise ValueError(f"its curve has a validation at step {entry['step']!r:.40}")
