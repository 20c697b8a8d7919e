"""Causal tracing: its limits, a direct computation, the released code's numbers, bad input."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_model, once_a_class, shared_out
from helpers import tiny_models

from transformer_lens_rome import target_log_probs
from transformer_lens_rome.model import passes
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.causal_trace import causal_trace
from transformer_lens_rome.tracing.corruption import (
    Gaussian,
    Multivariate,
    StudentT,
    Uniform,
    embedding_moments,
    embeddings_of,
    subject_embedding_std,
)
from transformer_lens_rome.tracing.results import CausalTrace

PROMPT, SUBJECT = "In the city Space Needle is", "Space Needle"
KINDS = ("resid", "mlp", "attn")
HOOKS = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}


def trace(model, prompt=PROMPT, subject=SUBJECT, **options):
    known = {"n_samples": 3, "window": 2, "progress": False}
    if not {"noise", "other_subject"} & set(options):
        known["noise_std"] = 1.0
    return causal_trace(model, prompt, subject, **(known | options))


def words(found):
    """The top token of every run."""
    return [found.top_tokens[i] for i in found.top.flatten().tolist()]


@pytest.fixture(params=("gpt2", "gptj", "gemma3", "mixtral"))
def model(request, model_class, tokenizer, bos_tokenizer):
    known = bos_tokenizer if request.param == "gemma3" else tokenizer
    return make_model(model_class, request.param, known)


@torch.no_grad()
def direct(model, ids, found, noise, answer, kind, window):
    """Every cell by one whole pass with the model's own hooks."""
    n_layers, names = model.cfg.n_layers, [f"blocks.{i}.{HOOKS[kind]}" for i in range(99)]
    _, clean = model.run_with_cache(torch.tensor([ids]))
    subject = list(found.subject_positions)

    def corrupt(embedding, hook=None):
        embedding = embedding.clone()
        embedding[:, subject] += noise
        return embedding

    def p(restored, position):
        def restore(state, hook):
            state = state.clone()
            state[:, position] = clean[hook.name][0, position]
            return state

        hooks = [("hook_embed", corrupt), *((names[layer], restore) for layer in restored)]
        logits = model.run_with_hooks(torch.tensor([ids] * len(noise)), fwd_hooks=hooks)
        return logits[:, -1].softmax(-1)[:, answer], logits[:, -1].argmax(-1)

    cells = torch.zeros(len(noise), n_layers, len(ids))
    top = cells.long()
    for layer in range(n_layers):
        near = range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))
        for position in range(len(ids)):
            found = p([layer] if kind == "resid" else near, position)
            cells[:, layer, position], top[:, layer, position] = found
    return cells, p([], 0)[0], top


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_is_that_of_a_whole_pass(model, kind):
    ids = Encoder.of(model).row(PROMPT).ids
    span = len(Encoder.of(model).row(PROMPT, (12, 24)).subject)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, span, model.cfg.d_model, generator=generator)
    found = trace(model, kind=kind, noise=noise)
    logits = passes.logits_at(model, torch.tensor([ids]), *torch.tensor([[0], [len(ids) - 1]]))
    cells, base, top = direct(model, ids, found, noise, int(logits.argmax()), kind, 2)
    torch.testing.assert_close(found.samples, cells, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.corrupted_samples, base, rtol=1e-4, atol=1e-6)
    assert found.p_clean == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)
    assert found.samples.std(0).max() > 1e-4 and found.scores.std() > 1e-4
    decode = Encoder.of(model).tokenizer.decode
    assert words(found) == [decode([i]) for i in top.flatten().tolist()]


def test_the_top_tokens_of_a_cell_are_counted(gpt2):
    found = trace(gpt2)
    top = torch.tensor([1, 0, 1])[:, None, None].expand_as(found.samples)
    found = dataclasses.replace(found, top=top, top_tokens=(" Rome", " Paris"))
    assert found.top_at(0, 1) == [(" Paris", 2), (" Rome", 1)]
    assert set(found.to_dataframe()["top_token"]) == {" Paris"}
    unknown = dataclasses.replace(found, top=None)
    assert unknown.top_at(0, 1) == [] and set(unknown.to_dataframe()["top_token"]) == {None}
    for wrong in (top + 1, top - 1, top[:2]):
        with pytest.raises(ValueError, match="top tokens do not fit"):
            dataclasses.replace(found, top=wrong)


