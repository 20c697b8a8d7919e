"""Partial passes give what whole passes give: logits and gradients, on every shape."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from conftest import CLASSES, make_model, once_a_class
from helpers import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_lens_rome.model import adapter, partial_forward, passes
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change, Noise
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Encoder

ZOO = [
    (name, shape)
    for name in CLASSES
    for shape in (*tiny_models.SHAPES, *tiny_models.MOE_SHAPES)
    if name == "bridge" or shape in tiny_models.hooked_shapes()
]


def random_rows(lengths, *, seed=0, d_vocab=200):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, d_vocab, (n,), generator=generator).tolist() for n in lengths]


def scored(rows, starts):
    """Every place that a change at the starts can reach."""
    places = [(i, p) for i, ids in enumerate(rows) for p in range(starts[i], len(ids))]
    return torch.tensor(places).T


def outcome(model, point, rows, starts, **options):
    """Logits at all reachable places, with a change at the starts, and the gradient by it."""
    generator = torch.Generator().manual_seed(1)
    where, at = scored(rows, starts)
    with adapter.gradients_for(model):
        delta = torch.randn(len(rows), model.cfg.d_model, generator=generator).requires_grad_()
        change = Change(
            point,
            torch.arange(len(rows)),
            torch.tensor(starts),
            lambda old: old + delta.to(old),
        )
        forward = PartialForward(model, point.layer, rows, starts, **options)
        logits = forward.logits([change], where, at)
        towards = torch.randn(logits.shape, generator=generator)
        (gradient,) = torch.autograd.grad((logits.float() * towards).sum(), delta)
    return logits.detach().float(), gradient


def assert_same(model, point, rows, starts, *, tolerance=2e-5):
    """Relative to the largest entry; float32 gives 3e-6 on these models."""
    part = outcome(model, point, rows, starts, cut=True)
    whole = outcome(model, point, rows, starts, cut=False)
    for mine, theirs in zip(part, whole, strict=True):
        assert torch.isfinite(theirs).all() and theirs.abs().max() > 0.1
        assert (mine - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_every_shape_layer_and_start(name, shape, tokenizer):
    model = make_model(name, shape, tokenizer)
    kind = "resid_post" if shape in tiny_models.MOE_SHAPES else "value"
    ragged = random_rows((12, 9, 15, 3))
    for layer in range(model.cfg.n_layers):
        assert_same(model, Point(kind, layer), ragged, (7, 2, 11, 0))
    first, last = [0] * 4, [len(ids) - 1 for ids in ragged]
    assert_same(model, Point(kind, 1), ragged, first)
    assert_same(model, Point("resid_post", 0), ragged, last)
    assert_same(model, Point(kind, 1), ragged[2:3], [11])
    assert PartialForward(model, 0, ragged, last).recording is not None


@pytest.mark.parametrize("shape", ("gpt2", "gptj", "llama", "gemma2", "gemma3"))
def test_processed_weights(model_class, shape, tokenizer):
    model = make_model(model_class, shape, tokenizer, processed=True)
    assert_same(model, Point("value", 1), random_rows((12, 9, 15, 3)), (7, 2, 11, 0))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ("gpt2", "llama", "gemma3", "neox"))
def test_half_precision(model_class, shape, dtype, tokenizer):
    """Rounding differs with the order of the sums, so by a few units of the last place."""
    model = make_model(model_class, shape, tokenizer).to(dtype)
    rows, starts = random_rows((12, 9, 15, 3)), (7, 2, 11, 0)
    assert_same(model, Point("value", 1), rows, starts, tolerance=16 * torch.finfo(dtype).eps)
    assert PartialForward(model, 1, rows, starts).recording is not None


@settings(max_examples=25, deadline=None)
@given(
    places=st.lists(
        st.integers(1, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
        min_size=1,
        max_size=30,
    ),
    layer=st.integers(0, 2),
)
@pytest.mark.parametrize("shape", ("gpt2", "gemma3"))
def test_any_rows(zoo_of_two, shape, places, layer):
    lengths, starts = zip(*places, strict=True)
    for model in zoo_of_two[shape]:
        assert_same(model, Point("value", layer), random_rows(lengths), starts)


@pytest.fixture(scope="module")
def zoo_of_two(tokenizer):
    return {s: [make_model(name, s, tokenizer) for name in CLASSES] for s in ("gpt2", "gemma3")}


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("shape", ("gpt2", "opt", "llama", "gemma3"))
def test_agrees_with_the_models_own_passes_padded_on_either_side(
    model_class, shape, side, tokenizer
):
    model, rows = make_model(model_class, shape, tokenizer), random_rows((12, 9, 15, 3))
    width = max(map(len, rows))

    def padded(ids, filler):
        gap = [filler] * (width - len(ids))
        return gap + ids if side == "left" else ids + gap

    mask = torch.tensor([padded([1] * len(ids), 0) for ids in rows])
    if side == "right":  # window and position rules count slots; what is ahead is never seen
        mask = torch.ones_like(mask)
    own = model(torch.tensor([padded(ids, 5) for ids in rows]), attention_mask=mask)
    ends = [width - 1 if side == "left" else len(ids) - 1 for ids in rows]
    last = torch.tensor([len(ids) - 1 for ids in rows])
    forward = PartialForward(model, 0, rows, (7, 2, 11, 0), cut=True)
    mine = forward.logits([], torch.arange(4), last)
    torch.testing.assert_close(mine, own[torch.arange(4), ends], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- noise, and variants at once


def corrupted(rows, starts, d_model, *, replace):
    """Noise on two tokens of each row, before and after its start where there is room."""
    generator = torch.Generator().manual_seed(2)
    places = {(i, p) for i, ids in enumerate(rows) for p in (starts[i] // 2, len(ids) - 1)}
    where, at = torch.tensor(sorted(places)).T
    return Noise(where, at, torch.randn(len(where), d_model, generator=generator), replace)


def trials(model, rows, starts):
    """Sets of changes that begin at different layers, out of order, one of them empty."""
    every, first = torch.arange(len(rows)), torch.tensor(starts)
    last = torch.tensor([len(ids) - 1 for ids in rows])
    n = model.cfg.n_layers
    return [
        [Change(Point("mlp_out", n - 1), every, first, lambda old: 3 * old)],
        [Change(Point("resid_post", 0), every, first, lambda old: old.roll(1, -1))],
        [],
        [Change(Point("attn_out", layer), every, last, torch.zeros_like) for layer in (1, 2)],
        [Change(Point("resid_pre", 1), every[:1], first[:1], lambda old: -old)],
    ]


@pytest.mark.parametrize(("name", "shape"), ZOO)
def test_variants_under_noise(name, shape, tokenizer):
    """Noise is added in every other shape, and replaces in the others."""
    replace = bool(ZOO.index((name, shape)) % 2)
    model = make_model(name, shape, tokenizer)
    for lengths, starts in (
        ((12, 9, 15, 4), (7, 2, 11, 0)),
        ((10, 10, 10), (7, 7, 7)),
        ((9,), (4,)),
    ):
        rows = random_rows(lengths)
        noise = corrupted(rows, starts, model.cfg.d_model, replace=replace)
        where, at = scored(rows, starts)
        sets = trials(model, rows, starts)
        part, whole, quiet = (
            PartialForward(model, 0, rows, starts, noise=some, cut=cut).variants(sets, where, at)
            for some, cut in ((noise, True), (noise, False), (None, False))
        )
        assert part.shape == whole.shape == (5, len(where), model.cfg.d_vocab)
        assert (part - whole).abs().max() < 2e-5 * whole.abs().max()
        assert ((whole - quiet).abs().amax((1, 2)) > 0.1).all()
        others = [i for i in range(5) if i != 2]
        assert ((whole[others] - whole[2]).abs().amax((1, 2)) > 1e-2).all()


@pytest.mark.parametrize(("name", "shape"), [pair for pair in ZOO if pair[1] != "bloom"])
def test_variants_run_as_one_batch(name, shape, tokenizer):
    """In each block once; BLOOM's bias has an entry a head as well as a row."""
    model = make_model(name, shape, tokenizer)
    rows, starts = random_rows((8, 8)), (5, 5)
    forward = PartialForward(model, 0, rows, starts, cut=True)
    forward.variants(trials(model, rows, starts), *scored(rows, starts))
    sizes = []
    handles = [
        block.register_forward_hook(lambda m, a, out: sizes.append(len(_first(out))))
        for block in model.blocks
    ]
    forward.variants(trials(model, rows, starts), *scored(rows, starts))
    for handle in handles:
        handle.remove()
    assert sizes == [4, 8, 10]  # of two rows: two variants, then two more, then the last


