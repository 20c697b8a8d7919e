"""Runs over facts: who is asked, what is kept, and what is made again after a stop."""

from __future__ import annotations

import pytest
import torch
from helpers.rome_setting import random_edit

from transformer_lens_rome import apply_edit
from transformer_lens_rome.prompts.scores import top_tokens
from transformer_lens_rome.tracing import fact_traces
from transformer_lens_rome.tracing.averages import AverageSevered, average_severed
from transformer_lens_rome.tracing.causal_trace import causal_trace, severed_trace
from transformer_lens_rome.tracing.corruption import subject_embedding_std
from transformer_lens_rome.tracing.fact_traces import facts_known_to, sever_facts, trace_facts
from transformer_lens_rome.tracing.known_facts import KnownFact
from transformer_lens_rome.tracing.results import SeveredTrace

FACTS = [
    KnownFact(7, "Space Needle", "x", "In the city Space Needle is", "P1"),
    KnownFact(8, "Paris", "x", "Paris, the Paris", "P1"),
    KnownFact(9, "Cuba", "x", "The old Cuba is in", "P2"),
]
OPTIONS = {"n_samples": 2, "seed": 3, "progress": False}


def test_known_facts_are_those_that_the_model_says(gpt2):
    ((said, _),) = top_tokens(gpt2, FACTS[1].prompt, 1)
    facts = [FACTS[0], FACTS[1]._replace(attribute=said.strip()), FACTS[2]]
    known, wrong = facts_known_to(gpt2, facts, progress=False)
    assert (known, wrong) == ([facts[1]], 2)
    known, wrong = facts_known_to(gpt2, [*facts, *facts], limit=1, progress=False)
    assert (known, wrong) == ([facts[1]], 1)


def test_each_trace_is_the_trace_of_its_fact_with_common_noise(gpt2):
    found = trace_facts(gpt2, FACTS, kind="mlp", window=2, **OPTIONS)
    std = 3 * subject_embedding_std(gpt2, ["Space Needle", "Paris", "Cuba"])
    options = OPTIONS | {"noise_std": std, "occurrence": 0, "kind": "mlp", "window": 2}
    for fact, trace in zip(FACTS, found, strict=True):
        wanted = causal_trace(gpt2, fact.prompt, fact.subject, **options)
        assert torch.equal(trace.samples, wanted.samples)


def test_severed_facts(gpt2):
    found = sever_facts(gpt2, FACTS, sever="attn", noise_std=1.0, **OPTIONS)
    options = OPTIONS | {"noise_std": 1.0, "occurrence": 0, "sever": "attn"}
    wanted = severed_trace(gpt2, FACTS[2].prompt, FACTS[2].subject, **options)
    assert torch.equal(found[2].severed, wanted.severed)
    average = average_severed(found, n_wrong=4)
    stacked = torch.stack([trace.effects for trace in found])
    torch.testing.assert_close(average.effects, stacked.mean(0))
    torch.testing.assert_close(average.half_width, 1.96 * stacked.std(0) / 3**0.5)
    assert (average.n_facts, average.n_wrong, average.sever) == (3, 4, "attn")


@pytest.mark.slow
@pytest.mark.parametrize("run", (trace_facts, sever_facts))
def test_a_second_run_makes_only_what_is_missing(gpt2, tmp_path, monkeypatch, run):
    name = {trace_facts: "causal_trace", sever_facts: "severed_trace"}[run]
    plain, made = getattr(fact_traces, name), []

    def counted(model, prompt, subject, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(prompt)
        return plain(model, prompt, subject, **options)

    whole = run(gpt2, FACTS, **OPTIONS)
    monkeypatch.setattr(fact_traces, name, counted)
    with pytest.raises(KeyboardInterrupt):
        run(gpt2, FACTS, folder=tmp_path, **OPTIONS)
    made[:] = made[:1]
    again = run(gpt2, FACTS, folder=tmp_path, **OPTIONS)
    assert made == [FACTS[0].prompt, FACTS[2].prompt]
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.corrupted_samples, other.corrupted_samples)
        assert one.info == other.info


@pytest.mark.parametrize(
    ("changed", "words"),
    (
        ({"kind": "mlp"}, "another kind"),
        ({"n_samples": 3}, "another n_samples"),
        ({"seed": 4}, "another seed"),
        ({"noise_std": 2.0}, "another noise_std"),
    ),
)
def test_traces_made_otherwise_are_refused(gpt2, tmp_path, changed, words):
    known = OPTIONS | {"folder": tmp_path, "noise_std": 1.0}
    trace_facts(gpt2, FACTS, **known)
    with pytest.raises(ValueError, match=words):
        trace_facts(gpt2, FACTS, **(known | changed))


def test_traces_of_the_unedited_model_are_refused(gpt2, tmp_path):
    trace_facts(gpt2, FACTS, folder=tmp_path, **OPTIONS)
    apply_edit(gpt2, random_edit(gpt2, strength=1.0))
    with pytest.raises(ValueError, match="another model"):
        trace_facts(gpt2, FACTS, folder=tmp_path, **OPTIONS)


def test_severed_results_are_saved_and_loaded(gpt2, tmp_path):
    (trace,) = sever_facts(gpt2, FACTS[:1], noise_std=1.0, **OPTIONS)
    for result in (trace, average_severed([trace, trace])):
        result.save(tmp_path / "file")
        again = type(result).load(tmp_path / "file")
        assert torch.equal(again.effects, result.effects) and again.sever == result.sever
        table = again.to_dataframe()
        row = table[(table.path == "mlp severed") & (table.layer == 2)].iloc[0]
        assert row.indirect_effect == pytest.approx(result.effects[1, 2].item())
    with pytest.raises(ValueError, match="average_severed"):
        SeveredTrace.load(tmp_path / "file")
    with pytest.raises(ValueError, match="axes do not fit"):
        AverageSevered(torch.zeros(2, 3), torch.zeros(2, 4), "mlp")
    with pytest.raises(ValueError, match="no traces"):
        average_severed([])
