"""Which architectures are served: the page, its results, and a few families tried here.

The tables are what the results say, the results are of every architecture that the installed
TransformerLens has, and families that no other test knows go through the checks.
"""

import json
from importlib.metadata import version

import pytest
import torch
from conftest import CLASSES
from helpers.rome_setting import random_edit
from helpers.tiny_models import has_bridge
from served import bridges, checks, hooked, page, verdict

from transformer_lens_rome import apply_edit, revert_all
from transformer_lens_rome.edits.ledger import active_edits
from transformer_lens_rome.model import adapter, passes
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts import continuations
from transformer_lens_rome.tracing.kinds import KINDS

pytestmark = pytest.mark.every_version


@pytest.fixture(scope="module")
def served():
    """The modules of tests/served/, by name."""
    return {m.__name__.split(".")[1]: m for m in (bridges, checks, hooked, page, verdict)}


@pytest.fixture(scope="module")
def build(served, tokenizer):
    """Tiny models of one class by architecture, built once."""
    models = {}

    def get(kind, name):
        if (kind, name) not in models:
            builder = served["bridges" if kind == "bridge" else "hooked"]
            models[kind, name] = builder.build(name, tokenizer)
        return models[kind, name]

    return get


def results(served):
    return [json.loads(file.read_text()) for file in served["page"].RESULTS.glob("*.json")]


# ---------------------------------------------------------------- the page


def test_the_tables_are_those_of_the_results(served):
    page = served["page"]
    text = page.PAGE.read_text()
    assert text.split(page.BEGIN)[1].split(page.END)[0] == page.tables()


def test_no_family_is_half_served_and_every_refusal_has_a_reason(served):
    found = results(served)
    assert {one["class"] for one in found} == {"TransformerBridge", "HookedTransformer"}
    for one in found:
        rows = one["families"].values()
        assert {row["outcome"] for row in rows} == set(served["page"].OUTCOMES)
        assert all(row["reason"] for row in rows if row["outcome"] != "served")
        assert all({"resid", "mlp"} <= {*row["traced"]} for row in rows if row["layers"])


def test_the_results_know_every_architecture_of_this_version(served):
    """Where this very version is recorded; a new one has no results yet."""
    page, checked = served["page"], []
    for kind, builder in page.builders().items():
        if page.results_file(kind).exists():
            whole = json.loads(page.results_file(kind).read_text())
            assert list(whole["families"]) == builder.families()
            checked.append(kind)
    if not checked:
        pytest.skip(f"no results of TransformerLens {version('transformer-lens')}")


# ---------------------------------------------------------------- the families


SPOT = [
    *(("bridge", n) for n in ("FalconForCausalLM", "JambaForCausalLM", "StableLmForCausalLM")),
    *(("hooked", n) for n in ("GPTNeoForCausalLM", "ApertusForCausalLM", "neel-solu-old")),
]
spots = pytest.mark.parametrize(("kind", "name"), [s for s in SPOT if s[0] in CLASSES])


@pytest.fixture
def converts(served):
    """Skips what the installed TransformerLens does not have."""

    def check(kind, name):
        builders = served["page"].builders()
        if kind not in builders or name not in builders[kind].families():
            pytest.skip(f"this TransformerLens has no {name}")

    return check


@pytest.mark.slow
@spots
def test_families_that_no_other_test_knows_are_served(build, served, converts, kind, name):
    converts(kind, name)
    found = served["verdict"].verdict(build(kind, name))
    assert (found["outcome"], found["traced"][:2]) == ("served", ["resid", "mlp"]), found["reason"]


@pytest.mark.skipif(not has_bridge(), reason="needs TransformerBridge")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("T5ForConditionalGeneration", "no single stack of blocks"),
        ("BertForMaskedLM", "attends to later tokens"),
        ("ViTModel", "reads images"),
        ("OpenAIGPTLMHeadModel", "no norm after its last block"),
        ("NemotronHForCausalLM", "no single dense W_out"),
    ],
)
def test_what_is_not_served_is_refused_before_any_work(build, served, converts, name, why):
    converts("bridge", name)
    found = served["verdict"].verdict(build("bridge", name))
    assert found["outcome"] == "refused" and why in found["reason"], found["reason"]


