"""An edited model is never taken for a clean one, whatever became of the parameter object.

Copies, pickles and reloads of an edited model either know of its edits, or say that they cannot be
taken off any more and what to do.
"""

import copy
import io
import pickle

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.rome_setting import LAYER, random_edit
from helpers.tiny_models import has_bridge
from torch import nn
from torch.nn.utils import parametrize, prune

from transformer_lens_rome import applied, apply_edit, causal_trace, revert_all
from transformer_lens_rome.edits.ledger import active_edits, check_unedited, edited_weights
from transformer_lens_rome.model.adapter import Weight, holder, owner, parameter, w_out


def pickled(model):
    data = io.BytesIO()
    pickle.Pickler(data).dump(model)
    return pickle.loads(data.getvalue())


def frozen(model):
    """A bridge with joined matrices can be copied only without gradients."""
    return model.requires_grad_(False)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma3"])
def test_a_deep_copy_knows_its_edits(model_class, shape, bos_tokenizer):
    model = frozen(make_model(model_class, shape, bos_tokenizer))
    base, other = w_out(model, LAYER).detach().clone(), w_out(model, 0).detach().clone()
    first, second = random_edit(model), random_edit(model, layer=0)
    undo, _ = apply_edit(model, first), apply_edit(model, second)
    twin = copy.deepcopy(model)
    edited = w_out(twin, LAYER).detach().clone()
    assert not torch.equal(edited, base) and len(edited_weights(twin)) == 2
    with pytest.raises(ValueError, match=r"revert_all\(model\)"):
        check_unedited(twin)
    undo.revert()
    assert torch.equal(w_out(model, LAYER), base) and torch.equal(w_out(twin, LAYER), edited)
    with applied(twin, random_edit(twin, seed=3)):  # on top of the copy's own
        assert len(active_edits(twin, LAYER)) == 2
    revert_all(twin)
    assert torch.equal(w_out(twin, LAYER), base) and torch.equal(w_out(twin, 0), other)
    assert edited_weights(twin) == [] and edited_weights(model) == [Weight("W_out", 0)]
    revert_all(model)


@pytest.mark.skipif("hooked" not in CLASSES, reason="torch cannot pickle a bridge")
def test_a_pickled_model_knows_its_edits(tokenizer):
    model = make_model("hooked", "gpt2", tokenizer)
    base = w_out(model, LAYER).detach().clone()
    apply_edit(model, random_edit(model))
    twin = pickled(model)
    assert edited_weights(twin) == [Weight("W_out", LAYER)]
    revert_all(twin)
    assert torch.equal(w_out(twin, LAYER), base) and edited_weights(twin) == []


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_its_own_changes_nothing(gpt2, assign):
    base, edit = w_out(gpt2, LAYER).detach().clone(), random_edit(gpt2)
    undo = apply_edit(gpt2, edit)
    state = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    gpt2.load_state_dict(state, assign=assign)
    with pytest.raises(ValueError, match="revert_all"):
        check_unedited(gpt2)
    undo.revert()
    assert torch.equal(w_out(gpt2, LAYER), base) and edited_weights(gpt2) == []


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_that_is_loaded_over_edits_takes_them_off(gpt2, assign):
    state = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    base = w_out(gpt2, LAYER).detach().clone()
    one, two = (apply_edit(gpt2, random_edit(gpt2, seed=seed)) for seed in (1, 2))
    gpt2.load_state_dict(state, assign=assign)
    one.revert()  # the other does not come back with it
    assert torch.equal(w_out(gpt2, LAYER), base) and not two.active
    assert edited_weights(gpt2) == []
    with applied(gpt2, random_edit(gpt2, seed=3)):
        assert len(active_edits(gpt2, LAYER)) == 1
    assert torch.equal(w_out(gpt2, LAYER), base)


def process(model):
    if hasattr(model, "enable_compatibility_mode"):
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)


def test_weights_processed_with_an_edit_on_are_said_to_be_lost(gpt2):
    undo = apply_edit(gpt2, random_edit(gpt2))
    process(gpt2)
    for call in (undo.revert, lambda: undo.revert(force=True), lambda: revert_all(gpt2)):
        with pytest.raises(ValueError, match="processed.*reload the model"):
            call()
    with pytest.raises(ValueError, match="there are edits"):
        check_unedited(gpt2)
    with pytest.raises(ValueError, match="changed by something else"):
        apply_edit(gpt2, random_edit(gpt2, seed=1))


