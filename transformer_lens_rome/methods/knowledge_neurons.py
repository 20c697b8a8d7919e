"""KN: find the MLP neurons that express a fact and change their rows of W_out (Dai et al. 2022).

A neuron is one entry w of the activation at the prompt's last token in one layer. Its clean value
is a, and P(w) is the probability of the ground truth with that layer's activation set to w:

    Attr = a · integral over alpha from 0 to 1 of dP(alpha a)/dw    (arXiv:2104.08696, section 3.2)
         ~ a / S · sum over k of dP(alpha_k a)/dw,   alpha_k = k / (S - 1),  k = 0 ... S - 1
    coarse(prompt) = the neurons with Attr > threshold · max Attr
    neurons = the neurons that are coarse for more than p · n of n prompts           (section 3.3)
    W_out[i] += new · sum over j of E[t_j] - old · E[o]             for each neuron i (section 5.1)

E are rows of the embedding matrix, t_j the new target's tokens and o the token to forget. All
layers are attributed on the unedited model; then all are edited.

Where paper, released code (of the ROME paper's comparison) and this module differ:

    what             paper             released              here
    activation       after the         before it (GPT-2)     `activation=None`: before it, or after
                     function                                it if the MLP is gated
    alpha_k          k / S, k = 1...S  both ends             both ends; `both_ends=False`
    targets          one masked token  no space before them  the same; `add_space=True`: with one
    several tokens   -                 mean, all after the   the same; `extend=True`: each after
                                       bare prompt           greedy tokens, as intended
    prompts, p       several, 0.7 and  one                   the same; `prompts`, p = 0.4
                     adjusted
    o                the answer        first greedy token    the same; `forget="truth"`
    old, new         1, 8              2, 1                  2, 1

With a gate, neuron i is act(gate_i) · linear_i, the factor of row i of W_out. "post" scales that
product, as in the paper's definition. "pre" scales gate_i alone. Both paths have the same two ends,
zero (act(0) = 0) and clean. But if a neuron's gate is nearly closed, act is negative on its "pre"
path, and the neuron passes through larger values there than at either end. Without a gate, "pre" is
the released choice.

If a norm follows the MLP (Gemma 2 and 3), the output of a scaled key depends on alpha only at 0. At
that point the gradient is up to 1 / sqrt(the norm's epsilon) times as large as elsewhere. With both
ends, that one point decides which neurons are selected; without it, the attributions of a layer sum
to zero. Neither is the integral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_rome.edits.kinds import EditHealth, EditRequest, FactoredEdit
from transformer_lens_rome.edits.measure import measured
from transformer_lens_rome.methods.base import provenance, register_method
from transformer_lens_rome.methods.neuron_attribution import attribution
from transformer_lens_rome.model import adapter, passes, refusals
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.encoder import Encoder

MANY = 0.01
"""Share of all neurons above which an edit gets a warning."""


@dataclass(frozen=True)
class KnowledgeNeurons:
    """KN as an `EditMethod`.

    Attributes:
        steps: S, the number of points on the path from zero to the clean activation.
        both_ends: alpha_k from 0 to 1, as released. False: from 1 / S to 1, as in the paper.
        threshold: A neuron is coarse above this share of the largest attribution.
        prompts: More templates of the same fact, each with one `{}`. Without any, the neurons are
            not refined.
        p: A neuron is kept if it is coarse for more than this share of all prompts, the request's
            prompt included.
        activation: The activation to scale: "pre", the input of the activation function; "post",
            the key; None, the default for the model, see above.
        add_space: Tokenise the targets as they appear after the prompt, with a space.
        extend: Attribute each token of the ground truth after the greedy tokens before it.
        forget: o: "greedy", the model's first greedy token; "truth", the ground truth's first.
        old: The factor by which o's embedding is subtracted.
        new: The factor by which each new token's embedding is added.
        batch_size: Number of points, of one or several layers, in one pass.
        prepend_bos: Whether to prepend BOS. None: as the checkpoint's tokenizer does.
        progress: Show a progress bar.
    """

    name: ClassVar[str] = "kn"

    steps: int = 20
    both_ends: bool = True
    threshold: float = 0.2
    prompts: tuple[str, ...] = ()
    p: float = 0.4
    activation: Literal["pre", "post"] | None = None
    add_space: bool = False
    extend: bool = False
    forget: Literal["greedy", "truth"] = "greedy"
    old: float = 2.0
    new: float = 1.0
    batch_size: int = 60
    prepend_bos: bool | None = None
    progress: bool = field(default=False, metadata={"identifies": False})

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.activation not in ("pre", "post", None):
            raise ValueError(f"activation must be 'pre', 'post' or None, got {self.activation!r}")
        if self.forget not in ("greedy", "truth"):
            raise ValueError(f"forget must be 'greedy' or 'truth', got {self.forget!r}")
        if self.steps < 2 or self.batch_size < 1:
            raise ValueError(
                "steps must be 2 or more, for both ends of the path, and batch_size 1 or more"
            )
        if not 0 <= self.threshold < 1 or not 0 <= self.p < 1:
            raise ValueError("threshold and p are shares: at least 0 and below 1")
        if wrong := [prompt for prompt in self.prompts if prompt.count("{}") != 1]:
            raise ValueError(f"each of prompts needs exactly one '{{}}', got {wrong[0]!r}")

    @model_call
    def prepared(self, model: Model, *, seed: int = 0) -> KnowledgeNeurons:
        """Return a copy with the activation set."""
        refusals.check_editable(model, range(model.cfg.n_layers))
        if self.activation is not None:
            return self
        gated = adapter.parameter(model, Weight("W_gate", 0)) is not None
        return dataclasses.replace(self, activation="post" if gated else "pre")

    @model_call
    def attribute(self, model: Model, request: EditRequest) -> Float[Tensor, "layer d_mlp"]:
        """Compute Attr of every neuron for the ground truth after the request's prompt.

        Raises:
            ValueError: no target_true, random passes, or attributions that are not finite.
            NotImplementedError: the model cannot be edited.
        """
        method = self.prepared(model)
        encoder = Encoder.of(model, method.prepend_bos)
        tokens = _tokens(encoder, request, _truth(request), method.add_space)
        ids = list(encoder.row(request.text).ids)
        alphas = torch.linspace(0 if method.both_ends else 1 / method.steps, 1, method.steps)
        name: Literal["pre", "key"] = "key" if method.activation == "post" else "pre"
        parts: list[Tensor] = []
        for labels in [[token] for token in tokens] if method.extend else [tokens]:
            if parts:
                ids = [*ids, _greedy(model, ids)]
            part = attribution(
                model,
                ids,
                labels,
                name,
                alphas,
                batch_size=method.batch_size,
                progress=method.progress,
            )
            parts.append(part)
        return torch.stack(parts).mean(0)

    @model_call
    def neurons(self, model: Model, request: EditRequest) -> list[tuple[int, int]]:
        """Return (layer, neuron) of each neuron that expresses the fact, refined by `prompts`.

        Raises:
            ValueError, NotImplementedError: as `attribute`.
        """
        prompts = dict.fromkeys((request.prompt, *self.prompts))  # each prompt once
        requests = [dataclasses.replace(request, prompt=prompt) for prompt in prompts]
        return select([self.attribute(model, one) for one in requests], self.threshold, self.p)

    @model_call
    def compute(self, model: Model, request: EditRequest, *, seed: int = 0) -> FactoredEdit:
        """Compute the edit that writes one fact; no step is random.

        The edit's provenance lists the neurons. Without any neuron, the edit changes nothing and
        its health has a warning.

        Raises:
            ValueError, NotImplementedError: as `attribute`.
        """
        method = self.prepared(model)
        encoder = Encoder.of(model, method.prepend_bos)
        neurons = method.neurons(model, request)
        written = _tokens(encoder, request, request.target_new, method.add_space)
        if method.forget == "truth":
            forgotten = _tokens(encoder, request, _truth(request), method.add_space)[0]
        else:
            forgotten = _greedy(model, encoder.row(request.text).ids)
        E = adapter.embeddings(model, torch.tensor([forgotten, *written])).cpu()
        change = method.new * E[1:].sum(0) - method.old * E[0]
        factors = {
            Weight("W_out", layer): (left, change[None])
            for layer, left in _indicators(model, neurons).items()
        }
        details = {"neurons": neurons, "forgotten": forgotten, "written": written}
        edit = FactoredEdit.of(
            factors,
            {where: adapter.weight_hash(adapter.w_out(model, where.layer)) for where in factors},
            request=request,
            config=dataclasses.asdict(method),
            provenance=provenance(model, encoder.prepends_bos) | details,
        )
        return dataclasses.replace(edit, health=_health(model, encoder, edit))


def select(
    attributions: Sequence[Float[Tensor, "layer d_mlp"]], threshold: float, p: float
) -> list[tuple[int, int]]:
    """Return (layer, neuron) of the neurons that are coarse for more than p · n of n prompts.

    A neuron is coarse for a prompt if its Attr is above threshold · max Attr of that prompt.
    """
    counts = torch.stack([one > threshold * one.max() for one in attributions]).sum(0)
    return [(layer, i) for layer, i in (counts > p * len(attributions)).nonzero().tolist()]


def _truth(request: EditRequest) -> str:
    """Return the request's ground truth; raise ValueError if there is none."""
    truth = request.target_true or ""
    if not truth.strip():
        raise ValueError(
            "KN attributes the fact that the model knows now; give the request a target_true, for "
            f"instance {request.text!r} -> target_true='...'"
        )
    return truth


