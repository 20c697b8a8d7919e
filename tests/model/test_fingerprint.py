"""A method that leaves the model other than it found it ends the run, however it did that."""

import json

import pytest
import torch
from conftest import make_model
from helpers.evaluation_setting import RECORDS, RandomEdits, evaluate
from helpers.rome_setting import LAYER, REQUEST, random_edit
from helpers.tiny_models import SHAPES, hooked_shapes

from transformer_lens_rome import causal_trace, get_method, sampled_texts
from transformer_lens_rome.edits.ledger import apply_edit
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.model.fingerprint import Fingerprint, checksum


def first_matrix(model):
    return next(p for p in model.parameters() if p.ndim == 2)


def through_data(model):
    w_out(model, LAYER).data += 1e-3


def through_numpy(model):
    w_out(model, LAYER).detach().numpy()[0, 0] += 1e-3


def rows_swapped(model):
    weight = first_matrix(model).data
    weight[[0, 1]] = weight[[1, 0]]


def columns_swapped(model):
    weight = first_matrix(model).data
    weight[:, [0, 1]] = weight[:, [1, 0]]


def other_storage(model):
    weight = first_matrix(model)
    weight.data = weight.data * 1.01


def replaced(model):
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim == 2:
                module._parameters[name] = torch.nn.Parameter(weight.detach() + 1e-3)
                return


def hook_at_a_point(model):
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda x, hook: x + 1, is_permanent=True)


def hook_on_a_module(model):
    model.blocks[0].register_forward_hook(lambda _module, _args, out: out)


def training_flag(model):
    model.blocks[0].train()


def an_edit_left_on(model):
    apply_edit(model, random_edit(model, layer=2, seed=9))


def signs_flipped(model):
    weight = first_matrix(model).data
    weight[:, 1::2] = -weight[:, 1::2]


def a_buffer(model):
    found = [b for n, b in model.named_buffers() if b.numel() > 1]
    if not found:
        pytest.skip("this model has no buffers")
    found[0].data.logical_not_() if found[0].dtype == torch.bool else found[0].data.add_(1)


def gradients_switched_off(model):
    first_matrix(model).requires_grad_(not first_matrix(model).requires_grad)


def another_class(model):
    class Mine(type(model.blocks[1])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.blocks[1].__class__ = Mine


def an_option_of_the_configuration(model):
    model.cfg.output_logits_soft_cap = 3.0


def more_tokens(model):
    model.tokenizer.add_tokens(["Needle"])


def a_hook_for_all_modules(model):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    HANDLES.append(handle)


def an_edit_of_nothing_left_on(model):
    apply_edit(model, random_edit(model, layer=2, seed=9, strength=0.0))


HANDLES = []


@pytest.fixture(autouse=True)
def _no_hooks_stay():
    yield
    while HANDLES:
        HANDLES.pop().remove()


DAMAGES = [
    signs_flipped,
    a_buffer,
    gradients_switched_off,
    another_class,
    an_option_of_the_configuration,
    more_tokens,
    a_hook_for_all_modules,
    an_edit_of_nothing_left_on,
    through_data,
    through_numpy,
    rows_swapped,
    columns_swapped,
    other_storage,
    replaced,
    hook_at_a_point,
    hook_on_a_module,
    training_flag,
    an_edit_left_on,
]


class Damages(RandomEdits):
    """Leaves the model damaged, from one record on, or when it is prepared."""

    def __init__(self, damage, at):
        super().__init__()
        object.__setattr__(self, "damage", damage)
        object.__setattr__(self, "at", at)

    def compute(self, model, request, *, seed=0):
        if self.at == request.subject:
            self.damage(model)
        return super().compute(model, request, seed=seed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_damage_ends_the_run_at_its_record(gpt2, damage, tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError, match="has changed after record 1"):
        evaluate(gpt2, Damages(damage, RECORDS[1].request.subject), out=path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["case_id"] for row in rows[1:]] == [0]  # of the damaged model there is none


def test_a_second_run_on_the_damaged_model_is_another_run(gpt2, tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.raises(RuntimeError):
        evaluate(gpt2, Damages(through_data, RECORDS[1].request.subject), out=path)
    with pytest.raises(ValueError, match="another model_hash"):
        evaluate(gpt2, Damages(through_data, None), out=path)


def test_damage_in_preparation_is_seen_too(gpt2, tmp_path):
    class Prepares(RandomEdits):
        def prepared(self, model, *, seed=0):
            through_data(model)
            return self

    with pytest.raises(RuntimeError, match="after the method was prepared"):
        evaluate(gpt2, Prepares())


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_an_unharmed_model_passes(model_class, shape, tokenizer):
    """No false alarm: what passes, edits, traces and text leave behind is no damage."""
    if model_class == "hooked" and shape not in hooked_shapes():
        pytest.skip("no such HookedTransformer here")
    model = make_model(model_class, shape, tokenizer)
    before = Fingerprint.of(model)
    apply_edit(model, random_edit(model)).revert()
    before.check(model, "an edit and its undo")
    causal_trace(model, "Rome is in", "Rome", n_samples=2, progress=False)
    sampled_texts(model, 2, length=60, progress=False)
    get_method("ft", steps=2).compute(model, REQUEST)
    model(torch.tensor([list(range(1, 100))]))
    before.check(model, "passes")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3,), (1023,), (2048, 5), (640, 2048), (7, 3, 1024), (0,)])
def test_any_bit_and_any_swap_changes_a_checksum(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(-100, 100, shape, generator=generator).to(dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    flat = tensor.reshape(-1)
    for at in sorted({0, len(flat) // 2, len(flat) - 1}) if len(flat) else ():
        held = flat[at].item()
        flat[at] = held + 1
        assert checksum(tensor) != before
        flat[at] = held
    if len(flat) > 1:
        i, j = 0, int((flat != flat[0]).nonzero()[-1])
        flat[[i, j]] = flat[[j, i]]
        assert checksum(tensor) != before
        flat[[i, j]] = flat[[j, i]]
    assert checksum(tensor) == before
    if len(flat) > 1 and dtype.is_floating_point:  # signs, of every second number and of all
        for some in (flat[::2], flat[1::2], flat):
            some.neg_()
            assert checksum(tensor) != before
            some.neg_()
    if shape == (640, 2048) and dtype is not torch.int8:  # a matrix of a usual size
        for rows in ([3, 7], [0, 1]):
            for some, back in ((tensor[rows].flip(0), tensor[rows]), (-tensor[rows], tensor[rows])):
                tensor[rows] = some
                assert checksum(tensor) != before
                tensor[rows] = back
        for columns in ([0, 1], [8, 16], [5, 2000]):
            held = tensor[:, columns].clone()
            tensor[:, columns] = held.flip(1)
            assert checksum(tensor) != before
            tensor[:, columns] = held
    if tensor.ndim == 2:  # the same content, wherever and however it lies
        assert checksum(tensor.T.contiguous().T) == before
        padded = torch.zeros(tensor.numel() + 1, dtype=dtype)[1:].view(shape)
        assert checksum(padded.copy_(tensor)) == before
