"""An adapter is the edit, for PEFT: the exported model with it, the base's bits without it."""

import importlib
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import CLASSES, newest
from helpers.exported import SHAPES, close, load, logits, parts, setting_of
from helpers.rome_setting import LAYER, PREFIXES, factored_edit, random_edit, random_moment
from transformers import BitsAndBytesConfig

from transformer_lens_rome import (
    DenseEdit,
    EditRequest,
    RomeConfig,
    applied,
    export_hf,
    export_lora,
    rome_edit,
)
from transformer_lens_rome.edits import export_lora as lora
from transformer_lens_rome.edits.kinds import FactoredEdit
from transformer_lens_rome.model.adapter import Weight, w_out

peft = pytest.importorskip("peft", reason="the share extra is not installed")
rescale_adapter_scale = importlib.import_module("peft.helpers").rescale_adapter_scale

PATHS = {
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "llama": ("model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
    "gemma3": ("model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
    "opt": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
}


@pytest.fixture(params=SHAPES)
def setting(request, model_class, bos_tokenizer):
    return setting_of(request.param, model_class, bos_tokenizer)


def adapted_by(hf, folder, **options):
    """A Hugging Face model with an adapter; PEFT draws random numbers that the file replaces."""
    with torch.random.fork_rng(devices=[]):
        return peft.PeftModel.from_pretrained(hf, folder, **options).eval()


def several(model):
    """Edits of one matrix and of several, of ranks 1, 3 and 2."""
    places = [Weight(name, layer) for layer in (0, 2) for name in ("W_in", "W_out")]
    return [random_edit(model), random_edit(model, seed=1, rank=3), factored_edit(model, places)]


def test_peft_gives_the_exported_model_and_without_the_adapter_the_base(setting, tmp_path):
    model, edits = setting.model, several(setting.model)
    folder = export_lora(model, edits, tmp_path / "adapter", **setting.hf)
    with applied(model, *edits):
        exported = load(export_hf(model, tmp_path / "whole", **setting.hf))
    base = logits(setting.make())
    adapted = adapted_by(setting.make(), folder)
    close(logits(adapted), logits(exported))
    assert (logits(adapted) - base).abs().max() > 0.1  # control: the edits matter
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    merged, expected = adapted.merge_and_unload().state_dict(), exported.state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_files_are_peft_s_three(setting, tmp_path):
    model, edit = setting.model, random_edit(setting.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = export_lora(model, edit, tmp_path / "deep" / "adapter", **setting.hf)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    tensors, metadata, config = parts(folder)
    path = PATHS[setting.shape][1].format(LAYER)
    a, b = (tensors.pop(f"base_model.model.{path}.lora_{side}.weight") for side in "AB")
    assert not tensors and metadata == {"format": "pt"} and a.dtype == b.dtype == torch.float32
    assert a.shape == (1, len(edit.u)) and b.shape == (len(edit.lam), 1)
    assert torch.equal(b @ a, edit.delta().T)  # as the weights of a Linear lie: [out, in]
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # these models have no name on the Hub
        "revision": None,
        "inference_mode": True,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": setting.shape == "gpt2",
        "target_modules": [path],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_ranks_of_one_matrix_add_up_and_others_are_in_the_patterns(setting, tmp_path):
    edits = several(setting.model)
    tensors, _, config = parts(export_lora(setting.model, edits, tmp_path / "x", **setting.hf))
    w_in, out = PATHS[setting.shape]
    twos = [path.format(layer) for layer in (0, 2) for path in (w_in, out)]
    assert sorted(config["target_modules"]) == sorted([*twos, out.format(LAYER)])
    assert config["r"] == config["lora_alpha"] == 2  # the most frequent rank
    assert config["rank_pattern"] == config["alpha_pattern"] == {out.format(LAYER): 4}
    change = sum(edit.delta() for edit in edits[:2])
    a, b = (tensors[f"base_model.model.{out.format(LAYER)}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(b @ a, change.T, rtol=1e-5, atol=1e-6)


def test_factors_of_very_different_size_are_balanced_without_rounding(gpt2):
    edit = random_edit(gpt2)
    u, lam = 3e4 * edit.u, 1e-6 * edit.lam
    pair = lora.factors_of(
        FactoredEdit.of(
            {Weight("W_out", 1): (u[:, None], lam[None])},
            {Weight("W_out", 1): ""},
            request=edit.request,
        )
    )
    ((left, right),) = lora._stacked([pair]).values()
    assert torch.equal(left @ right, torch.outer(u, lam))
    assert 0.5 <= left.norm() / right.norm() <= 2 and u.norm() / lam.norm() > 1e10
    half = right.half().float()  # what a server in float16 keeps
    assert ((half - right).norm() / right.norm()) < 1e-3
    assert ((lam.half().float() - lam).norm() / lam.norm()) > 1e-2  # control


def test_edits_on_the_model_give_the_same_adapter(setting, tmp_path):
    """Also those that were made one after another, so that each has another hash."""
    model = setting.model
    requests = [EditRequest("{}", "The Space Needle", new) for new in ("Paris", "Rome")]
    moment, config = random_moment(len(w_out(model, LAYER))), RomeConfig(steps=2, lr=0.2)
    options = {"layer": LAYER, "second_moment": moment, "prefixes": PREFIXES, "config": config}
    with rome_edit(model, requests, progress=False, **options) as on:
        folder = export_lora(model, on, tmp_path / "on", **setting.hf)
        whole = load(export_hf(model, tmp_path / "whole", **setting.hf))
    adapted = adapted_by(setting.make(), folder)
    close(logits(adapted), logits(whole))
    with pytest.raises(ValueError, match="not the weight that this edit was made on"):
        export_lora(model, list(on.edits), tmp_path / "off", **setting.hf)  # the second is for both
    off = export_lora(model, list(on.edits), tmp_path / "off", force=True, **setting.hf)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (off / name).read_bytes() == (folder / name).read_bytes()


def test_an_adapter_is_scaled_as_the_edit_is(setting, tmp_path):
    model, edit = setting.model, random_edit(setting.model)
    folder = export_lora(model, edit, tmp_path / "adapter", **setting.hf)
    adapted = adapted_by(setting.make(), folder)
    for alpha in (0.5, -1.0):
        with applied(model, edit * alpha), rescale_adapter_scale(adapted, alpha):
            torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-3, atol=1e-4)


def test_one_adapter_for_each_edit(setting, tmp_path):
    """Switched, and put together by PEFT."""
    model, edits = setting.model, several(setting.model)[:2]
    for name, edit in zip("ab", edits, strict=True):
        export_lora(model, edit, tmp_path / name, **setting.hf)
    adapted = adapted_by(setting.make(), tmp_path / "a", adapter_name="a")
    with torch.random.fork_rng(devices=[]):
        adapted.load_adapter(tmp_path / "b", "b")
        adapted.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="cat")
    for name, some in {"a": edits[:1], "b": edits[1:], "both": edits}.items():
        adapted.set_adapter(name)
        with applied(model, *some):
            torch.testing.assert_close(logits(adapted.eval()), logits(model), rtol=1e-3, atol=1e-4)


_PLAIN = """
import sys
sys.modules["transformer_lens_rome"] = sys.modules["transformer_lens"] = None  # not to be had
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save(model(torch.tensor([[1, 37, 74, 111, 148]])).logits, out)
"""


@newest
@pytest.mark.slow
def test_plain_transformers_and_peft_load_it(bos_tokenizer, tmp_path):
    setting = setting_of("llama", CLASSES[0], bos_tokenizer)
    model, edit = setting.model, random_edit(setting.model)
    setting.make().save_pretrained(tmp_path / "base")
    export_lora(model, edit, tmp_path / "adapter", **setting.hf)
    command = [sys.executable, "-c", _PLAIN, *(str(tmp_path / x) for x in ("base", "adapter", "x"))]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    with applied(model, edit):
        whole = load(export_hf(model, tmp_path / "whole", **setting.hf))
    close(torch.load(tmp_path / "x", weights_only=True), logits(whole))


@pytest.mark.parametrize("bits", [8, 4])
def test_it_acts_on_a_quantised_copy(model_class, bos_tokenizer, tmp_path, bits):
    """Which this package does not edit: the adapter adds there what the edit adds."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the test extra)")
    setting = setting_of("llama", model_class, bos_tokenizer)
    edit = random_edit(setting.model)
    setting.make().save_pretrained(tmp_path / "base")
    folder = export_lora(setting.model, edit, tmp_path / "adapter", **setting.hf)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    quantised = load(tmp_path / "base", quantization_config=config, device_map="cpu")
    module = quantised.get_submodule(f"model.layers.{LAYER}.mlp.down_proj")
    assert not module.weight.is_floating_point()
    base = logits(quantised)
    add = lambda _module, keys, values: values + keys[0] @ edit.delta().to(keys[0])  # noqa: E731
    handle = module.register_forward_hook(add)
    expected = logits(quantised)
    handle.remove()
    adapted = adapted_by(quantised, folder)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-2, atol=1e-2)
    assert (expected - base).abs().max() > 0.5  # control
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)


# ---------------------------------------------------------------- a change without factors


def trained(model):
    """A change of the whole W_out, as FT makes it."""
    edit = random_edit(model, rank=5)
    noise = 1e-3 * torch.randn(edit.delta().shape, generator=torch.Generator().manual_seed(5))
    return DenseEdit(
        layer=LAYER, request=edit.request, model_hash=edit.model_hash, left=edit.delta() + noise
    )


def test_a_whole_matrix_is_approximated_only_when_asked_and_the_loss_is_said(
    setting, tmp_path, caplog
):
    model, edit = setting.model, trained(setting.model)
    for rank, message in ((None, "pass rank="), (0, "from 1 to"), (99, "from 1 to"), (2.0, "from")):
        with pytest.raises(ValueError, match=message):
            export_lora(model, edit, tmp_path / "x", rank=rank, **setting.hf)
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.WARNING):
        folder = export_lora(model, edit, tmp_path / "three", rank=3, **setting.hf)
    sizes = torch.linalg.svdvals(edit.left)
    lost = (sizes[3:].norm() / sizes.norm()).item()
    assert 0.1 < lost < 0.9  # control: something is lost
    assert f"{100 * lost:.2f}% of the norm" in caplog.text
    assert f"without {lost:.2%} of its norm" in (folder / "README.md").read_text()
    tensors, _, config = parts(folder)
    a, b = (next(t for n, t in tensors.items() if f"lora_{side}" in n) for side in "AB")
    assert config["r"] == 3 and (b @ a - edit.left.T).norm() / edit.left.norm() == pytest.approx(
        lost, rel=1e-3
    )
    whole = export_lora(model, edit, tmp_path / "all", rank=min(edit.left.shape), **setting.hf)
    adapted = adapted_by(setting.make(), whole)
    with applied(model, edit):
        torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-3, atol=1e-4)