def _tokens(encoder: Encoder, request: EditRequest, target: str, add_space: bool) -> list[int]:
    """Tokenise a target alone, as released, or with `add_space` as it appears after the prompt."""
    if not add_space:
        return encoder.ids(target.strip())
    row = encoder.row(request.text, target=target.strip())
    return [row.ids[position] for position in row.target]


@torch.no_grad()
def _greedy(model: Model, ids: Sequence[int]) -> int:
    """Return the most probable next token."""
    row, last = torch.tensor([list(ids)]), torch.tensor([len(ids) - 1])
    return int(passes.logits_at(model, row, torch.tensor([0]), last)[0].argmax())


# ---------------------------------------------------------------- the edit


def _indicators(
    model: Model, neurons: Sequence[tuple[int, int]]
) -> dict[int, Float[Tensor, "d_mlp 1"]]:
    """Return a vector with 1 at the selected neurons, for each layer that has any."""
    indicators: dict[int, Tensor] = {}
    for layer, i in neurons:
        if layer not in indicators:
            indicators[layer] = torch.zeros(len(adapter.w_out(model, layer)), 1)
        indicators[layer][i] = 1.0
    return indicators


def _health(model: Model, encoder: Encoder, edit: FactoredEdit) -> EditHealth:
    """Measure the edit on its prompt and add the warnings of this method."""
    health = measured(model, encoder, edit)
    widths = [len(adapter.w_out(model, layer)) for layer in range(model.cfg.n_layers)]
    neurons, total = len(edit.provenance["neurons"]), sum(widths)
    assert health.p_before is not None and health.p_after is not None
    warnings = [*health.warnings]
    if not neurons:
        warnings.append(
            "no neuron was found, so nothing changes: no neuron raises the ground truth's "
            "probability, or the prompts do not agree; try add_space=True, a smaller p or fewer "
            "prompts"
        )
    elif neurons > MANY * total:
        warnings.append(
            f"{neurons} of {total} neurons are rewritten, which may damage other facts; raise "
            "threshold, or pass prompts that express the same fact"
        )
    if health.p_after < health.p_before:
        warnings.append(
            f"the target's probability fell from {health.p_before:.3g} to {health.p_after:.3g}"
        )
    return dataclasses.replace(health, warnings=tuple(warnings))


register_method("kn", KnowledgeNeurons)
