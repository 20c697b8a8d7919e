"""Traces estimated from gradients: exact where the model is linear, and checked where it is not."""

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import LAYER

from transformer_lens_rome import average_traces
from transformer_lens_rome.model.adapter import w_out, weight_hash
from transformer_lens_rome.tracing.causal_trace import causal_trace, gradient_traces
from transformer_lens_rome.tracing.estimated_trace import EstimatedTrace, rank_correlation
from transformer_lens_rome.tracing.fact_traces import trace_facts
from transformer_lens_rome.tracing.known_facts import KnownFact
from transformer_lens_rome.viz import finding
from transformer_lens_rome.viz.words import readable

PROMPT, SUBJECT = "In the city Space Needle is", "Space Needle"
KINDS = ("resid", "mlp", "attn")


def traced(model, **options):
    known = {"n_samples": 3, "window": 1, "noise_std": 1.0, "progress": False}
    return causal_trace(model, PROMPT, SUBJECT, **(known | options))


def estimated(model, **options):
    return traced(model, method="gradient", **options)


@pytest.fixture(params=("gpt2", "gemma3", "neox"))
def model(request, model_class, tokenizer, bos_tokenizer):
    known = bos_tokenizer if request.param == "gemma3" else tokenizer
    return make_model(model_class, request.param, known)


@pytest.mark.parametrize("kind", KINDS)
def test_for_small_noise_the_estimate_is_the_trace(model, kind):
    """The first order is all there is then; the metric is read as a log-probability."""
    options = {"kind": kind, "metric": "log_probability", "noise_std": 1e-2}
    exact = traced(model, **options).indirect_effect
    found = estimated(model, **options).indirect_effect
    assert (found - exact).abs().max() < 2e-2 * exact.abs().max()


def test_a_difference_of_logits_is_estimated_too(gpt2):
    options = {"metric": "logit_diff", "answer": "old", "foil": "tower", "noise_std": 1e-2}
    exact, found = traced(gpt2, **options), estimated(gpt2, **options)
    error = (found.indirect_effect - exact.indirect_effect).abs().max()
    assert error < 2e-2 * exact.indirect_effect.abs().max()


def test_checked_cells_are_those_of_an_exact_trace(model):
    """The four with the largest estimates, and four others, with the same noise."""
    exact, found = (
        traced(model, kind="mlp", window=2),
        estimated(model, kind="mlp", window=2, verify=4),
    )
    layers, positions = found.checked.T
    assert torch.allclose(found.exact, exact.samples[:, layers, positions], atol=1e-5)
    assert torch.allclose(found.corrupted_samples, exact.corrupted_samples, atol=1e-5)
    assert found.n_top == 4 and len(found.checked) == len(set(map(tuple, found.checked.tolist())))
    assert len(found.checked) == 8 and min(positions) >= found.subject_positions[0]
    top = found.scores[layers[:4], positions[:4]]
    assert top.min() >= found.scores[layers[4:], positions[4:]].max()
    assert found.top_exact[0][2] == found.exact.mean(0).max()


def test_several_kinds_from_the_same_passes(gpt2):
    before = weight_hash(w_out(gpt2, LAYER))
    known = {"n_samples": 3, "window": 2, "noise_std": 1.0, "verify": 3}
    each = gradient_traces(gpt2, PROMPT, SUBJECT, **known)
    for kind in KINDS:
        alone = estimated(gpt2, kind=kind, window=2, verify=3)
        assert torch.allclose(each[kind].samples, alone.samples, atol=1e-6)
    assert weight_hash(w_out(gpt2, LAYER)) == before
    assert all(parameter.grad is None for parameter in gpt2.parameters())


def test_another_subject_instead_of_noise(gpt2):
    options = {"other_subject": "Paris", "answer": "Cuba", "window": 1, "progress": False}
    exact = causal_trace(gpt2, PROMPT, "Space", **options)
    found = causal_trace(gpt2, PROMPT, "Space", method="gradient", verify=3, **options)
    layers, positions = found.checked.T
    assert torch.allclose(found.exact, exact.samples[:, layers, positions], atol=1e-5)


def test_what_it_is_worth_is_said(gpt2, tmp_path):
    found = estimated(gpt2, noise_std=1e-2, verify=4)
    assert found.is_causal and found.agreement.spearman > 0.95 and "causal effects (" in str(found)
    exact = found.exact.flip(1)  # as if the estimate had the order wrong
    wrong = EstimatedTrace(**{**vars(found), "exact": exact})
    assert not wrong.is_causal and "not causal effects" in str(wrong)
    found.save(tmp_path / "trace.safetensors")
    again = EstimatedTrace.load(tmp_path / "trace.safetensors")
    assert torch.equal(again.exact, found.exact) and again.agreement == found.agreement
    said = finding(wrong)
    assert said.startswith("Gradient estimates") and "not causal effects" in said
    assert (
        f"has the highest P({readable(wrong.answer.strip())}), {wrong.top_exact[0][2]:.3g}" in said
    )
    unchecked = estimated(gpt2, verify=0)
    assert finding(unchecked).endswith("a screen; no cell was run exactly.")
    assert unchecked.agreement.n == 0 and not unchecked.is_causal


def test_an_average_says_that_it_is_estimated(gpt2, tmp_path):
    """And how good the estimates of the facts with exact cells are; the others have none."""
    facts = [KnownFact(i, SUBJECT, "x", PROMPT, "P") for i in range(3)]
    known = {"n_samples": 2, "window": 1, "noise_std": 1e-2, "progress": False, "verify": 3}
    options = known | {"method": "gradient", "n_verified": 2, "folder": tmp_path}
    traces = trace_facts(gpt2, facts, **options)
    assert [trace.agreement.n for trace in traces] == [6, 6, 0]
    info = average_traces(traces).info
    assert info["method"] == "gradient" and info["n_verified"] == 2
    each = [trace.agreement.spearman for trace in traces[:2]]
    assert info["spearman"] == pytest.approx(sum(each) / 2)
    assert all(
        map(
            torch.equal,
            *([t.exact for t in some] for some in (traces, trace_facts(gpt2, facts, **options))),
        )
    )
    with pytest.raises(ValueError, match="estimated and exact traces"):
        average_traces([traces[0], traced(gpt2, n_samples=2)])


def test_ranks_with_ties():
    one, other = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0.0, 3.0, 4.0, 9.0])
    # ranks less their mean: (-1.5, 0, 0, 1.5) and (-1.5, -0.5, 0.5, 1.5), so 4.5 / 22.5**0.5
    assert rank_correlation(one, other) == pytest.approx(0.9487, abs=1e-4)
    assert rank_correlation(one, -one) == pytest.approx(-1)


def test_bad_input(gpt2):
    with pytest.raises(ValueError, match="method must be"):
        traced(gpt2, method="relp")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        estimated(gpt2, steps=0)
    with pytest.raises(ValueError, match="zero everywhere"):
        estimated(gpt2, noise_std=0.0)