# ---------------------------------------------------------------- known limits


def test_zero_noise_gives_the_clean_probability_everywhere(model):
    for kind in KINDS:
        found = trace(model, kind=kind, noise_std=0.0)
        torch.testing.assert_close(
            found.samples, torch.full_like(found.samples, found.p_clean), rtol=1e-4, atol=1e-7
        )


def test_the_last_state_of_the_last_token_is_the_answer(model):
    found = trace(model)
    assert found.scores[-1, -1].item() == pytest.approx(found.p_clean, rel=1e-4)
    assert abs(found.total_effect) > 1e-4
    assert found.indirect_effect[-1, -1].item() == pytest.approx(found.total_effect, rel=1e-3)


def test_what_was_not_corrupted_is_restored_in_vain(model):
    found = trace(model)
    before = found.samples[:, :, : found.subject_positions[0]]
    assert before.shape[2] and (before == found.corrupted_samples[:, None, None]).all()


def test_a_window_wider_than_the_model_is_the_same_at_every_centre(model):
    """It restores all layers, wherever it is centred."""
    wide = trace(model, kind="mlp", window=100)
    assert wide.window == 100
    assert (wide.samples - wide.samples[:, :1]).abs().max() < 1e-6


# ---------------------------------------------------------------- answers and metrics


def test_an_answer_of_several_tokens_is_a_product(model):
    many = trace(model, answer="the best of times")
    single = trace(model, answer="the best of times", metric="log_probability")
    torch.testing.assert_close(many.samples, single.samples.exp(), rtol=1e-4, atol=1e-12)
    (log_p,) = target_log_probs(model, [PROMPT], ["the best of times"])
    assert len(log_p) > 1
    assert words(many) == words(trace(model))  # of the answer's first token
    assert single.p_clean == pytest.approx(log_p.sum().item(), rel=1e-4)


def test_logit_difference(model):
    one, two = (trace(model, answer=a, metric="log_probability") for a in ("Paris", "Seattle"))
    found = trace(model, answer="Paris", foil="Seattle", metric="logit_diff")
    torch.testing.assert_close(found.samples, one.samples - two.samples, rtol=1e-3, atol=1e-4)
    swapped = trace(model, answer="Seattle", foil="Paris", metric="logit_diff")
    torch.testing.assert_close(found.samples, -swapped.samples)


def test_another_subject_in_its_place(model):
    """One sample, whose corrupted score is the model's on the other prompt."""
    found = trace(model, subject="Space", other_subject="Paris", answer="Cuba")
    assert found.info["noise"] is None and found.info["other_subject"] == "Paris"
    (log_p,) = target_log_probs(model, [PROMPT.replace("Space", "Paris")], ["Cuba"])
    assert len(found.samples) == 1
    assert found.p_corrupted == pytest.approx(log_p.sum().exp().item(), rel=1e-4)
    assert found.scores[-1, found.subject_positions[-1]].item() == pytest.approx(
        found.p_corrupted, rel=1e-4
    )
    with pytest.raises(ValueError, match="equal length"):
        trace(model, subject="Space", other_subject="the best of times")


# ---------------------------------------------------------------- same result, same model


@pytest.mark.slow
def test_batch_size_and_seed(gemma3):
    one, other = trace(gemma3, batch_size=1), trace(gemma3, batch_size=1000)
    torch.testing.assert_close(one.samples, other.samples, rtol=1e-4, atol=1e-7)
    assert torch.equal(trace(gemma3).samples, trace(gemma3).samples)
    assert not torch.allclose(trace(gemma3).samples, trace(gemma3, seed=1).samples, rtol=1e-2)


