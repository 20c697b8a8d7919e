"""What the tests of KN share: a probability and its gradients by their definitions."""

from __future__ import annotations

import torch
from helpers import tiny_models
from helpers.rome_setting import REQUEST

from transformer_lens_rome.prompts.encoder import Encoder

SHAPES = ("gpt2", "gptj", "llama", "gemma3")
LAYERS = range(tiny_models.N_LAYERS)


def prompt_ids(model, text=REQUEST.text):
    return list(Encoder.of(model).row(text).ids)


def probability(model, ids, labels, name, layer, values):
    """P of the labels, their mean, in one whole pass with each row of values at the last token."""

    def put(activation, hook):
        activation = activation.clone()
        activation[:, -1] = values
        return activation

    tokens = torch.tensor([ids] * len(values))
    hooks = [(f"blocks.{layer}.mlp.hook_{name}", put)]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
    return logits.float().softmax(-1)[:, labels].mean(-1)


def clean(model, ids, name, layer):
    _, cache = model.run_with_cache(torch.tensor([ids]))
    return cache[f"blocks.{layer}.mlp.hook_{name}"][0, -1].detach()


def by_hand(model, ids, labels, name, steps=20, first=0.0):
    """The definition, in whole passes through the model."""
    found = []
    for layer in LAYERS:
        a = clean(model, ids, name, layer)
        path = [(first + (1 - first) * k / (steps - 1)) * a for k in range(steps)]
        w = torch.stack(path).requires_grad_()
        P = probability(model, ids, labels, name, layer, w)
        found.append(a * torch.autograd.grad(P.sum(), w)[0].sum(0) / steps)
    return torch.stack(found)


def assert_close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).norm() < tolerance * expected.norm()
