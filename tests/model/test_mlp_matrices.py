"""W_in, W_gate and W_out, the points at their ends, and the embeddings, in both model classes.

The ground truth is a Hugging Face model of the same weights.
"""

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.matrices import matrices
from helpers.rome_setting import LAYER, factored_edit
from helpers.tiny_models import tiny_hf

from transformer_lens_rome import applied
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight, parameter
from transformer_lens_rome.model.passes import read

pytestmark = pytest.mark.every_version

SHAPES = ("gpt2", "gptj", "neox", "opt", "bloom", "llama", "phi3", "gemma3")
GATED = ("llama", "phi3", "gemma3")
TOKENS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
CASES = [(name, shape) for name in CLASSES for shape in SHAPES]
each_model = pytest.mark.parametrize(("name", "shape"), CASES)
close = {"rtol": 1e-4, "atol": 5e-5}
HF_NAMES = {
    "W_in": ("c_fc", "fc_in", "fc1", "dense_h_to_4h", "up_proj"),
    "W_gate": ("gate_proj", "gate_up_proj"),
    "W_out": ("mlp.c_proj", "fc_out", "fc2", "dense_4h_to_h", "down_proj"),
}


@pytest.fixture(scope="module")
def zoo(bos_tokenizer):
    """Models are built once; whoever changes a weight puts it back."""
    models = {}

    def get(name, shape):
        if (name, shape) not in models:
            make = tiny_hf if name == "hf" else lambda *rest: make_model(name, *rest)
            models[name, shape] = make(shape, bos_tokenizer)
        return models[name, shape]

    return get


@torch.no_grad()
def logits(model):
    found = model(TOKENS, attention_mask=torch.ones_like(TOKENS))
    return getattr(found, "logits", found)


def hf_matrix(hf, where):
    """The same matrix in the Hugging Face model, as a view of the shape [d_in, d_out]."""
    modules = [m for n, m in hf.named_modules() if n.endswith(HF_NAMES[where.name])]
    module = modules[where.layer]
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    if hf.config.model_type == "phi3" and where.name != "W_out":  # the gate's half comes first
        return weight.chunk(2, dim=1)[where.name == "W_in"]
    return weight


@each_model
def test_an_input_times_its_matrix_is_the_output_but_for_a_bias(zoo, name, shape):
    model = zoo(name, shape)
    wanted = {"W_in", "W_gate", "W_out"} if shape in GATED else {"W_in", "W_out"}
    assert {where.name for where in matrices(model)} == wanted
    for where in matrices(model):
        source, target = adapter.ends(model, where)
        found = read(model, TOKENS, [source, target])
        rest = found[target] - found[source] @ parameter(model, where).detach()
        torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), **close)
        if other := {"W_in": "W_gate", "W_gate": "W_in"}.get(where.name if shape in GATED else ""):
            swapped = parameter(model, Weight(other, where.layer)).detach()
            rest = found[target] - found[source] @ swapped
            assert (rest - rest[:1, :1]).abs().max() > 0.1


@each_model
def test_the_views_are_live_and_those_of_hugging_face(zoo, name, shape):
    model, hf = zoo(name, shape), zoo("hf", shape)
    for where in matrices(model, [LAYER]):
        mine, theirs = parameter(model, where), hf_matrix(hf, where)
        assert torch.equal(mine, theirs) and mine.shape[0] != mine.shape[1]
        change = 0.1 * torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
        clean, before = logits(model), mine.detach().clone()
        with torch.no_grad():
            mine.add_(change)
            theirs.add_(change)
            edited, expected = logits(model), logits(hf)
            mine.copy_(before)
            theirs.copy_(before)
        torch.testing.assert_close(edited.log_softmax(-1), expected.log_softmax(-1), **close)
        assert (edited - clean).abs().max() > 0.1 and torch.equal(logits(model), clean)


@each_model
def test_the_edit_is_what_hooks_at_the_ends_of_its_matrices_do(zoo, name, shape):
    model, points, inputs = zoo(name, shape), [], {}
    edit, clean = factored_edit(model, matrices(model, [0, 2]), strength=0.05), logits(model)
    for where, (left, right) in edit.factors.items():
        source, target = adapter.ends(model, where)
        points += [
            (source, lambda x, where=where: inputs.update({where: x})),
            (target, lambda y, w=where, a=left, b=right: y + inputs[w] @ a @ b),
        ]
    with adapter.hooks(model, points):
        by_hooks = logits(model)
    with applied(model, edit):
        by_weights = logits(model)
    torch.testing.assert_close(by_hooks, by_weights, **close)
    assert (by_weights - clean).abs().max() > 0.1 and torch.equal(logits(model), clean)


@each_model
def test_changing_the_mlps_input_reaches_all_that_reads_it(zoo, name, shape):
    model = zoo(name, shape)
    source, clean = adapter.ends(model, Weight("W_in", LAYER))[0], logits(model)
    outputs = [adapter.ends(model, w)[1] for w in matrices(model, [LAYER]) if w.name != "W_out"]
    before = read(model, TOKENS, outputs)
    with adapter.hooks(model, [(source, lambda x: 0 * x)]):
        after = read(model, TOKENS, outputs)
        assert (logits(model) - clean).abs().max() > 0.1
    for point in outputs:
        assert (after[point] - after[point][:1, :1]).abs().max() == 0  # the bias is left
        assert (before[point] - before[point][:1, :1]).abs().max() > 0.1


@each_model
def test_embeddings_are_the_rows_of_hugging_face(zoo, name, shape):
    ids = torch.tensor([7, 3, 300, 7])
    truth = zoo("hf", shape).get_input_embeddings().weight.detach()[ids]
    torch.testing.assert_close(adapter.embeddings(zoo(name, shape), ids), truth)
    assert torch.equal(truth[0], truth[3]) and not torch.allclose(truth[0], truth[1], atol=0.1)
