"""KN: find the MLP neurons that carry a fact, and rewrite their rows of W_out (Dai et al. 2022).

A neuron is one entry w of the activation at the prompt's last token in one layer, a its value
there, and P(w) the probability of the ground truth with that layer's activation set to w:

    Attr = a · integral over alpha from 0 to 1 of dP(alpha a)/dw    (arXiv:2104.08696, section 3.2)
         ~ a / S · sum over k of dP(alpha_k a)/dw,   alpha_k = k / (S - 1),  k = 0 ... S - 1
    coarse(prompt) = the neurons with Attr > threshold · max Attr
    neurons = those that are coarse for more than p · n of n prompts                 (section 3.3)
    W_out[i] += new · sum over j of E[t_j] - old · E[o]             for each neuron i (section 5.1)

E are rows of the embedding matrix, t_j the new target's tokens and o the token to forget. All
layers are attributed on the model as it is; then all are edited.

Where paper, released code (of the ROME paper's comparison) and this module differ:

    what             paper             released              here
    activation       after the         before it (GPT-2)     `activation=None`: before it, but after
                     function                                it where the MLP is gated
    alpha_k          k / S, k = 1...S  both ends             both ends; `both_ends=False`
    targets          one masked token  no space before them  the same; `add_space=True`: with one
    several tokens   -                 mean, all after the   the same; `extend=True`: each after
                                       bare prompt           greedy tokens, as was intended
    prompts, p       several, 0.7 and  one                   the same; `prompts`, p = 0.4
                     adjusted
    o                the answer        first greedy token    the same; `forget="truth"`
    old, new         1, 8              2, 1                  2, 1

With a gate, neuron i is act(gate_i) · linear_i, what W_out's row i is multiplied by. "post" scales
that product, as the paper's definition has it. "pre" scales gate_i alone: the two ends are the
same, off (act(0) = 0) and clean, but a neuron whose gate is nearly closed passes, where act dips
below zero, through larger values than either. Without a gate "pre" is the released choice.

Where a norm follows the MLP (Gemma 2 and 3), the output of a scaled key does not depend on alpha
but at 0, where the gradient is up to 1 / sqrt(the norm's epsilon) times what it is elsewhere. With
both ends, that one point decides which neurons are found; without, the attributions of a layer add
up to nothing. Neither is the integral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
from transformer_lens_rome.prompts.encoder import Encoder

MANY = 0.01
"""The share of all neurons above which an edit carries a warning."""


@dataclass(frozen=True)
class KnowledgeNeurons:
    """KN as an `EditMethod`.

    Attributes:
        steps: S, the number of points on the path from nothing to the clean activation.
        both_ends: alpha_k from 0 to 1, as released; else from 1 / S to 1, as in the paper.
        threshold: A neuron is coarse above this share of the largest attribution.
        prompts: More templates of the same fact, each with one `{}`; none: no refinement.
        p: A neuron is kept if more than this share of all prompts, the request's among them, find
            it.
        activation: What is scaled, the input of the activation function or the key: "pre", "post",
            or None for the model's own, see above.
        add_space: Tokenise the targets as they follow the prompt, after a space.
        extend: Attribute each token of the ground truth after the greedy tokens before it.
        forget: o, the first token that the model itself would say, or the ground truth's.
        old: How much of o's embedding is taken away.
        new: How much of each new token's embedding is added.
        batch_size: How many points, of one or several layers, are run at once.
        prepend_bos: Overrides the checkpoint's own rule.
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
    progress: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.activation not in ("pre", "post", None):
            raise ValueError(f"activation must be 'pre', 'post' or None, got {self.activation!r}")
        if self.forget not in ("greedy", "truth"):
            raise ValueError(f"forget must be 'greedy' or 'truth', got {self.forget!r}")
        if self.steps < 2 or self.batch_size < 1:
            raise ValueError("steps must be 2 or more, for both ends of the path; batch_size 1")
        if not 0 <= self.threshold < 1 or not 0 <= self.p < 1:
            raise ValueError("threshold and p are shares: at least 0 and below 1")
        if wrong := [prompt for prompt in self.prompts if prompt.count("{}") != 1]:
            raise ValueError(f"each of prompts needs exactly one '{{}}', unlike {wrong[0]!r}")

    @model_call
    def prepared(self, model: Any, *, seed: int = 0) -> KnowledgeNeurons:
        """The same with the activation found."""
        refusals.check_editable(model, range(model.cfg.n_layers))
        if self.activation is not None:
            return self
        gated = adapter.parameter(model, Weight("W_gate", 0)) is not None
        return dataclasses.replace(self, activation="post" if gated else "pre")

    @model_call
    def attribute(self, model: Any, request: EditRequest) -> Float[Tensor, "layer d_mlp"]:
        """How much each neuron contributes to the ground truth after the request's own prompt.

        Raises:
            ValueError: no target_true, passes that are random, or numbers that are not finite.
            NotImplementedError: a model that cannot be edited.
        """
        method = self.prepared(model)
        encoder = Encoder.of(model, method.prepend_bos)
        tokens = _tokens(encoder, request, _truth(request), method.add_space)
        ids = list(encoder.row(request.text).ids)
        alphas = torch.linspace(0 if method.both_ends else 1 / method.steps, 1, method.steps)
        name = "key" if method.activation == "post" else "pre"
        found = []
        for labels in [[token] for token in tokens] if method.extend else [tokens]:
            if found:
                ids = [*ids, _greedy(model, ids)]
            options = {"batch_size": method.batch_size, "progress": method.progress}
            found.append(attribution(model, ids, labels, name, alphas, **options))
        return torch.stack(found).mean(0)

    @model_call
    def neurons(self, model: Any, request: EditRequest) -> list[tuple[int, int]]:
        """(layer, neuron) of each neuron that carries the fact, refined if there are prompts.

        Raises:
            ValueError, NotImplementedError: as `attribute`.
        """
        every = dict.fromkeys((request.prompt, *self.prompts))
        asked = [dataclasses.replace(request, prompt=prompt) for prompt in every]
        return select([self.attribute(model, one) for one in asked], self.threshold, self.p)

    @model_call
    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> FactoredEdit:
        """The edit that writes one fact; nothing in it is random.

        The neurons are in its provenance. Without any, it changes nothing and its health says so.

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
        found = {"neurons": neurons, "forgotten": forgotten, "written": written}
        edit = FactoredEdit.of(
            factors,
            {where: adapter.weight_hash(adapter.w_out(model, where.layer)) for where in factors},
            request=request,
            config=dataclasses.asdict(method),
            provenance=provenance(model, encoder.prepends_bos) | found,
        )
        return dataclasses.replace(edit, health=_health(model, encoder, edit))


def select(
    attributions: Sequence[Float[Tensor, "layer d_mlp"]], threshold: float, p: float
) -> list[tuple[int, int]]:
    """(layer, neuron) above threshold · max of its own prompt in more than p · n of n prompts."""
    counts = sum((one > threshold * one.max()).int() for one in attributions)
    return [(layer, i) for layer, i in (counts > p * len(attributions)).nonzero().tolist()]


def _truth(request: EditRequest) -> str:
    if not (request.target_true or "").strip():
        raise ValueError(
            "KN attributes the fact that is there now; give the request a target_true, for "
            f"instance {request.text!r} -> target_true='...'"
        )
    return request.target_true


def _tokens(encoder: Encoder, request: EditRequest, target: str, add_space: bool) -> list[int]:
    """A target's tokens by themselves, as released, or as they stand after the prompt."""
    if not add_space:
        return encoder.ids(target.strip())
    row = encoder.row(request.text, target=target.strip())
    return [row.ids[position] for position in row.target]


