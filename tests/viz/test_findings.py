"""Findings: the sentence says what the numbers say, and says so where noise explains them."""

from __future__ import annotations

import dataclasses
import html

import pytest
import torch
from helpers.rome_setting import random_edit

from transformer_lens_rome import show_edit
from transformer_lens_rome.tracing.averages import average_traces
from transformer_lens_rome.tracing.results import CausalTrace
from transformer_lens_rome.viz import finding


def trace(**changes):
    """Three noise samples; nothing comes back but at layer 4 of "Needle" and layer 5 of "in"."""
    samples = torch.zeros(3, 7, 4)
    samples[:, 4, 1] = torch.tensor([0.4, 0.5, 0.6])
    samples[:, 5, 3] = torch.tensor([0.2, 0.2, 0.2])
    samples[:, 6, 2] = torch.tensor([-2.0, 1.0, 1.9])  # larger, but the noise explains it
    made = CausalTrace(
        samples=samples,
        corrupted_samples=torch.zeros(3),
        p_clean=0.8,
        tokens=("Space", " Needle", " is", " in"),
        subject_positions=(0, 1),
        answer=" Seattle",
        kind="mlp",
        window=4,
        metric="probability",
        info={},
    )
    return dataclasses.replace(made, **changes)


def test_a_trace():
    half = 1.96 * 0.1 / 3**0.5 / 0.8
    assert finding(trace()) == (
        f"Restoring MLP outputs of layers 2 to 5 at 'Needle' brings back 62% ± {half * 100:.0f} of "
        "the lost P(Seattle); after the subject, MLP outputs of layers 3 to 6 at 'in' bring back "
        "25% ± 0."
    )


def test_a_trace_of_states_does_not_praise_the_last_token():
    said = finding(trace(kind="resid", window=1))
    assert "the state after layer 4 at 'Needle' brings back 62% ± 14" in said and "'in'" not in said


def test_one_sample_has_no_interval():
    one = trace(samples=trace().samples[1:2], corrupted_samples=torch.zeros(1))
    assert "62% of the lost P(Seattle); after the subject, " in finding(one)


def test_where_nothing_comes_back_or_nothing_was_lost():
    nothing = trace(samples=torch.zeros(3, 7, 4), metric="log_probability", kind="attn")
    assert finding(nothing) == (
        "Restoring attention outputs at the subject brings back none of log P(Seattle)."
    )
    assert "does not lower P(Seattle)" in finding(trace(p_clean=-0.1))


def test_an_average():
    said = finding(average_traces([trace(), trace()]))
    assert said.startswith(
        "Over 2 facts: restoring MLP outputs of layers 2 to 5 at the last subject token brings back"
        " 62% ± 0 of the lost P(answer); after the subject, MLP outputs of layers 4 to 6 at the "
    )


def test_what_has_no_rule():
    with pytest.raises(ValueError, match="no rule for the finding of a dict"):
        finding({})


def test_an_edit_says_of_what_the_share_is(gpt2):
    """The value at a token changes by a share of its norm."""
    report = show_edit(gpt2, random_edit(gpt2), ["Cuba is in"], n_samples=2, progress=False)
    one = report.prompts[0]
    assert f"at {one.token!r}, by {one.value_shift:.0%} of its norm" in html.unescape(
        report._repr_html_()
    )
    other = report.prompts[1]
    changed = other.top_before[0][0] != other.top_after[0][0]
    said = finding(report)
    assert f"from {one.p_before:.2g} to {one.p_after:.2g}; the top token was " in said
    assert said.endswith(f" The top token changes at {changed:d} of 1 other prompts.")