def test_the_users_hooks_are_respected_and_stay(gpt2):
    bare = trace(gpt2)
    gpt2.add_hook("blocks.0.hook_resid_post", lambda state, hook: 0.5 * state)
    theirs, again = trace(gpt2), trace(gpt2)
    assert abs(theirs.p_clean - bare.p_clean) > 1e-4
    assert torch.equal(theirs.samples, again.samples)
    assert theirs.scores[-1, -1].item() == pytest.approx(theirs.p_clean, rel=1e-4)
    gpt2.reset_hooks()
    assert torch.equal(trace(gpt2).samples, bare.samples)
    gpt2.add_hook("blocks.0.hook_resid_post", lambda state, hook: None)
    whole = trace(gpt2)  # by whole passes, which keep logits
    gpt2.reset_hooks()
    torch.testing.assert_close(whole.samples, bare.samples, rtol=1e-4, atol=1e-6)
    assert words(whole) == words(bare)


def test_saved_and_loaded(gpt2, tmp_path):
    found = trace(gpt2, kind="attn")
    found.save(tmp_path / "trace.safetensors")
    again = CausalTrace.load(tmp_path / "trace.safetensors")
    for name in ("samples", "corrupted_samples", "top"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    for name in (
        "p_clean",
        "tokens",
        "subject_positions",
        "answer",
        "kind",
        "window",
        "info",
        "top_tokens",
    ):
        assert getattr(again, name) == getattr(found, name)
    (tmp_path / "other").write_bytes(b"no trace")
    with pytest.raises(ValueError, match="safetensors"):
        CausalTrace.load(tmp_path / "other")


# ---------------------------------------------------------------- noise


def test_noise_has_the_moments_it_promises(gpt2):
    generator = torch.Generator().manual_seed(0)
    mean, covariance = embedding_moments(gpt2, ["The old man said. In the best of times."] * 2)
    d = len(mean)
    for noise in (Multivariate(mean, covariance), StudentT(mean, covariance, df=8.0)):
        drawn = noise(400, 50, d, generator).flatten(0, 1)
        assert (drawn.mean(0) - mean).norm() < 0.05 * covariance.trace().sqrt()
        assert (torch.cov(drawn.T) - covariance).norm() < 0.1 * covariance.norm()
    assert Gaussian(0.7)(100, 9, d, generator).std().item() == pytest.approx(0.7, rel=0.02)
    uniform = Uniform(2.0)(100, 9, d, generator)
    assert uniform.abs().max() <= 2 and uniform.std().item() == pytest.approx(2 / 3**0.5, rel=0.02)
    heavy = StudentT(0 * mean, torch.eye(d), df=3.0)(100, 90, d, generator).flatten()
    normal = Multivariate(0 * mean, torch.eye(d))(100, 90, d, generator).flatten()
    assert (heavy**4).mean() > 2 * (normal**4).mean()
    with pytest.raises(ValueError, match="df"):
        StudentT(mean, covariance, df=2.0)


def test_sigma_is_over_every_entry_of_every_token(gpt2):
    encoder = Encoder.of(gpt2)
    subjects = ["Space Needle", "Paris"]
    table = gpt2.W_E.detach()
    entries = torch.cat([table[encoder.ids(subject)].flatten() for subject in subjects])
    assert subject_embedding_std(gpt2, subjects) == pytest.approx(entries.std().item(), rel=1e-5)
    assert len(embeddings_of(gpt2, subjects)) == sum(len(encoder.ids(s)) for s in subjects)
    default = causal_trace(gpt2, PROMPT, SUBJECT, progress=False)
    assert default.info["noise_std"] == pytest.approx(3 * subject_embedding_std(gpt2, [SUBJECT]))


def test_replacing_hides_the_embedding_itself(gpt2):
    """The same noise in the place of any embedding gives the same run."""
    n = len(Encoder.of(gpt2).row(PROMPT, (12, 24)).subject)
    noise = torch.randn(2, n, gpt2.cfg.d_model, generator=torch.Generator().manual_seed(0))
    other = PROMPT.replace("Space Needle", "Needle Space")
    one, two = (
        trace(gpt2, prompt, subject, noise=noise, replace=True, answer="Cuba")
        for prompt, subject in ((PROMPT, SUBJECT), (other, "Needle Space"))
    )
    torch.testing.assert_close(one.corrupted_samples, two.corrupted_samples)
    assert not torch.allclose(one.corrupted_samples, trace(gpt2, noise=noise).corrupted_samples)


# ---------------------------------------------------------------- bad input

BAD = (
    ({"subject": "Eiffel"}, "does not occur in the prompt"),
    ({"prompt": "Paris, Paris", "subject": "Paris"}, "occurs 2 times"),
    ({"prompt": "Paris, Paris", "subject": "Paris", "occurrence": 2}, "occurrence 2"),
    ({"subject": ""}, "does not occur"),
    ({"answer": " "}, "needs a token"),
    ({"kind": "mid"}, "kind must be"),
    ({"metric": "loss"}, "metric must be"),
    ({"foil": "Paris"}, "go together"),
    ({"metric": "logit_diff"}, "go together"),
    ({"window": 0}, "at least 1"),
    ({"n_samples": 0}, "at least 1"),
    ({"noise": torch.zeros(3, 1, 5)}, "noise must have the shape"),
    ({"noise": Gaussian(float("nan"))}, "NaN"),
    ({"noise": Gaussian(1.0), "noise_std": 1.0}, "not both"),
    ({"other_subject": "Paris Tower", "noise_std": 1.0}, "replaces the noise"),
)


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_input_says_what_to_do(gpt2, options, words):
    with pytest.raises(ValueError, match=words):
        trace(gpt2, **options)


def test_unusual_prompts(gpt2):
    whole = trace(gpt2, "Paris", "Paris")
    assert whole.subject_positions == tuple(range(len(whole.tokens)))
    second = trace(gpt2, "Paris, Paris is", "Paris", occurrence=1)
    assert second.subject_positions[0] > 0


# ---------------------------------------------------------------- the released code


@once_a_class
@pytest.mark.real_model
@pytest.mark.parametrize("kind", shared_out(["mlp"], ["resid", "attn"]))
def test_released_traces_of_gemma(gemma, shared, kind, record_property):
    """To what float32 gives: the first p_clean is 0.507056 there, and 0.507027 in float64."""
    case = ("resid", "mlp", "attn").index(kind)
    record = json.loads((shared / "oracle" / "trace.json").read_text())
    arrays, wanted = np.load(shared / "oracle" / "trace.npz"), record["cases"][case]
    noise = torch.from_numpy(arrays[f"noise{case}"])
    found = causal_trace(
        gemma, wanted["prompt"], wanted["subject"], noise=noise, kind=kind, progress=False
    )
    assert found.answer == wanted["answer"]
    assert list(found.subject_positions) == wanted["subject_positions"]
    assert found.p_clean == pytest.approx(wanted["p_clean"], abs=1e-4)
    assert found.p_corrupted == pytest.approx(wanted["p_corrupted"], abs=1e-4)
    error = (found.scores - torch.from_numpy(arrays[f"{kind}{case}"])).abs().max().item()
    record_property("largest_difference", error)
    assert error < 1e-4


@pytest.mark.real_model
def test_sigma_of_the_known_facts(gemma, shared):
    facts = json.loads((shared / "data" / "known_1000.json").read_text())
    sigma = subject_embedding_std(gemma, [fact["subject"] for fact in facts])
    assert sigma == pytest.approx(1.030964732170105, rel=1e-5)


def test_both_classes_agree(tokenizer):
    if len(CLASSES) < 2 or "gpt2" not in tiny_models.hooked_shapes():
        pytest.skip("this TransformerLens has one model class")
    one, two = (trace(make_model(name, "gpt2", tokenizer)) for name in CLASSES)
    torch.testing.assert_close(one.samples, two.samples, rtol=1e-4, atol=1e-6)
