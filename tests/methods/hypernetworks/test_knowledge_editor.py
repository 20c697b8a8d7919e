"""KE's change is the paper's formula of the dense gradient, from an LSTM's two last states."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_model
from helpers.editor_setting import (
    REQUEST,
    dense,
    factors_of,
    gradient,
    random_editor,
    same_tensors,
    sample_of,
    shapes_of,
)
from torch import nn
from torch.nn.functional import linear

from transformer_lens_rome import EditRequest, get_method
from transformer_lens_rome.methods.hypernetworks.hypernetwork import Text, TokenFactors
from transformer_lens_rome.methods.hypernetworks.knowledge_editor import Condition, Head
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight

WIDTH = 512
MATRICES = [Weight("W_in", 1), Weight("W_out", 1), Weight("W_out", 2)]


@pytest.fixture(params=("gpt2", "gptj", "llama", "gemma3"))
def model(request, model_class, tokenizer, bos_tokenizer):
    """A fresh tiny model of each shape and class."""
    return make_model(
        model_class, request.param, bos_tokenizer if request.param == "gemma3" else tokenizer
    )


@pytest.fixture(autouse=True)
def _no_trace_of_new_networks():
    """A bare network draws from the global generator; `fit` takes care of that, these do not."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        yield


def weight_of(state, layer):
    """A weight-normalised matrix: each row's direction, times the row's own length."""
    length, direction = (state[f"{layer}.parametrizations.weight.original{i}"] for i in (0, 1))
    return length * direction / direction.norm(dim=1, keepdim=True)


def head_output(state, name, h):
    """The vector that a head makes of h."""
    state = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
    inner = linear(h, weight_of(state, "inner"), state["inner.bias"]).tanh()
    return linear(inner, weight_of(state, "outer"), state["outer.bias"])


def h_by_hand(state, embeddings):
    """h, by LSTM cells that walk over a text in either direction."""
    last = []
    for suffix, order in (("", embeddings), ("_reverse", embeddings.flip(0))):
        cell = nn.LSTMCell(embeddings.shape[1], WIDTH).to(embeddings)
        parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        own = {part: state[f"condition.lstm.{part}_l0{suffix}"] for part in parts}
        cell.load_state_dict(own)
        hidden = None
        for vector in order:
            hidden = cell(vector[None], hidden)
        last.append(hidden[0][0])
    joint = torch.cat(last)
    return linear(joint, state["condition.linear.weight"], state["condition.linear.bias"]).tanh()


