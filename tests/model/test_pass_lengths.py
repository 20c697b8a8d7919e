"""A text has the same numbers whatever shares its pass: where length decides, texts run apart.

LongRoPE rotates all tokens of a pass by the length of its longest text. Sliding windows and
attention in chunks go by distances and positions, which a batch does not change.
"""

import pytest
import torch
from conftest import CLASSES, make_model
from helpers import tiny_models
from helpers.rome_setting import LAYER, small_edit

from transformer_lens_rome import causal_trace, collect_second_moment, target_log_probs
from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import Point, rotation_limit
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.continuations import GrowingText
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_tokens

LIMIT = 16
SHORT, LONG = "Rome is", "The Space Needle is located in the city of Seattle, as everyone knows."
SHAPES = ["gpt2", "llama", "mistral", "gemma2", "gemma3", "phi3", "bloom"]


@pytest.fixture
def longrope(monkeypatch, tokenizer):
    """A bridge of Phi-3 whose rotations change above 16 tokens."""
    if "bridge" not in CLASSES:
        pytest.skip("no HookedTransformer knows LongRoPE")
    kind, fields = tiny_models._HF["phi3"]
    half = tiny_models.D_MODEL // tiny_models.N_HEADS // 2
    rope = {
        "type": "longrope",
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0] * half,
        "long_factor": [8.0] * half,
    }
    own = {"rope_scaling": rope, "original_max_position_embeddings": LIMIT}
    monkeypatch.setitem(tiny_models._HF, "phi3", (kind, fields | own))
    model = make_model("bridge", "phi3", tokenizer)
    assert rotation_limit(model) == LIMIT
    return model


def plain(model, ids, n):
    """Log-probabilities of the last n tokens of a text, from one pass of it alone."""
    logits = model(torch.tensor([ids[:-1]]), return_type="logits", use_cache=False)[0]
    return logits.log_softmax(-1)[-n:].gather(1, torch.tensor(ids[-n:])[:, None])[:, 0]


def test_the_limit_is_one(longrope):
    """The control: the same tokens have other logits as the start of a text above the limit."""
    ids = Encoder.of(longrope).ids(LONG)
    assert len(ids) > LIMIT
    inside, whole = (
        longrope(torch.tensor([some]), return_type="logits", use_cache=False)[0, 7]
        for some in (ids[:8], ids)
    )
    assert (inside - whole).abs().max() > 0.1


def test_short_and_long_texts_are_scored_apart(longrope):
    encoder = Encoder.of(longrope)
    prompts, targets = [SHORT, LONG, "Paris", LONG + " It is"], ["old", "Rome", "is", "old"]
    together = target_log_probs(longrope, prompts, targets)
    for prompt, target, found in zip(prompts, targets, together, strict=True):
        row = encoder.row(prompt, target=target)
        assert torch.allclose(found, plain(longrope, row.ids, len(row.target)), atol=1e-5)
        (alone,) = target_log_probs(longrope, [prompt], [target])
        assert torch.allclose(found, alone, atol=1e-5)


def test_statistics_do_not_depend_on_what_shares_a_batch(longrope):
    texts = [SHORT, LONG, "Paris is the capital of France.", LONG[::-1]] * 5
    one, many = (
        collect_second_moment(longrope, texts, LAYER, batch_size=n, max_tokens=300, progress=False)
        for n in (1, 20)
    )
    assert torch.allclose(one.C, many.C, atol=1e-5)


def test_text_that_grows_over_the_limit_follows_from_whole_passes(longrope):
    tokens = sample_tokens(longrope, 3, LIMIT + 8, top_k=1)
    special = Encoder.of(longrope).tokenizer.all_special_ids
    for n in range(1, tokens.shape[1]):
        logits = longrope(tokens[:, :n], return_type="logits", use_cache=False)[:, -1]
        logits[:, special] = -torch.inf
        assert torch.equal(logits.argmax(-1), tokens[:, n])


@pytest.mark.slow
def test_above_the_limit_a_trace_is_made_of_whole_passes(longrope):
    trace = causal_trace(longrope, LONG, "The Space Needle", n_samples=2, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformer_lens_rome.model.partial_forward._rows_can_be_cut", lambda *_: False
        )
        whole = causal_trace(longrope, LONG, "The Space Needle", n_samples=2, progress=False)
    assert len(trace.tokens) > LIMIT
    assert torch.allclose(trace.samples, whole.samples, atol=1e-6)


def test_rows_on_both_sides_of_the_limit_are_refused(longrope):
    with pytest.raises(ValueError, match=r"longer than 16 tokens.*LongRoPE"):
        small_edit(longrope, prefixes=("", LONG))
    small_edit(longrope, prefixes=("", "Yes."))


def test_a_text_longer_than_the_context_is_not_written(gpt2):
    with pytest.raises(ValueError, match="context of 128"):
        sample_tokens(gpt2, 1, 130)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_with_longer_texts_changes_no_number(model_class, shape, tokenizer):
    if model_class == "hooked" and shape not in tiny_models.hooked_shapes():
        pytest.skip("no such HookedTransformer here")
    model = make_model(model_class, shape, tokenizer)
    prompts = [SHORT, LONG, LONG + " " + LONG, "Paris"]
    together = target_log_probs(model, prompts, ["old"] * 4)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = target_log_probs(model, [prompt], ["old"])
        assert torch.allclose(found, alone, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_text_beyond_a_window_is_that_of_whole_passes(model_class, shape, tokenizer):
    """Windows are 6 tokens; a trial is nine tokens long, and this text is 40."""
    if model_class == "hooked" and shape not in tiny_models.hooked_shapes():
        pytest.skip("no such HookedTransformer here")
    model = make_model(model_class, shape, tokenizer)
    tokens = (7 * torch.arange(80).unflatten(0, (2, 40)) + 1) % model.cfg.d_vocab
    text = GrowingText(model)
    for new in tokens.split((11, 13, 1, 1, 14), dim=1):
        found = text.logits_after(new)
    last = torch.full((2,), 39)
    whole = passes.logits_at(model, tokens, torch.arange(2), last)
    assert (found - whole).abs().max() < 1e-3 * whole.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_cut_passes_beyond_a_window_are_whole_ones(model_class, shape, tokenizer):
    if model_class == "hooked" and shape not in tiny_models.hooked_shapes():
        pytest.skip("no such HookedTransformer here")
    model = make_model(model_class, shape, tokenizer)
    rows = [[(7 * i + j) % model.cfg.d_vocab for i in range(n)] for j, n in enumerate((40, 25, 12))]
    starts, last = (30, 9, 0), torch.tensor([39, 24, 11])
    part, whole = (
        PartialForward(model, 1, rows, starts, cut=cut).logits([], torch.arange(3), last)
        for cut in (None, False)
    )
    assert (part - whole).abs().max() < 1e-3 * whole.abs().max()
    read = [
        PartialForward(model, 1, rows, starts, cut=cut).read([Point("key", 2)])[0]
        for cut in (None, False)
    ]
    assert torch.allclose(*read, atol=1e-4)