# ---------------------------------------------------------------- what it does not do


def test_only_what_can_change_is_run(model_class, tokenizer):
    """Later tokens, layers from the first one on, scored places; no gradient from below."""
    model = make_model(model_class, "llama", tokenizer)
    rows, starts = random_rows((12, 9, 15, 4)), (8, 6, 11, 1)
    forward = PartialForward(model, 1, rows, starts, cut=True)
    ran, unembedded = [], []
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: ran.append((i, _first(out).shape)))
        for i, block in enumerate(model.blocks)
    ]
    handles.append(model.ln_final.register_forward_hook(lambda m, a, o: unembedded.append(o.shape)))
    logits = forward.logits([], torch.tensor([0, 2]), torch.tensor([11, 12]))
    for handle in handles:
        handle.remove()
    assert [(i, tuple(shape)) for i, shape in ran] == [(1, (4, 4, 32)), (2, (4, 4, 32))]
    assert [tuple(shape[:-1]) for shape in unembedded] == [(2, 1)] and len(logits) == 2
    assert not any(call.residual.requires_grad for call in forward.recording.calls)


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def test_running_twice_gives_the_same(gemma3):
    rows, starts = random_rows((12, 9, 15)), (7, 2, 11)
    where, at = scored(rows, starts)
    forward = PartialForward(gemma3, 1, rows, starts, cut=True)
    turned = Change(Point("value", 1), torch.arange(3), torch.tensor(starts), lambda old: -old)
    first = forward.logits([turned], where, at)
    between = forward.logits([], where, at)
    assert torch.equal(first, forward.logits([turned], where, at))
    assert not torch.allclose(first, between, atol=1e-2)


