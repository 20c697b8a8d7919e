"""Text that a model writes itself: reproducible, drawn from its own distribution, safe to use."""

import logging

import pytest
import torch
from conftest import make_model

from transformer_lens_rome.model import passes
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.prompts import sampling
from transformer_lens_rome.prompts.continuations import (
    greedy_continuations,
    sample_continuations,
)
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import (
    PREFIX_LENGTHS,
    sample_prefixes,
    sample_tokens,
    sampled_texts,
)

SHAPES = ["gpt2", "neox", "gemma3", "mistral"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def full_logits(model, tokens):
    return model(tokens, attention_mask=torch.ones_like(tokens)).float()


@pytest.fixture(params=SHAPES)
def model(request, model_class, tokenizer, bos_tokenizer):
    bos = request.param in ("gemma3", "mistral")
    return make_model(model_class, request.param, bos_tokenizer if bos else tokenizer)


def test_the_seed_alone_decides(model):
    torch_state = torch.random.get_rng_state()
    first = sample_tokens(model, 4, 12, generator=seeded(5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        torch.rand(7)
        again = sample_tokens(model, 4, 12, generator=seeded(5))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert not torch.equal(first, sample_tokens(model, 4, 12, generator=seeded(6)))
    none, zero = sample_tokens(model, 4, 12), sample_tokens(model, 4, 12, generator=seeded(0))
    assert torch.equal(none, zero)
    assert len({tuple(row) for row in first.tolist()}) == 4  # rows are drawn apart


@pytest.mark.parametrize("k", [1, 5])
def test_every_token_is_among_the_k_most_probable(model, k):
    """Cached steps agree with one full forward pass, in windows and out of them."""
    special = Encoder.of(model).tokenizer.all_special_ids
    tokens = sample_tokens(model, 6, 20, top_k=k, generator=seeded(1))
    assert tokens.shape == (6, 20)
    logits = full_logits(model, tokens)[:, :-1]
    logits[..., special] = -torch.inf
    drawn = logits.gather(-1, tokens[:, 1:, None])
    ahead = (logits > drawn + 1e-4).sum(-1)
    assert (ahead < k).all()
    if k > 1:  # and it is a draw, not the best one each time
        assert (ahead > 0).any()
        free = sample_tokens(model, 6, 20, generator=seeded(1))
        logits = full_logits(model, free)[:, :-1]
        assert ((logits > logits.gather(-1, free[:, 1:, None])).sum(-1) >= k).any()


def test_draws_follow_the_model_at_temperature_one(gpt2):
    special = Encoder.of(gpt2).tokenizer.all_special_ids
    tokens = sample_tokens(gpt2, 4000, 2, generator=seeded(3))
    logits = full_logits(gpt2, tokens[:1, :1])[0, 0]
    logits[special] = -torch.inf
    expected = logits.softmax(-1)
    found = torch.bincount(tokens[:, 1], minlength=len(expected)) / len(tokens)
    distance = (found - expected).abs().sum() / 2
    assert distance < 0.15  # 440 outcomes, 4,000 draws: about 0.1 by chance
    for other in ((2 * logits).softmax(-1), (0.5 * logits).softmax(-1)):
        assert distance < (found - other).abs().sum() / 2 - 0.05


def test_special_tokens_start_a_text_and_never_come_again(model):
    encoder = Encoder.of(model)
    for options in ({}, {"top_k": 3}):
        tokens = sample_tokens(model, 40, 15, generator=seeded(2), **options)
        assert (tokens[:, 0] == encoder.start_id).all()
        assert not torch.isin(tokens[:, 1:], torch.tensor(encoder.tokenizer.all_special_ids)).any()


def test_prefixes_can_stand_before_a_template(model):
    prefixes = sample_prefixes(model, seed=4)
    assert prefixes[0] == "" and "" not in prefixes[1:]
    # a tiny model writes bytes that are no text, too; those are left out
    assert 8 < len(prefixes) <= 1 + sum(n for _, n in PREFIX_LENGTHS) == 21
    for prefix in prefixes[1:]:
        assert prefix.endswith(".")
        assert not set(prefix) & set("{}\n\r\t")
        assert prefix == prefix.strip()
    assert prefixes == sample_prefixes(model, seed=4) != sample_prefixes(model, seed=5)


def test_prefixes_have_the_lengths_asked_for(gpt2):
    """A length counts the start token, as in the released code; the full stop is put after it."""
    encoder = Encoder.of(gpt2)
    generator = seeded(7)
    short = sample_tokens(gpt2, 3, 4, top_k=5, generator=generator)
    long = sample_tokens(gpt2, 2, 9, top_k=5, generator=generator)
    found = sample_prefixes(gpt2, ((4, 3), (9, 2)), seed=7)
    texts = [encoder.tokenizer.decode(tokens[1:]) for tokens in [*short, *long]]
    wanted = [_letters(text) for text in texts]
    assert [_letters(prefix) for prefix in found[1:] if _letters(prefix)] == list(
        filter(None, wanted)
    )
    assert sum(map(bool, wanted)) >= 3


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isalnum())


@pytest.mark.parametrize("n", [1, 5, 8])
def test_sampled_texts_are_as_many_as_asked_for(gpt2, n):
    texts = sampled_texts(gpt2, n, length=10, batch_size=4, progress=False)
    assert len(texts) == n and len(set(texts)) == n
    assert texts == sampled_texts(gpt2, n, length=10, batch_size=4, progress=False)
    assert texts != sampled_texts(gpt2, n, length=10, batch_size=4, seed=1, progress=False)
    assert not any(token in text for text in texts for token in gpt2.tokenizer.all_special_tokens)


def test_greedy_continuations_take_the_most_probable_tokens(model):
    """Each row goes its own way, whatever stands beside it."""
    encoder, prompts = Encoder.of(model), ["A", "The old man and the sea were", "The old man"]
    together = greedy_continuations(model, prompts, 6)
    assert len(set(together)) == 3
    for prompt, found in zip(prompts, together, strict=True):
        ids = list(encoder.row(prompt).ids)
        for _ in range(6):
            ids.append(int(full_logits(model, torch.tensor([ids]))[0, -1].argmax()))
        assert found == encoder.tokenizer.decode(ids[-6:], skip_special_tokens=True)


def test_sampling_leaves_the_model_as_it_was(model):
    tokens = torch.arange(3, 12)[None]
    before = full_logits(model, tokens)
    sample_prefixes(model)
    assert torch.equal(full_logits(model, tokens), before)
    assert not model.training


# ---------------------------------------------------------------- without a cache


def written(model):
    """What each of the functions writes."""
    tokens = sample_tokens(model, 4, 12, generator=seeded(5))
    prompts = ["The old man", "The old man and the sea were"]
    return (
        tokens.tolist(),
        sample_continuations(model, prompts, 20),
        greedy_continuations(model, ["A", *prompts]),
    )


def _forgets(model, new, cache, real=passes.next_logits):
    """Each piece is taken for a text of its own, as where nothing tells blocks of the cache."""
    return real(model, new, None)[0], None


def _breaks(*_):
    raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")


@pytest.mark.parametrize(("fault", "words"), ((_forgets, "differ"), (_breaks, "past_key_values")))
def test_where_caches_do_not_hold_texts_are_the_same(model, monkeypatch, caplog, fault, words):
    expected = written(model)
    trials = model.__dict__.pop("_rome_trials")
    assert trials["text is written by whole passes"]
    monkeypatch.setattr(passes, "next_logits", fault)
    with caplog.at_level(logging.WARNING):
        assert written(model) == expected
    (record,) = caplog.records  # tried and said once
    assert words in record.message and "whole passes" in record.message


def test_a_users_hook_sees_every_position_of_a_text(gpt2):
    def turn(state, hook):
        state = state.clone()
        state[:, 3:4] = -state[:, 3:4]  # of the text's fourth token, wherever a pass begins
        return state

    plain = sample_tokens(gpt2, 6, 20, top_k=1)
    with gpt2.hooks(fwd_hooks=[("blocks.0.hook_resid_post", turn)]):
        tokens = sample_tokens(gpt2, 6, 20, top_k=1)
        logits = full_logits(gpt2, tokens)[:, :-1]
    logits[..., Encoder.of(gpt2).tokenizer.all_special_ids] = -torch.inf
    assert torch.equal(logits.argmax(-1), tokens[:, 1:])
    assert not torch.equal(plain, tokens)
    assert torch.equal(plain, sample_tokens(gpt2, 6, 20, top_k=1))


def test_prefixes_are_sampled_once_for_a_model_as_it_is(gpt2, monkeypatch):
    calls = []
    made = sampling._sampled_prefixes
    monkeypatch.setattr(
        sampling, "_sampled_prefixes", lambda *args: calls.append(args) or made(*args)
    )
    first = sample_prefixes(gpt2)
    first.append("the caller's own")
    assert sample_prefixes(gpt2) == first[:-1] and len(calls) == 1
    assert sample_prefixes(gpt2, seed=1) != first[:-1] and len(calls) == 2
    assert sample_prefixes(gpt2, [(5, 2)], seed=1) != first[:-1] and len(calls) == 3
    first = sample_prefixes(gpt2)
    w_out(gpt2, 1).data[3] *= 4  # torch does not count this
    assert sample_prefixes(gpt2) != first and len(calls) == 5
    assert sample_prefixes(gpt2, encoder=Encoder.of(gpt2, prepend_bos=True)) and len(calls) == 6