@pytest.mark.skipif(not has_bridge(), reason="needs TransformerBridge")
def test_models_with_recurrent_states_are_never_cut(build, converts):
    """Their cache would be written to; a short trial does not always notice (Nemotron-H)."""
    converts("bridge", "NemotronHForCausalLM")
    model = build("bridge", "NemotronHForCausalLM")
    tokens = torch.arange(5, 15).unflatten(0, (2, 5))
    with pytest.raises(NotImplementedError, match="recurrent states"):
        passes.keys_and_values(model, tokens, torch.ones_like(tokens))
    assert PartialForward(model, 0, tokens.tolist(), [2, 3]).recording is None


@pytest.mark.skipif(not has_bridge(), reason="needs TransformerBridge")
def test_edits_come_off_a_model_with_blocks_that_cannot_be_edited(build, converts):
    converts("bridge", "JambaForCausalLM")
    model = build("bridge", "JambaForCausalLM")
    bases = {layer: w_out(model, layer).detach().clone() for layer in (0, 2)}
    for layer in bases:
        apply_edit(model, random_edit(model, layer=layer))
    with pytest.raises(NotImplementedError, match="no single dense W_out"):
        w_out(model, 1)
    assert [len(active_edits(model, layer)) for layer in range(3)] == [1, 0, 1]
    revert_all(model)
    assert all(torch.equal(w_out(model, layer), base) for layer, base in bases.items())


@pytest.mark.skipif(not has_bridge(), reason="needs TransformerBridge")
def test_a_bias_for_each_head_is_not_taken_for_one_of_each_row(build, converts):
    """MPT's has one entry a head, which as many rows could share."""
    converts("bridge", "MPTForCausalLM")
    model = build("bridge", "MPTForCausalLM")
    rows = [[3 * i + j for j in range(5)] for i in range(model.cfg.n_heads)]
    each, forward = torch.arange(len(rows)), PartialForward(model, 0, rows, [2] * len(rows))
    if forward.recording is None:
        pytest.skip("whole passes here: 3.9's bridge takes no rows of MPT from the middle on")
    changes = [
        [Change(adapter.Point("value", layer), each, torch.full_like(each, 2), torch.zeros_like)]
        for layer in (0, 1)
    ]
    last = torch.full_like(each, 4)
    single = torch.stack([forward.logits(one, each, last) for one in changes])
    assert torch.allclose(forward.variants(changes, each, last), single, atol=1e-4)


# ---------------------------------------------------------------- the checks notice faults


def _wrong_bias(patch, plain=adapter.b_out):
    patch.setattr(adapter, "b_out", lambda model, layer: plain(model, layer) + 1)


def _wrong_point(patch, plain=adapter.hook_name):
    """The key is read before the activation."""
    patch.setattr(adapter, "hook_name", lambda m, p: (plain(m, p) or "").replace("post", "pre"))


def _wrong_layer(patch, plain=adapter.parameter):
    other = lambda model, where: plain(model, where._replace(layer=where.layer - 1))  # noqa: E731
    patch.setattr(adapter, "parameter", other)


def _wrong_state(patch):
    patch.setitem(KINDS, "mlp", KINDS["attn"])


def _forgetful_text(patch, plain=passes.next_logits):
    """A cache that is lost at every step, and taken on trust."""
    patch.setattr(continuations, "_can_be_cached", lambda model: True)
    patch.setattr(passes, "next_logits", lambda model, new, cache: (plain(model, new)[0], None))


FAULTS = {
    "orientation": _wrong_bias,
    "rome": _wrong_point,
    "algebra": _wrong_layer,
    "tracing mlp": _wrong_state,
    "text": _forgetful_text,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_makes_a_family_half_served(monkeypatch, served, build, name):
    model = build(CLASSES[0], "GPTNeoForCausalLM")
    FAULTS[name](monkeypatch)
    found = served["verdict"].verdict(model)
    assert found["outcome"] == "half-served" and f"{name}: " in found["reason"], found