def test_an_exception_inside_leaves_no_hook(gpt2):
    def fail(old):
        raise ZeroDivisionError

    forward = PartialForward(gpt2, 1, random_rows((6, 4)), (3, 2), cut=True)
    where, at = torch.tensor([0]), torch.tensor([5])
    before = forward.logits([], where, at)
    with pytest.raises(ZeroDivisionError):
        forward.logits([Change(Point("value", 1), where, torch.tensor([3]), fail)], where, at)
    assert torch.equal(forward.logits([], where, at), before)


def test_what_transformers_says_to_transformer_lens_is_not_shown(gpt2):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 5.24 warns of the cache's old name
        outcome(gpt2, Point("value", 1), random_rows((12, 9)), (7, 2), cut=True)


@pytest.mark.parametrize("starts", ((0, 4), (-1, 0), (3, 9)))
def test_a_start_outside_its_row_is_refused(gpt2, starts):
    with pytest.raises(ValueError, match="position of its row"):
        PartialForward(gpt2, 0, random_rows((4, 4)), starts)


# ---------------------------------------------------------------- whole passes instead


def _breaks(*_args, **_options):
    raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")


def _wrong(model, tokens, mask, real=passes.keys_and_values):
    return real(model, (tokens + 1) % 200, mask)


@pytest.mark.parametrize(("fault", "words"), ((_breaks, "past_key_values"), (_wrong, "differ")))
def test_a_model_that_cannot_be_cut_runs_whole(gpt2, monkeypatch, caplog, fault, words):
    rows, starts = random_rows((12, 9)), (7, 2)
    whole = outcome(gpt2, Point("value", 1), rows, starts, cut=False)
    monkeypatch.setattr(passes, "keys_and_values", fault)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = outcome(gpt2, Point("value", 1), rows, starts)
    assert all(map(torch.equal, found, whole))
    (record,) = caplog.records  # tried and said once
    assert words in record.message and "whole passes" in record.message


def test_a_users_hook_counts_positions_from_the_rows_first_token(gpt2):
    """So passes are whole while it is there, and partial again when it is gone."""

    def ablate(state, hook):
        state = state.clone()
        state[:, 3] = 0
        return state

    rows, starts = random_rows((12, 9)), (7, 2)
    with gpt2.hooks(fwd_hooks=[("blocks.0.hook_resid_post", ablate)]):
        found = outcome(gpt2, Point("value", 1), rows, starts)
        whole = outcome(gpt2, Point("value", 1), rows, starts, cut=False)
        blind = outcome(gpt2, Point("value", 1), rows, starts, cut=True)
    assert all(map(torch.equal, found, whole))
    assert not torch.allclose(blind[0], whole[0], atol=1e-2)
    assert PartialForward(gpt2, 1, rows, starts).recording is not None


def test_hooks_on_plain_modules_count_positions_too(gpt2):
    rows, starts = random_rows((12, 9)), (7, 2)
    handle = gpt2.blocks[0].register_forward_hook(lambda module, args, output: None)
    assert PartialForward(gpt2, 1, rows, starts).recording is None
    handle.remove()
    assert PartialForward(gpt2, 1, rows, starts).recording is not None
    if hasattr(gpt2, "add_perma_hook") and type(gpt2).__name__ == "HookedTransformer":
        gpt2.add_perma_hook("blocks.0.hook_resid_post", lambda state, hook: state)
        assert PartialForward(gpt2, 1, rows, starts).recording is None


def test_rows_that_do_not_fit_when_aligned_run_whole(gpt2, caplog):
    rows, starts = random_rows((100, 100)), (99, 0)
    with caplog.at_level(logging.INFO, logger=partial_forward.__name__):
        assert PartialForward(gpt2, 1, rows, starts).recording is None
    assert "context" in caplog.text
    assert PartialForward(gpt2, 1, rows, (50, 40)).recording is not None
    with pytest.raises(ValueError, match="longer than the model's context"):
        PartialForward(gpt2, 1, random_rows((130,)), (99,)).logits(
            [], torch.tensor([0]), torch.tensor([129])
        )


# ---------------------------------------------------------------- Gemma-3-270M

FACT = ("The mother tongue of {} is", "Danielle Darrieux")
TEXTS = ("", "He said.", "A few days ago, I was reading about.")


@once_a_class
@pytest.mark.real_model
@pytest.mark.parametrize("layer", (0, 5, 17))
def test_gemma_logits_and_gradients(gemma, layer):
    encoder = Encoder.of(gemma)
    made = [encoder.templated_row(*FACT, text) for text in TEXTS]
    rows, starts = [row.ids for row in made], [row.subject[-1] for row in made]
    assert_same(gemma, Point("value", layer), rows, starts, tolerance=1e-4)
    if layer == 5:
        assert_same(gemma, Point("resid_post", layer), rows, [0, 3, 1], tolerance=1e-4)