def test_an_edit_that_processing_left_alone_comes_off(model_class, bos_tokenizer):
    """RMS norms fold into W_in and W_gate only."""
    model = make_model(model_class, "llama", bos_tokenizer)
    base = w_out(model, LAYER).detach().clone()
    undo = apply_edit(model, random_edit(model))
    if hasattr(model, "enable_compatibility_mode"):
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    undo.revert()
    assert torch.equal(w_out(model, LAYER), base)


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_dtype_is_noticed(gpt2, overwrite):
    """Torch may put a new parameter in the place of the old one when it converts."""
    base, undo = w_out(gpt2, LAYER).detach().clone(), apply_edit(gpt2, random_edit(gpt2))
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        gpt2.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(ValueError, match="there are edits"):
        check_unedited(gpt2)
    with pytest.raises(ValueError, match=r"or its dtype, was changed.*force=True"):
        undo.revert()
    undo.revert(force=True)
    assert torch.equal(w_out(gpt2, LAYER), base.double()) and edited_weights(gpt2) == []


@pytest.mark.skipif(not has_bridge(), reason="no bridge")
def test_two_bridges_around_one_model_share_what_they_know(tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    one = make_model("bridge", "llama", tokenizer)
    other = TransformerBridge.boot_transformers(
        "tiny-llama", hf_model=one.original_model, tokenizer=tokenizer, device="cpu"
    )
    assert w_out(other, LAYER).data_ptr() == w_out(one, LAYER).data_ptr()
    base = w_out(one, LAYER).detach().clone()
    apply_edit(one, random_edit(one))
    with pytest.raises(ValueError, match="there are edits"):
        check_unedited(other)
    revert_all(other)
    assert torch.equal(w_out(one, LAYER), base) and edited_weights(one) == []


def test_a_block_that_moves_takes_its_edit_with_it(gpt2, tokenizer, model_class):
    """Blocks of two models swapped: the edit is known where its weights are."""
    other = make_model(model_class, "gpt2", tokenizer, seed=1)
    apply_edit(gpt2, random_edit(gpt2))
    gpt2.blocks[LAYER], other.blocks[LAYER] = other.blocks[LAYER], gpt2.blocks[LAYER]
    assert edited_weights(other) and not active_edits(gpt2, LAYER)
    revert_all(other)
    assert edited_weights(other) == []


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_keeps_nothing_is_refused(gpt2):
    where = Weight("W_out", LAYER)
    module = holder(gpt2, where)
    name = next(n for n, p in module.named_parameters(recurse=False) if p.shape[0] != p.numel())
    name = "W_out" if "W_out" in dict(module.named_parameters(recurse=False)) else name
    edit = random_edit(gpt2)
    parametrize.register_parametrization(module, name, Doubled())
    before = parameter(gpt2, where).detach().clone()
    with pytest.raises((NotImplementedError, ValueError), match="computed from other tensors"):
        apply_edit(gpt2, edit, force=True)
    assert torch.equal(parameter(gpt2, where), before) and edited_weights(gpt2) == []


def test_an_edit_is_known_while_hooks_run(gpt2):
    """What a trace reads of an edited model is the edited model's."""
    plain = causal_trace(gpt2, "Paris is in", "Paris", n_samples=2, progress=False).p_clean
    apply_edit(gpt2, random_edit(gpt2, strength=1.0))
    twin = copy.deepcopy(frozen(gpt2))
    edited = causal_trace(twin, "Paris is in", "Paris", n_samples=2, progress=False).p_clean
    revert_all(twin)
    again = causal_trace(twin, "Paris is in", "Paris", n_samples=2, progress=False).p_clean
    assert edited != plain and again == plain


def test_an_edit_whose_weight_was_pruned_is_not_forgotten(gpt2):
    where, undo = Weight("W_out", LAYER), apply_edit(gpt2, random_edit(gpt2))
    module = holder(gpt2, where)
    name = next(n for n, p in module._parameters.items() if p is owner(parameter(gpt2, where)))
    prune.identity(module, name)
    for call in (undo.revert, lambda: revert_all(gpt2), lambda: revert_all(gpt2, force=True)):
        with pytest.raises(ValueError, match="computes it at each pass now.*reload the model"):
            call()
    with pytest.raises(NotImplementedError, match="prune"):
        apply_edit(gpt2, random_edit(gpt2, seed=1))
    prune.remove(module, name)
    revert_all(gpt2)
    assert edited_weights(gpt2) == []


def test_one_block_in_two_places_has_one_layer(gpt2):
    gpt2.blocks[2] = gpt2.blocks[1]
    base = w_out(gpt2, 1).detach().clone()
    undo = apply_edit(gpt2, random_edit(gpt2, layer=1))
    with pytest.raises(NotImplementedError, match="same parameter"):
        apply_edit(gpt2, random_edit(gpt2, layer=2, seed=1))
    undo.revert()
    assert torch.equal(w_out(gpt2, 1), base)
