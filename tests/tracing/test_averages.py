"""Averages over facts, severed traces, and the facts themselves."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from conftest import make_model

from transformer_lens_rome.files import download as downloads
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing import known_facts
from transformer_lens_rome.tracing.averages import CATEGORIES, AverageTrace, average_traces
from transformer_lens_rome.tracing.causal_trace import causal_trace, severed_trace
from transformer_lens_rome.tracing.known_facts import load_known_facts
from transformer_lens_rome.tracing.results import CausalTrace

PROMPT, SUBJECT = "In the city Space Needle is", "Space Needle"
OPTIONS = {"noise_std": 1.0, "n_samples": 3, "progress": False}


def made(scores, subject, *, p_clean=0.9, p_corrupted=0.1, **changed):
    """A trace of two samples whose mean is the given [layer, pos] table."""
    scores = torch.tensor(scores)
    known = {
        "samples": torch.stack([scores - 0.01, scores + 0.01]),
        "corrupted_samples": torch.tensor([p_corrupted] * 2),
        "p_clean": p_clean,
        "tokens": tuple("abcdefgh"[: scores.shape[1]]),
        "subject_positions": subject,
        "answer": " x",
        "kind": "resid",
        "window": 1,
        "metric": "probability",
        "info": {"model": "tiny"},
    }
    return CausalTrace(**(known | changed))


ONE = made([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]], (1, 2, 3))
TWO = made([[0.8, 0.0, 0.6, 0.2]], (0,), p_clean=0.7, p_corrupted=0.3)


def test_each_position_falls_into_its_categories():
    average = average_traces([ONE, TWO], n_wrong=5)
    expected = (
        [0.2, 0.8],  # first of each subject
        [0.3],  # between first and last
        [0.4, 0.8],  # the one token of TWO is first and last
        [0.5, 0.0],  # just after
        [0.6, 0.6],  # further on, a token each
        [0.7, 0.2],  # last of all
    )
    assert average.n.tolist() == [len(items) for items in expected]
    for row, half, items in zip(average.scores, average.half_width, expected, strict=True):
        items = torch.tensor(items)
        torch.testing.assert_close(row, items.mean()[None])
        if len(items) > 1:
            items = items - torch.tensor([0.1, 0.3])  # an item a fact
            torch.testing.assert_close(half, 1.96 * items.std()[None] / len(items) ** 0.5)
        else:
            assert half.isnan().all()
    assert average.p_clean == pytest.approx(0.8) and average.p_corrupted == pytest.approx(0.2)
    assert average.total_effect == pytest.approx(0.6) and average.n_facts == 2
    torch.testing.assert_close(average.effects, torch.tensor([0.8, 0.4]))
    assert average.n_wrong == 5
    assert average.info == {"model": "tiny", "metric": "probability", "n_samples": 2} | {
        name: None for name in ("noise", "noise_std", "replace", "seed", "prepend_bos")
    }
    layer, effect = average.peak("last subject token")
    assert layer == 0 and effect == pytest.approx(0.6 - 0.2)


def test_a_prompt_that_ends_with_its_subject_has_nothing_after_it():
    average = average_traces([made([[0.1, 0.2]], (0, 1))])
    assert average.n.tolist() == [1, 0, 1, 0, 0, 1]
    assert average.scores.isnan().sum() == 3
    torch.testing.assert_close(average.scores[[2, 5]], torch.tensor([[0.2], [0.2]]))


def test_one_token_after_the_subject_counts_twice():
    average = average_traces([made([[0.1, 0.2, 0.3]], (0, 1))])
    assert average.n.tolist() == [1, 0, 1, 1, 0, 1]
    assert average.scores[3] == average.scores[5]


def test_the_layer_of_the_peak_is_kept_for_each_fact():
    table = [[0.1, 0.2], [0.5, 0.4], [0.3, 0.9]]
    average = average_traces([made(table, (0,)), made(table, (1,))])
    assert average.best_layer.tolist() == [1, 2]


@pytest.mark.parametrize(
    "changed", ({"kind": "mlp"}, {"window": 3}, {"metric": "logit_diff"}, {"info": {"model": "x"}})
)
def test_only_traces_alike_are_averaged(changed):
    with pytest.raises(ValueError, match="different"):
        average_traces([ONE, dataclasses.replace(TWO, **changed)])
    with pytest.raises(ValueError, match="no traces"):
        average_traces([])


def test_an_average_is_saved_and_loaded(tmp_path):
    average = average_traces([ONE, TWO], n_wrong=1)
    average.save(tmp_path / "average.safetensors")
    again = AverageTrace.load(tmp_path / "average.safetensors")
    for field in dataclasses.fields(average):
        mine, theirs = (getattr(a, field.name) for a in (average, again))
        assert (
            torch.allclose(mine, theirs, equal_nan=True)
            if torch.is_tensor(mine)
            else (mine == theirs)
        )
    ONE.save(tmp_path / "trace.safetensors")
    with pytest.raises(ValueError, match="trace"):
        AverageTrace.load(tmp_path / "trace.safetensors")


def test_tables(gpt2):
    pytest.importorskip("pandas")
    trace = causal_trace(gpt2, PROMPT, SUBJECT, **OPTIONS)
    table = trace.to_dataframe()
    cell = table[(table.layer == 2) & (table.position == 4)].iloc[0]
    assert cell.score == pytest.approx(trace.scores[2, 4].item())
    assert cell.token == trace.tokens[4] and cell.in_subject == (4 in trace.subject_positions)
    average = average_traces([trace])
    row = average.to_dataframe()
    row = row[(row.category == "last token") & (row.layer == 1)].iloc[0]
    assert row.score == pytest.approx(trace.scores[1, -1].item())
    assert list(dict.fromkeys(average.to_dataframe().category)) == list(CATEGORIES)


# ---------------------------------------------------------------- severed


@torch.no_grad()
def direct(model, ids, found, noise, answer, sever):
    """Each layer by two whole passes: a corrupted one that is kept, and one that uses it."""
    name = {"mlp": "hook_mlp_out", "attn": "hook_attn_out"}[sever]
    position = found.subject_positions[-1]
    _, clean = model.run_with_cache(torch.tensor([ids]))
    kept = {}

    def corrupt(embedding, hook=None):
        embedding = embedding.clone()
        embedding[:, list(found.subject_positions)] += noise
        return embedding

    def keep(state, hook):
        kept[hook.name] = state[:, position].clone()

    def freeze(state, hook):
        state = state.clone()
        state[:, position] = kept[hook.name]
        return state

    def restore(state, hook):
        state = state.clone()
        state[:, position] = clean[hook.name][0, position]
        return state

    modules = [f"blocks.{i}.{name}" for i in range(model.cfg.n_layers)]
    tokens = torch.tensor([ids] * len(noise))
    model.run_with_hooks(
        tokens, fwd_hooks=[("hook_embed", corrupt), *((module, keep) for module in modules)]
    )
    scores = []
    for layer in range(model.cfg.n_layers):
        hooks = [("hook_embed", corrupt), (f"blocks.{layer}.hook_resid_post", restore)]
        hooks += [(module, freeze) for module in modules]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        scores.append(logits[:, -1].softmax(-1)[:, answer])
    return torch.stack(scores, 1)


@pytest.mark.parametrize("sever", ("mlp", "attn"))
@pytest.mark.parametrize("shape", ("gpt2", "gptj", "gemma3"))
def test_severed_is_what_two_whole_passes_give(model_class, shape, sever, tokenizer):
    model = make_model(model_class, shape, tokenizer)
    row = Encoder.of(model).row(PROMPT, (12, 24), "Cuba")
    answer, ids = row.ids[row.target[0]], row.ids[: row.target[0]]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, len(row.subject), model.cfg.d_model, generator=generator)
    plain = causal_trace(model, PROMPT, SUBJECT, noise=noise, answer="Paris", progress=False)
    answer = int(Encoder.of(model).ids(" Paris")[0])
    found = severed_trace(model, PROMPT, SUBJECT, sever=sever, noise=noise, answer="Paris")
    expected = direct(model, ids, plain, noise, answer, sever)
    torch.testing.assert_close(found.severed, expected, rtol=1e-4, atol=1e-7)
    ordinary = plain.samples[:, :, plain.subject_last]
    torch.testing.assert_close(found.ordinary, ordinary, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.corrupted_samples, plain.corrupted_samples)
    assert (found.severed - found.ordinary)[:, 0].abs().max() > 1e-6
    torch.testing.assert_close(found.severed[:, -1], found.ordinary[:, -1])  # nothing above to cut
    bars = found.effects
    torch.testing.assert_close(bars[0], ordinary.mean(0) - plain.p_corrupted)
    torch.testing.assert_close(bars[1], expected.mean(0) - plain.p_corrupted, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- known facts

FACT = {
    "known_id": 0,
    "subject": "Space Needle",
    "attribute": "Seattle",
    "template": "{} is in",
    "prediction": " Seattle",
    "prompt": "Space Needle is in",
    "relation_id": "P1",
}


def test_facts_are_read_with_whatever_else_is_in_the_file(tmp_path):
    path = tmp_path / "known.json"
    path.write_text(json.dumps([FACT | {"extra": 1}]))
    (fact,) = load_known_facts(path)
    assert fact == (0, "Space Needle", "Seattle", "Space Needle is in", "P1")


@pytest.mark.parametrize(
    ("content", "words"),
    (
        ("no json", "not JSON"),
        ("{}", "no list"),
        (
            json.dumps([FACT, {k: v for k, v in FACT.items() if k != "subject"}]),
            "record 1.*subject",
        ),
        (json.dumps([FACT | {"prompt": "The tower is in"}]), "record 0.*not in its prompt"),
    ),
)
def test_bad_facts_say_which(tmp_path, content, words):
    (tmp_path / "known.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        load_known_facts(tmp_path / "known.json")


def _serve(monkeypatch, tmp_path, content):
    class Answer(io.BytesIO):
        headers = {"Content-Length": str(len(content))}

    monkeypatch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(tmp_path))
    monkeypatch.setattr(downloads, "_open", lambda request: Answer(content))


def test_a_download_is_checked_and_kept(shared, monkeypatch, tmp_path):
    content = (shared / "data" / "known_1000.json").read_bytes()
    _serve(monkeypatch, tmp_path, content)
    assert len(load_known_facts()) == 1209
    _serve(monkeypatch, tmp_path, b"gone")  # not asked again
    assert len(load_known_facts()) == 1209


def test_a_download_of_other_facts_is_refused(monkeypatch, tmp_path):
    _serve(monkeypatch, tmp_path, json.dumps([FACT]).encode())
    with pytest.raises(ValueError, match="other facts"):
        load_known_facts()
    assert list(tmp_path.iterdir()) == []
    assert known_facts.URL.startswith("https://")
