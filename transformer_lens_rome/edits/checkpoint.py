"""The Hugging Face model behind a TransformerLens model: its name and its tensors of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from transformer_lens_rome.edits.base_bytes import live_weight
from transformer_lens_rome.edits.ledger import base_weight
from transformer_lens_rome.files.hub import is_hub_name
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.protocol import Model


class Stored(NamedTuple):
    """The tensor of a checkpoint that is a weight.

    Attributes:
        name: Its name in the checkpoint.
        turned: True if it is stored as `[d_out, d_in]`, as by `nn.Linear`.
    """

    name: str
    turned: bool


class Checkpoint(NamedTuple):
    """A Hugging Face model and its tensors.

    Attributes:
        model: The model that TransformerLens runs, or of whose weights it has converted copies.
        tensors: The state dict under the checkpoint's names. Tensors share the model's memory.
        converted: True for a HookedTransformer: its edits are not in `tensors`.
    """

    model: Any
    tensors: dict[str, Tensor]
    converted: bool

    @classmethod
    def of(cls, model: Model, hf_model: Any = None) -> Checkpoint:
        """Return the checkpoint of a bridge, or for a HookedTransformer that of `hf_model`.

        Raises:
            ValueError: there is none, or the weights of a bridge were processed.
        """
        inside = adapter.hf_model(model)
        if inside is None and hf_model is None:
            raise ValueError(
                "a HookedTransformer keeps no Hugging Face model; pass the one that it was loaded "
                "from as hf_model=AutoModelForCausalLM.from_pretrained(name)"
            )
        source = hf_model if inside is None else inside
        return cls(source, _state_dict(source), inside is None)

    def stored(self, model: Model, where: Weight) -> Stored:
        """Return the tensor that equals a weight of the model, as it is without its edits.

        Several tensors may be equal, for instance in an untrained model; then the one whose name
        has the layer's number is returned.

        Raises:
            ValueError: no tensor is equal, or several ones of the layer.
        """
        if self.converted:
            base = base_weight(model, where)
            assert base is not None  # an edited weight, or a W_out, which every model here has
            return self._equal_to(base, where, "before")
        # a bridge edits the checkpoint's own tensors; a copy from before a split would differ
        return self._equal_to(live_weight(model, where), where, "after")

    def _equal_to(self, weight: Tensor, where: Weight, when: Literal["before", "after"]) -> Stored:
        found: dict[str, Stored] = {}
        for name, tensor in self.tensors.items():
            for turned in (False, True) if tensor.ndim == 2 else (False,):
                stored = tensor.T if turned else tensor
                if stored.shape == weight.shape and torch.equal(stored.to(weight), weight):
                    found.setdefault(name, Stored(name, turned))
        if len(found) > 1:
            found = {n: one for n, one in found.items() if str(where.layer) in n.split(".")}
        if len(found) == 1:
            return found.popitem()[1]
        raise ValueError(
            f"the Hugging Face model has {'several tensors' if found else 'no tensor'} equal to "
            f"{where.name} of layer {where.layer} {when} its edits; for a HookedTransformer, pass "
            "the model that it was loaded from (without weight processing), and undo changes that "
            "were not made by apply_edit; a matrix that the checkpoint keeps fused with another "
            "(Phi-3's W_in and W_gate) cannot be exported"
        )

    def tied_to(self, name: str) -> list[str]:
        """Return the other names of a tensor's memory, in other layers or modules."""
        at = self.tensors[name].data_ptr()
        return [n for n, other in self.tensors.items() if n != name and other.data_ptr() == at]

    def hub_name(self, model: Model) -> str | None:
        """Return the checkpoint's name on the Hub; None if it is not known.

        A folder of this machine is no name. TransformerLens' own short names are none either.
        """
        name = getattr(self.model.config, "_name_or_path", None)
        if is_hub_name(name) and not Path(str(name)).exists():
            return str(name)
        known = adapter.model_name(model)
        return known if is_hub_name(known, owned=True) else None


def _state_dict(hf: Any) -> dict[str, Tensor]:
    """Return the state dict under the checkpoint's names, without the names that a bridge adds."""
    with torch.device("meta"):
        own_names = set(type(hf)(hf.config).state_dict())
    state: dict[str, Tensor] = {}
    for name, tensor in hf.state_dict().items():
        name = adapter.plain_name(name)
        if name in own_names:
            state.setdefault(name, tensor.detach())
    return state
