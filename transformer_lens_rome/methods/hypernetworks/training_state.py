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
            self._restore(tensors, metadata)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{path} is a damaged training file ({error!r:.400}); delete it"
            ) from error

    def _restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Restore every part; raise an error if a part is missing or does not fit."""
        check_finite(tensors)
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.network.load_state_dict(parts["best"])
        self.best = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(parts["network"])
        state = self._adam_state(parts["adam"])
        self.adam.load_state_dict({**self.adam.state_dict(), "state": state})
        self.step, self.seconds, self.curve = (metadata[k] for k in ("step", "seconds", "curve"))
        whole = fits(self.step, int) and fits(self.seconds, float) and fits(self.curve, list[dict])
        if not whole or not all(fits(n, float) for entry in self.curve for n in entry.values()):
            raise ValueError("its step, seconds or curve are not numbers")
        if not 0 <= self.best_step <= self.step:
            raise ValueError(f"step {self.best_step} is the best of {self.step}")

    def _adam_state(self, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Return Adam's state by parameter; a parameter that had no gradient yet has no state."""
        state: dict[int, dict[str, Tensor]] = {}
        for i, parameter in enumerate(p for g in self.adam.param_groups for p in g["params"]):
            if f"{i}.step" in tensors:
                means = {name: tensors[f"{i}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
                state[i] = {name: mean.reshape(parameter.shape) for name, mean in means.items()}
                state[i]["step"] = tensors[f"{i}.step"].float().reshape(())
                if state[i]["step"] < 0:
                    raise ValueError("Adam has made fewer than 0 steps")
        return state
