"""`show_edit` says what two ordinary passes say, and leaves the model as it found it."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest
import torch
from helpers.editor_setting import random_editor
from helpers.rome_setting import LAYER, NEAR, REQUEST, factored_edit, random_edit, small_edit

from transformer_lens_rome import DenseEdit, applied, apply_edit, get_method
from transformer_lens_rome import edit_report as microscope
from transformer_lens_rome.edit_report import EditReport, show_edit
from transformer_lens_rome.edits.added_values import added_values
from transformer_lens_rome.edits.ledger import active_edits, without
from transformer_lens_rome.files.tensors import read_tensors, write_tensors
from transformer_lens_rome.model.adapter import Weight, b_out, w_out
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.tracing.causal_trace import causal_trace
from transformer_lens_rome.tracing.results import CausalTrace

PROMPTS = ["In the city Space Needle is", "Cuba is in"]
OPTIONS = {"noise_std": 1.0, "n_samples": 2, "progress": False}


@pytest.fixture(params=(1, 3, "factored"))
def edit(request, gpt2):
    if request.param == "factored":
        return factored_edit(gpt2, [Weight("W_out", LAYER)])
    return random_edit(gpt2, rank=request.param)


@torch.no_grad()
def run(model, prompt, layer=LAYER):
    """Log-probabilities after a prompt, and a layer's keys and values, by the model's own cache."""
    tokens = torch.tensor([Encoder.of(model).ids(prompt)])
    logits, cache = model.run_with_cache(tokens)
    key = cache[f"blocks.{layer}.mlp.hook_post"][0]
    return logits[0, -1].log_softmax(-1), key, cache[f"blocks.{layer}.hook_mlp_out"][0]


def test_each_prompt_says_what_plain_passes_say(gpt2, edit):
    report = show_edit(gpt2, edit, PROMPTS, **OPTIONS)
    assert [one.prompt for one in report.prompts] == [edit.request.text, *PROMPTS]
    for one in report.prompts:
        before, key, value = run(gpt2, one.prompt)
        with_edit = apply_edit(gpt2, edit)
        after, *_ = run(gpt2, one.prompt)
        with_edit.revert()
        wanted = torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum").item()
        assert one.divergence == pytest.approx(wanted, rel=1e-4) and wanted > 1e-4
        for top, log_probs in ((one.top_before, before), (one.top_after, after)):
            wanted = log_probs.exp().topk(3).values.tolist()
            assert [p for _, p in top] == pytest.approx(wanted, rel=1e-4)
        target = Encoder.of(gpt2).row(one.prompt, None, edit.request.target_new)
        shift = (key @ edit.delta()).norm(dim=1) / value.norm(dim=1)
        assert one.value_shift == pytest.approx(shift.max().item(), rel=1e-4)
        assert len(target.target) == 1
        label = target.ids[target.target[0]]
        assert one.p_before == pytest.approx(before[label].exp().item(), rel=1e-4)
        assert one.p_after == pytest.approx(after[label].exp().item(), rel=1e-4)


def test_shares_of_neurons(gpt2, edit):
    report = show_edit(gpt2, edit, **OPTIONS)
    _, keys, _ = run(gpt2, edit.request.text)
    key = keys[Encoder.of(gpt2).templated_row("{} is in", edit.request.subject).subject[-1]]
    added = key[:, None] * edit.delta()
    torch.testing.assert_close(report.shares, added @ added.sum(0) / added.sum(0).square().sum())
    assert report.shares.sum().item() == pytest.approx(1.0, abs=1e-4)
    (first, share), *_ = report.top_neurons(4)
    assert share == report.shares.max().item() == report.shares[first].item()
    ordered = report.shares.sort(descending=True).values
    n = report.neurons_for(0.5)
    assert ordered[:n].sum() >= 0.5 > ordered[: n - 1].sum()


def test_traces_are_of_the_old_and_the_new_answer(gpt2, edit):
    report = show_edit(gpt2, edit, kind="mlp", **OPTIONS)
    request = edit.request
    plain = {"kind": "mlp", **OPTIONS}
    wanted = causal_trace(gpt2, request.text, request.subject, **plain)
    torch.testing.assert_close(report.before.samples, wanted.samples)
    with_edit = apply_edit(gpt2, edit)
    wanted = causal_trace(gpt2, request.text, request.subject, answer="Paris", **plain)
    with_edit.revert()
    torch.testing.assert_close(report.after.samples, wanted.samples)
    assert report.after.answer == "Paris"


@pytest.mark.slow
def test_an_edit_on_the_model_is_lifted_and_put_back(gpt2):
    base = w_out(gpt2, LAYER).detach().clone()
    one, two = random_edit(gpt2, seed=1), random_edit(gpt2, seed=2)
    absent = show_edit(gpt2, one, PROMPTS, **OPTIONS)
    first, _second = apply_edit(gpt2, one), apply_edit(gpt2, two)
    both = w_out(gpt2, LAYER).detach().clone()
    present = show_edit(gpt2, first, PROMPTS, **OPTIONS)
    assert torch.equal(w_out(gpt2, LAYER), both) and active_edits(gpt2, LAYER) == (one, two)
    first.revert()
    alone = show_edit(gpt2, one, PROMPTS, **OPTIONS)  # the other edit is on the model both times
    assert present.prompts == alone.prompts != absent.prompts
    _second.revert()
    assert torch.equal(w_out(gpt2, LAYER), base)


def test_without_gives_everything_back_on_an_error(gpt2):
    base = w_out(gpt2, LAYER).detach().clone()
    one = random_edit(gpt2)
    undo = apply_edit(gpt2, one)
    edited = w_out(gpt2, LAYER).detach().clone()
    with pytest.raises(RuntimeError, match="mine"):
        with without(gpt2, one):
            assert torch.equal(w_out(gpt2, LAYER), base) and not active_edits(gpt2, LAYER)
            raise RuntimeError("mine")
    assert torch.equal(w_out(gpt2, LAYER), edited) and undo.active
    undo.revert()
    assert torch.equal(w_out(gpt2, LAYER), base)


@pytest.mark.parametrize("prompt, subject", (("Paris, {}", "Paris"), ("Paris:{} is", " Paris")))
def test_the_subject_that_was_edited_is_the_one_that_is_traced(gpt2, prompt, subject):
    request = dataclasses.replace(NEAR, prompt=prompt, subject=subject)
    edit = dataclasses.replace(random_edit(gpt2), request=request)
    report = show_edit(gpt2, edit, **OPTIONS)
    assert report.before.subject_positions[0] > 0


def test_a_change_by_others_is_neither_lost_nor_shown(gpt2):
    undo = apply_edit(gpt2, random_edit(gpt2))
    with torch.no_grad():
        w_out(gpt2, LAYER).add_(0.5)
    mine = w_out(gpt2, LAYER).detach().clone()
    with pytest.raises(ValueError, match="changed by something else"):
        show_edit(gpt2, undo, **OPTIONS)
    assert torch.equal(w_out(gpt2, LAYER), mine)


def test_the_model_is_as_it_was_when_a_trace_fails(gpt2, monkeypatch):
    undo, calls = apply_edit(gpt2, random_edit(gpt2)), []
    edited = w_out(gpt2, LAYER).detach().clone()

    def fail_at_the_second(*args, **options):
        calls.append(w_out(gpt2, LAYER).detach().clone())
        if len(calls) == 2:
            raise MemoryError("no room")
        return causal_trace(*args, **options)

    monkeypatch.setattr(microscope, "causal_trace", fail_at_the_second)
    with pytest.raises(MemoryError, match="no room"):
        show_edit(gpt2, undo, **OPTIONS)
    assert not torch.equal(calls[0], edited) and torch.equal(calls[1], edited)
    assert torch.equal(w_out(gpt2, LAYER), edited) and undo.active


def test_what_cannot_be_shown_says_why(gpt2, gemma3):
    edit = random_edit(gpt2)
    for bad, prompts, words in (
        ([edit, edit], (), "one edit"),
        (edit, "Cuba is in", "list of texts"),
        (edit.scale(0.0), (), "changes nothing"),
        (factored_edit(gpt2, []), (), "changes nothing"),
        (dataclasses.replace(edit, layer=7), (), "layers 0 to 2"),
        (dataclasses.replace(edit, model_hash="other"), (), "force=True"),
    ):
        with pytest.raises(ValueError, match=words):
            show_edit(gpt2, bad, prompts, **OPTIONS)
    other = dataclasses.replace(edit, model_hash="other")
    assert show_edit(gpt2, other, force=True, **OPTIONS).layer == LAYER


# ---------------------------------------------------------------- several matrices

OUT = [Weight("W_out", 0), Weight("W_out", 2)]


def with_strength(edit, layer, alpha):
    """The edit with its changes of one layer alpha times as strong."""
    stronger = {
        where: (left, alpha * right if where.layer == layer else right)
        for where, (left, right) in edit.factors.items()
    }
    return dataclasses.replace(edit, factors=stronger)


def kinds_of_several(model):
    """Edits of several matrices and layers, by name."""
    mend = get_method("mend", editor=random_editor(model, "mend"))
    return {
        "several W_out": factored_edit(model, OUT),
        "with W_in": factored_edit(model, [Weight("W_in", 1), *OUT, Weight("W_in", 2)]),
        "no W_out": factored_edit(model, [Weight("W_in", 0), Weight("W_in", 2)]),
        "mend": mend.compute(model, REQUEST),
        "kn": get_method("kn", steps=4).compute(model, REQUEST),
    }


def by_hand(model, edit, prompt):
    """`||k delta|| / ||v||` of each token, by layer with a changed W_out."""
    shifts = {}
    for where, delta in edit.changes().items():
        if where.name == "W_out":
            _, key, value = run(model, prompt, where.layer)
            shifts[where.layer] = (key @ delta).norm(dim=1) / value.norm(dim=1)
    return shifts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["several W_out", "with W_in", "no W_out", "mend", "kn"])
def test_an_edit_of_several_matrices_is_compared_with_plain_passes(gpt2, name):
    edit = kinds_of_several(gpt2)[name]
    report = show_edit(gpt2, edit, PROMPTS, **OPTIONS)
    assert report.layers == tuple(sorted({where.layer for where in edit.changes()}))
    for one in report.prompts:
        before, *_ = run(gpt2, one.prompt)
        with applied(gpt2, edit):
            after, *_ = run(gpt2, one.prompt)
        wanted = (before.exp() * (before - after)).sum().item()
        assert one.divergence == pytest.approx(wanted, rel=1e-3, abs=1e-6) and wanted > 1e-6
        shifts = by_hand(gpt2, edit, one.prompt)
        if not shifts:
            assert (one.value_shift, one.token, one.layer) == (None, "", None)
            continue
        layer = max(shifts, key=lambda each: shifts[each].max())
        assert one.layer == layer
        assert one.value_shift == pytest.approx(shifts[layer].max().item(), rel=1e-4)
        token = Encoder.of(gpt2).ids(one.prompt)[shifts[layer].argmax()]
        assert one.token == Encoder.of(gpt2).tokenizer.decode([token])


def test_each_layer_adds_key_times_delta(gpt2):
    edit, encoder = kinds_of_several(gpt2)["with W_in"], Encoder.of(gpt2)
    texts = [edit.request.text, *PROMPTS]
    added = added_values(gpt2, encoder, edit, [encoder.ids(text) for text in texts])
    assert [one.layer for one in added] == [0, 2]
    for one in added:
        for text, shifts in zip(texts, one.shifts, strict=True):
            torch.testing.assert_close(shifts, by_hand(gpt2, edit, text)[one.layer])
        last = encoder.templated_row("{} is in", edit.request.subject).subject[-1]
        key = run(gpt2, edit.request.text, one.layer)[1][last]
        vectors = key[:, None] * edit.change(Weight("W_out", one.layer))
        wanted = vectors @ vectors.sum(0) / vectors.sum(0).square().sum()
        torch.testing.assert_close(one.shares, wanted, rtol=1e-4, atol=1e-5)
        assert one.at_subject == one.shifts[0][last].item()


@pytest.mark.parametrize("strong", [0, 2])
def test_the_layer_that_moves_most_is_the_one_whose_neurons_are_shown(gpt2, strong):
    edit = with_strength(factored_edit(gpt2, OUT), strong, 20.0)
    report = show_edit(gpt2, edit, PROMPTS, **OPTIONS)
    assert report.layer == 0 and report.layers == (0, 2)
    assert report.shares_layer == strong and {one.layer for one in report.prompts} == {strong}
    _, keys, _ = run(gpt2, edit.request.text, strong)
    key = keys[Encoder.of(gpt2).templated_row("{} is in", edit.request.subject).subject[-1]]
    added = key[:, None] * edit.change(Weight("W_out", strong))
    torch.testing.assert_close(report.shares, added @ added.sum(0) / added.sum(0).square().sum())
    page = report._repr_html_()
    assert "(layers 0, 2)" in page and f"in layer {strong}" in page


@torch.no_grad()
def test_the_lens_reads_lambda_and_hears_u(gpt2):
    edit = random_edit(gpt2)
    report = show_edit(gpt2, edit, PROMPTS, **OPTIONS)
    encoder = Encoder.of(gpt2)
    keys = [run(gpt2, one.prompt)[1] @ edit.u for one in report.prompts]
    last = encoder.templated_row("{} is in", edit.request.subject).subject[-1]
    at_subject = keys[0][last]
    sign = at_subject.sign()  # the subject's key may call up the opposite of Lambda
    logits = gpt2.unembed(gpt2.ln_final((sign * edit.lam)[None, None]))[0, 0]
    logits = logits - gpt2.unembed(gpt2.ln_final(torch.zeros_like(edit.lam)[None, None]))[0, 0]
    lens = report.lens
    assert lens.layer == LAYER == report.shares_layer
    for found, best in ((lens.raises, logits.topk(10)), (lens.lowers, (-logits).topk(10))):
        assert [token for token, _ in found] == [
            encoder.tokenizer.decode([i]) for i in best.indices.tolist()
        ]
        torch.testing.assert_close(
            torch.tensor([x for _, x in found]), logits[best.indices], rtol=1e-2, atol=1e-3
        )
    for one in lens.hears:
        wanted = keys[one.prompt][one.position] / at_subject
        assert one.share == pytest.approx(wanted.item(), rel=1e-3, abs=1e-5)
        token = encoder.ids(report.prompts[one.prompt].prompt)[one.position]
        assert one.token == encoder.tokenizer.decode([token])
    every = sorted((k / at_subject).item() for row in keys for k in row)
    assert [one.share for one in lens.hears] == pytest.approx(every[:-11:-1], rel=1e-3, abs=1e-5)
    paris = encoder.row(edit.request.text, None, "Paris").ids[-1]
    assert lens.target_rank == 1 + logits.argsort(descending=True).tolist().index(paris)
    page = html.unescape(report._repr_html_())
    assert f'raises</td><td dir="auto">{lens.raises[0][0]!r}, ' in page
    assert f"'Paris' is raised as number {lens.target_rank} of all tokens" in page


@pytest.mark.slow
def test_an_edit_without_w_out_says_that_no_value_is_added_to(gpt2):
    left = torch.zeros(w_out(gpt2, LAYER).shape)
    bias = torch.linspace(-1, 1, len(b_out(gpt2, LAYER)))
    of_bias = DenseEdit(layer=LAYER, request=REQUEST, left=left, bias=bias)
    for edit in (kinds_of_several(gpt2)["no W_out"], of_bias):
        report = show_edit(gpt2, edit, force=True, **OPTIONS)
        assert report.shares is report.shares_layer is report.prompts[0].value_shift is None
        assert report.lens is None
        assert report.prompts[0].divergence > 1e-4
        for ask in (report.top_neurons, lambda report=report: report.neurons_for(0.5)):
            with pytest.raises(ValueError, match="changes no W_out"):
                ask()
        assert "changes no W_out" in report._repr_html_()


@pytest.mark.slow
def test_an_edit_of_several_matrices_is_lifted_and_put_back(gpt2):
    edit = kinds_of_several(gpt2)["with W_in"]
    absent = show_edit(gpt2, edit, PROMPTS, **OPTIONS)
    undo = apply_edit(gpt2, edit)
    edited = [w_out(gpt2, layer).detach().clone() for layer in range(3)]
    present = show_edit(gpt2, undo, PROMPTS, **OPTIONS)
    assert present.prompts == absent.prompts and undo.active
    assert all(torch.equal(w_out(gpt2, i), edited[i]) for i in range(3))


@pytest.mark.parametrize("name", ["several W_out", "no W_out", "mend", "kn"])
def test_a_report_of_several_matrices_is_saved_and_drawn_again(gpt2, tmp_path, name):
    report = show_edit(gpt2, kinds_of_several(gpt2)[name], PROMPTS, **OPTIONS)
    report.save(tmp_path / "report")
    again = EditReport.load(tmp_path / "report")
    assert again.prompts == report.prompts and again.layers == report.layers
    assert again.shares_layer == report.shares_layer
    assert (again.shares is None) == (report.shares is None) == (name == "no W_out")
    assert report.shares is None or torch.equal(again.shares, report.shares)
    assert again._repr_html_() == report._repr_html_()
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    axes = again.plot().axes
    layers = ", ".join(map(str, report.layers))
    assert (
        axes[1].get_title() == f"after the edit of layer{'s' * (len(report.layers) > 1)} {layers}"
    )
    if report.shares is None:
        assert not axes[3].lines and "no W_out" in axes[3].texts[0].get_text()
    else:
        assert axes[3].lines[0].get_ydata()[-1] == pytest.approx(1.0, abs=1e-4)
        assert f"neurons of layer {report.shares_layer}" in axes[3].get_xlabel()


def test_a_file_from_when_an_edit_had_one_layer_is_still_read(gpt2, tmp_path):
    report, path = show_edit(gpt2, random_edit(gpt2), PROMPTS, **OPTIONS), tmp_path / "report"
    report.save(path)
    tensors, info = read_tensors(path, EditReport.FORMAT)
    del info["layers"], info["shares_layer"], info["lens"]
    for prompt in info["prompts"]:
        assert prompt.pop("layer") == LAYER
    write_tensors(path, tensors, info)
    again = EditReport.load(path)
    assert again.layers == (LAYER,) and again.shares_layer == LAYER and again.lens is None
    same = dataclasses.replace(report, lens=None)
    assert again._repr_html_() == same._repr_html_()


# ---------------------------------------------------------------- looking at it


def test_bos_is_not_where_a_value_moved_most(gemma3):
    edit = random_edit(gemma3)
    bos = Encoder.of(gemma3).tokenizer.bos_token
    found = [one.token for one in show_edit(gemma3, edit, PROMPTS, **OPTIONS).prompts]
    assert bos not in found


def test_it_can_be_looked_at(model_class, gemma3):
    edit = small_edit(gemma3, NEAR)
    report = show_edit(gemma3, edit, PROMPTS, **OPTIONS)
    shown = report._repr_html_()
    assert "<script" not in shown and all(prompt in shown for prompt in PROMPTS)
    assert report.show().interactive and "Attention in layer 2" in report.show().body
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    figure = report.plot()
    bars = figure.axes[2].containers
    found = [[bar.get_width() for bar in some][0] for some in bars[::2]]
    assert found == pytest.approx([one.p_before for one in report.prompts])
    assert figure.axes[3].lines[0].get_ydata()[-1] == pytest.approx(1.0, abs=1e-4)


def test_a_report_is_saved_and_drawn_again(gemma3, tmp_path):
    report = show_edit(gemma3, small_edit(gemma3, NEAR), PROMPTS, **OPTIONS)
    report.save(tmp_path / "report.safetensors")
    again = EditReport.load(tmp_path / "report.safetensors")
    for field in dataclasses.fields(report):
        one, other = getattr(report, field.name), getattr(again, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), field.name
        elif not isinstance(one, CausalTrace):
            assert one == other, field.name
    assert torch.equal(again.after.samples, report.after.samples)
    assert again._repr_html_() == report._repr_html_()
    strip = re.compile(r"circuits-vis-[\w-]+")
    assert strip.sub("", again.show().body) == strip.sub("", report.show().body)


def test_what_a_page_says_was_expected_is_what_the_model_expected(gemma3):
    edit = small_edit(gemma3, NEAR)
    report, row = (
        show_edit(gemma3, edit, **OPTIONS),
        Encoder.of(gemma3).row(NEAR.text, None, "Paris"),
    )
    assert report.ids.tolist() == list(row.ids)
    for i, edits in enumerate(((), (edit,))):
        with applied(gemma3, *edits):
            logits = gemma3(report.ids[None]).detach()[0]
        expected = logits.log_softmax(-1)
        torch.testing.assert_close(report.log_probs[i], expected, rtol=1e-4, atol=1e-4)
        for token in expected.topk(10).indices.unique().tolist():
            assert report.texts[str(token)] == Encoder.of(gemma3).tokenizer.decode([token])
