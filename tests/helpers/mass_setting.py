"""A small setting for edits of many facts, that several test files share."""

from helpers.rome_setting import random_moment

from transformer_lens_rome import EditRequest, compute_memit_edit
from transformer_lens_rome.methods import Memit, MemitConfig
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.model.default_layer import norm_follows_mlp

FACTS = [
    EditRequest("{} is in", "The Space Needle", "Paris", "Seattle"),
    EditRequest("The mother of {} was", "the old king", "Rome"),
    EditRequest("{}", "A river in the north", "Oslo"),
    EditRequest("In the city, {} likes", "Ida", "tea"),
]
TEXTS = ("", "The old man said.", "In the best of times.")
SHORT = MemitConfig(steps=4, lr=0.2)


def options(model, layers=None, **changed):
    """Layers, statistics, prefixes and few steps."""
    if layers is None:
        layers = (1,) if norm_follows_mlp(model, 1) else (0, 1)
    moments = {n: random_moment(len(w_out(model, n)), seed=n) for n in layers}
    known = {"layers": layers, "second_moments": moments, "prefixes": TEXTS, "config": SHORT}
    return known | changed


def method(model, **changed):
    """`Memit` with these options."""
    return Memit(**options(model, **changed))


def many_edit(model, facts=FACTS, **changed):
    """`compute_memit_edit` with these options."""
    return compute_memit_edit(model, facts, **options(model, **changed), progress=False)
