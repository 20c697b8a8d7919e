"""Small edits and statistics that several test files share."""

import dataclasses

import torch

from transformer_lens_rome import (
    DenseEdit,
    EditRequest,
    RankOneEdit,
    RomeConfig,
    SecondMoment,
    compute_rome_edit,
)
from transformer_lens_rome.edits.kinds import FactoredEdit
from transformer_lens_rome.model.adapter import parameter, w_out, weight_hash
from transformer_lens_rome.model.keys import read_keys_and_values
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.torch_states import torch_defaults

LAYER = 1
REQUEST = EditRequest("{} is in", "The Space Needle", "Paris", "Seattle")
"""Short: in a windowed model of three layers the subject is soon out of the target's sight."""
NEAR = EditRequest("{}", "The Space Needle", "Paris")
"""The target right after the subject: even a tiny random model can be made to say it."""
PREFIXES = ("", "The old man said.", "In the best of times.")
CONFIG = RomeConfig(steps=4, lr=0.2, clamp=4.0)


@torch_defaults()
def random_moment(d_mlp: int, *, seed: int = 0) -> SecondMoment:
    """C from 1000 random keys, float64, with a condition number near 200 and no special axes."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1000, d_mlp, generator=generator, dtype=torch.float64)
    square = torch.randn(d_mlp, d_mlp, generator=generator, dtype=torch.float64)
    keys = keys * torch.logspace(-0.5, 0.5, d_mlp, dtype=torch.float64) @ torch.linalg.qr(square).Q
    return SecondMoment.from_moment(keys.T @ keys / 1000, 1000)


def keys_and_values(model, rows):
    """Keys and values at the last subject token of some rows."""
    ids, lookup = [row.ids for row in rows], [row.subject[-1] for row in rows]
    return read_keys_and_values(PartialForward(model, LAYER, ids, lookup), LAYER)


def small_edit(model, request=REQUEST, **options):
    """`compute_rome_edit` with few steps, three prefixes, and random statistics."""
    moment = random_moment(len(w_out(model, LAYER)))
    known = {"layer": LAYER, "second_moment": moment, "prefixes": PREFIXES, "config": CONFIG}
    return compute_rome_edit(model, request, **(known | {"progress": False} | options))


def random_edit(model, *, layer=LAYER, seed=0, rank=1, strength=0.1, bias=False):
    """Random factors of a size that no float can ignore, made on the model as it is now."""
    weight = w_out(model, layer)
    generator = torch.Generator().manual_seed(1000 + seed)
    d_mlp, d_model = weight.shape

    def draw(*size):
        return strength * torch.randn(*size, generator=generator)

    known = {"layer": layer, "request": REQUEST, "model_hash": weight_hash(weight)}
    if rank > 1:
        factors = {"left": draw(d_mlp, rank), "right": draw(rank, d_model)}
        return DenseEdit(**factors, bias=draw(d_model) if bias else None, **known)
    k_star, u, lam = draw(d_mlp), draw(d_mlp), draw(d_model)
    v_star = k_star @ (weight.detach().float() + torch.outer(u, lam))
    return RankOneEdit(k_star=k_star, u=u, lam=lam, v_star=v_star, **known)


def factored_edit(model, places, *, seed=0, rank=2, strength=0.1):
    """Random factors for some matrices of the MLP, made on the model as it is now."""
    generator, factors = torch.Generator().manual_seed(2000 + seed), {}
    hashes = {where: weight_hash(parameter(model, where)) for where in places}
    for where in places:
        d_in, d_out = parameter(model, where).shape
        left = strength * torch.randn(d_in, rank, generator=generator)
        factors[where] = left, torch.randn(rank, d_out, generator=generator)
    return FactoredEdit.of(factors, hashes, request=REQUEST)


def without_tensors(edit):
    """Every field of an edit that is not a tensor."""
    return {
        f.name: getattr(edit, f.name)
        for f in dataclasses.fields(edit)
        if f.name not in edit.tensors()
    }