def embeddings_by_hand(model, state, sample):
    """The network's own row for each token that it has one for, else the model's."""
    own = dict(zip(state["condition.tokens"].tolist(), state["condition.rows"], strict=True))
    rows = [own.get(i, adapter.embeddings(model, torch.tensor([i]))[0].cpu()) for i in sample.ids]
    assert 0 < sum(i in own for i in sample.ids) < len(rows)
    return torch.stack(rows)


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("matrices", (MATRICES, None), ids=("some", "all"))
def test_the_change_is_the_formula_of_the_dense_gradient(model, matrices):
    editor, sample = random_editor(model, "ke", matrices=matrices), sample_of(model)
    edit = get_method("ke", editor=editor).compute(model, REQUEST)
    factors = factors_of(model, matrices=editor.matrices)
    with torch.no_grad():
        h = h_by_hand(editor.tensors, embeddings_by_hand(model, editor.tensors, sample))
        for where, change in edit.changes().items():
            found = head_output(editor.tensors, f"heads.{where.name}_{where.layer}", h)
            rows, columns = adapter.parameter(model, where).shape
            assert len(found) == 2 * (rows + columns) + 1
            col_a, row_a, col_b, row_b, eta = found.split([columns, rows, columns, rows, 1])
            A = torch.outer(row_a.softmax(0), col_a)
            B = torch.outer(row_b.softmax(0), col_b)
            G = gradient(factors[where])
            expected = eta.sigmoid() * (G * A + B)
            assert torch.allclose(change, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
            for wrong in (eta.sigmoid() * (B - G * A), G * A + B, eta.sigmoid() * (G + A * B)):
                assert (wrong - expected).norm() > 1e-3 * expected.norm()  # the controls


def test_the_gradient_is_seen_and_scaled_entry_by_entry():
    head, h = Head(5, 7), torch.randn(768)
    x, delta = torch.randn(4, 5), torch.randn(4, 7)

    def change(factor):
        return dense(head(h, TokenFactors(factor * x, delta)))

    with torch.no_grad():
        nothing, once, twice = change(0.0), change(1.0), change(2.0)
        assert torch.linalg.matrix_rank(nothing) == 1  # B alone
        assert torch.allclose(twice - nothing, 2 * (once - nothing), atol=1e-6)
        A = (once - nothing) / (x.T @ delta)
    assert torch.linalg.matrix_rank(A, rtol=1e-3) == 1
    assert once.shape == (5, 7) and head.widths == [7, 5, 7, 5, 1]


def test_no_token_at_all_leaves_what_the_text_says():
    left, right = Head(5, 7)(torch.randn(768), TokenFactors(torch.zeros(0, 5), torch.zeros(0, 7)))
    assert left.shape == (5, 1) and right.shape == (1, 7) and right.any()


def test_each_outer_vector_has_its_place():
    """Each part of the last layer's bias moves what it should, and is a softmax on rows only."""
    head, h, factors = (
        Head(5, 7),
        torch.randn(768),
        TokenFactors(torch.ones(1, 5), torch.ones(1, 7)),
    )
    starts = [0, 7, 12, 19, 24]
    with torch.no_grad():
        head.outer.parametrizations.weight.original0.zero_()
        head.outer.bias.zero_()
        bias = head.outer.bias
        bias[starts[0] : starts[1]] = torch.arange(7.0)  # col_a: A's columns are as they are
        assert torch.allclose(dense(head(h, factors)), 0.5 * torch.arange(7.0).expand(5, 7) / 5)
        bias[starts[1]] = 100.0  # row_a: all on the first row
        assert torch.allclose(dense(head(h, factors))[0], 0.5 * torch.arange(7.0))
        assert dense(head(h, factors))[1:].abs().max() < 1e-30
        bias[: starts[2]] = 0.0
        bias[starts[2] : starts[3]] = -1.0  # col_b
        bias[starts[3] + 4] = 100.0  # row_b: all on the last row
        expected = torch.zeros(5, 7)
        expected[4] = -0.5
        assert torch.allclose(dense(head(h, factors)), expected)
        bias[starts[4]] = 100.0  # eta
        assert torch.allclose(dense(head(h, factors)), 2 * expected)


# ---------------------------------------------------------------- the condition


def test_the_last_states_are_those_of_two_walks(gpt2):
    editor, sample = random_editor(gpt2, "ke", matrices=MATRICES), sample_of(gpt2)
    network = editor._network(gpt2)
    embeddings = embeddings_by_hand(gpt2, editor.tensors, sample)
    with torch.no_grad():
        mine = network.condition(*Text.of(gpt2, sample))
        expected = h_by_hand(editor.tensors, embeddings)
        assert torch.allclose(mine, expected, atol=1e-5)
        outputs, _ = network.condition.lstm(embeddings[None])
        wrong = network.condition.linear(outputs[0, -1]).tanh()  # backward at the last token
    assert not torch.allclose(mine, wrong, atol=1e-3)


def test_it_reads_prompt_and_target(model):
    editor = random_editor(model, "ke", matrices=MATRICES)
    network = editor._network(model)
    texts = [
        REQUEST,
        EditRequest(REQUEST.prompt, REQUEST.subject, "the city of Paris"),
        EditRequest(REQUEST.prompt, "Mac", REQUEST.target_new),
    ]
    with torch.no_grad():
        found = [network.condition(*Text.of(model, sample_of(model, one))) for one in texts]
        factors = factors_of(model, matrices=editor.matrices)
        changes = [
            network(factors, Text.of(model, sample_of(model, one)))[MATRICES[0]] for one in texts
        ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (found[i] - found[j]).abs().max() > 1e-3
        assert (dense(changes[i]) - dense(changes[j])).abs().max() > 1e-6


def test_trained_tokens_have_rows_of_their_own():
    condition, embeddings = Condition(8, torch.tensor([2, 5, 9])), torch.randn(12, 8)
    with torch.no_grad():
        condition.rows.copy_(embeddings[[2, 5, 9]])
        texts = [torch.tensor(ids) for ids in ([0, 2, 5, 11], [0, 1, 3, 11], [9], [10, 4])]
        before = [condition(ids, embeddings[ids]) for ids in texts]
        condition.rows += 1.0
        after = [condition(ids, embeddings[ids]) for ids in texts]
        bare = Condition(8, torch.zeros(0, dtype=torch.long))
        bare.lstm.load_state_dict(condition.lstm.state_dict())
        bare.linear.load_state_dict(condition.linear.state_dict())
        without = [bare(ids, embeddings[ids]) for ids in texts]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True, False, True, False]
    # rows that are the model's make no difference
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, without, strict=True))


