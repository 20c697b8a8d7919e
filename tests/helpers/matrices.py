"""The matrices of a tiny model's MLPs, by name and layer."""

import torch
from helpers.rome_setting import LAYER

from transformer_lens_rome.model.adapter import WEIGHTS, Weight, parameter

FOUR = [Weight("W_out", 2), Weight("W_in", 0), Weight("W_out", 0), Weight("W_in", 2)]


def matrices(model, layers=(0, LAYER, 2)):
    every = [Weight(name, layer) for layer in layers for name in ("W_in", "W_gate", "W_out")]
    return [where for where in every if parameter(model, where) is not None]


def weights(model):
    every = [Weight(name, layer) for layer in range(3) for name in WEIGHTS]
    found = {where: parameter(model, where) for where in every}
    return {where: w.detach().clone() for where, w in found.items() if w is not None}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[w], right[w]) for w in left)