@torch.no_grad()
def _greedy(model: Any, ids: Sequence[int]) -> int:
    """The most probable next token."""
    row, last = torch.tensor([list(ids)]), torch.tensor([len(ids) - 1])
    return passes.logits_at(model, row, torch.tensor([0]), last)[0].argmax().item()


# ---------------------------------------------------------------- the edit


def _indicators(
    model: Any, neurons: Sequence[tuple[int, int]]
) -> dict[int, Float[Tensor, "d_mlp 1"]]:
    """For each layer that has any, 1 at its neurons."""
    found: dict[int, Tensor] = {}
    for layer, i in neurons:
        if layer not in found:
            found[layer] = torch.zeros(len(adapter.w_out(model, layer)), 1)
        found[layer][i] = 1.0
    return found


def _health(model: Any, encoder: Encoder, edit: FactoredEdit) -> EditHealth:
    """What it did to the prompt, and what looks wrong."""
    health = measured(model, encoder, edit)
    widths = [len(adapter.w_out(model, layer)) for layer in range(model.cfg.n_layers)]
    neurons, total = len(edit.provenance["neurons"]), sum(widths)
    warnings = [*health.warnings]
    if not neurons:
        warnings.append(
            "no neuron was found, so nothing changes: none raises the ground truth's probability, "
            "or the prompts do not agree; try add_space=True, a smaller p or fewer prompts"
        )
    elif neurons > MANY * total:
        warnings.append(
            f"{neurons} of {total} neurons are rewritten, which may damage other facts; raise "
            "threshold, or give prompts that express the same fact"
        )
    if health.p_after < health.p_before:
        warnings.append(
            f"the target's probability fell from {health.p_before:.3g} to {health.p_after:.3g}"
        )
    return dataclasses.replace(health, warnings=tuple(warnings))


register_method("kn", KnowledgeNeurons)