@pytest.mark.parametrize("n_tokens", (0, 1))
def test_a_text_whose_every_token_is_beyond_the_trained_ones(n_tokens):
    condition = Condition(8, torch.arange(n_tokens))
    ids, embeddings = torch.tensor([30, 31]), torch.randn(2, 8)
    with torch.no_grad():
        condition.rows.fill_(7.0)
        mine = condition(ids, embeddings)
        _, (last, _) = condition.lstm(embeddings[None])
    assert torch.allclose(mine, condition.linear(last.flatten()).tanh())


def test_a_full_embedding_matrix_would_move_in_the_same_rows_only():
    """Why the table may be short: Adam leaves a row that never had a gradient, to the bit."""
    embeddings, seen = torch.randn(20, 8), torch.tensor([3, 4, 11])
    short, full = Condition(8, seen), Condition(8, torch.arange(20))
    with torch.no_grad():
        short.rows.copy_(embeddings[seen])
        full.rows.copy_(embeddings)
    full.lstm.load_state_dict(short.lstm.state_dict())
    full.linear.load_state_dict(short.linear.state_dict())
    for condition in (short, full):
        adam = torch.optim.Adam(condition.parameters(), lr=1e-2)
        for ids in (seen[:2], seen[1:], seen[[0, 2, 0]], seen[:1]):
            adam.zero_grad()
            condition(ids, embeddings[ids])[:9].square().sum().backward()
            adam.step()
    unseen = torch.tensor([i for i in range(20) if i not in seen])
    assert torch.equal(full.rows[unseen], embeddings[unseen])
    assert torch.allclose(full.rows[seen], short.rows, atol=1e-6)
    assert (short.rows - embeddings[seen]).abs().min(1).values.max() > 1e-4  # the control


# ---------------------------------------------------------------- as a method


def test_a_new_network_starts_with_the_models_rows(gpt2):
    ids = torch.tensor([4, 30, 77])
    embeddings = adapter.embeddings(gpt2, ids).cpu()
    network = get_method("ke").new_network(shapes_of(gpt2, MATRICES), embeddings, ids)
    assert torch.equal(network.condition.rows, embeddings)
    assert network.condition.rows.requires_grad and not network.condition.tokens.requires_grad
    text = Text.of(gpt2, sample_of(gpt2))
    bare = copy.deepcopy(network.condition)
    bare.tokens += 1000  # ids that no text has
    with torch.no_grad():
        assert torch.allclose(network.condition(*text), bare(*text), atol=1e-6)


def test_edits_depend_on_nothing_but_model_and_request(model):
    editor = random_editor(model, "ke-cf", matrices=MATRICES)
    state = {name: tensor.clone() for name, tensor in editor.tensors.items()}
    method = get_method("ke-cf", editor=editor).prepared(model)
    other = EditRequest("The mother tongue of {} is", "Angela Merkel", "Italian", "German")
    first = [method.compute(model, one).digest for one in (REQUEST, other, REQUEST)]
    again = [method.compute(model, one, seed=7).digest for one in (other, REQUEST)]
    assert first == [again[1], again[0], again[1]] and again[0] != again[1]
    assert same_tensors(editor.tensors, state)


def test_every_part_learns(gpt2):
    """Autograd reaches all parameters but heads and rows that this step does not use."""
    ids = torch.tensor(sorted({*sample_of(gpt2).ids, 400}))
    network = get_method("ke").new_network(
        shapes_of(gpt2, MATRICES), torch.randn(len(ids), 32), ids
    )
    changes = network(factors_of(gpt2, matrices=MATRICES), Text.of(gpt2, sample_of(gpt2)))
    dense(changes[MATRICES[0]]).square().sum().backward()
    used = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    heads = {name for name, _ in network.named_parameters() if name.startswith("heads.")}
    own = {name for name in heads if name.startswith("heads.W_in_1.")}
    assert used == {name for name, _ in network.named_parameters()} - (heads - own)
    row = network.condition.rows.grad
    assert not row[ids == 400].any() and row[ids != 400].any(1).all()
