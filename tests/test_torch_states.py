"""Every result is the same in whatever state torch is, and the state is the caller's again after.

States that torch keeps for a process, a thread or a context change what the same code computes. One
test runs everything that the package computes in each of them, and compares it bit by bit.
"""

import dataclasses
import functools
import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import CLASSES, make_model
from helpers.rome_setting import LAYER, NEAR, PREFIXES, random_edit, random_moment, small_edit

from transformer_lens_rome import (
    SecondMoment,
    applied,
    apply_edit,
    average_traces,
    causal_trace,
    collect_second_moment,
    evaluate_counterfact,
    get_method,
    load_edit,
    revert_all,
    sampled_texts,
    severed_trace,
    show_edit,
    target_log_probs,
    top_tokens,
)
from transformer_lens_rome.evaluation import CounterFactRecord
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.torch_states import torch_defaults

TEXTS = ["The Eiffel Tower is located in the city of Paris.", "Rome is the capital of Italy."] * 8
RECORD = CounterFactRecord(
    0,
    dataclasses.replace(NEAR, prompt="{} is in", target_true="Rome"),
    ("The Space Needle stands in",),
    ("The Colosseum is in",),
)


@contextmanager
def setting(get, set_, value):
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


def default_dtype(dtype):
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def precision(name):
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, name)


@contextmanager
def default_device(name):
    """`torch.set_default_device`, which stays until it is set again."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def backend_precision():
    """The precision of one backend alone, after which torch refuses to read that of all."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast without a cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "default device set": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic algorithms": deterministic,
    "low matmul precision": lambda: precision("medium"),
    "one backend's precision": backend_precision,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors rounded": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor,
        lambda tensor: tensor.float() if tensor.is_floating_point() else tensor,
    ),
    "saved tensors' hooks disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks("no"),
}


def everything(model, folder):
    """What each part of the package computes, as plain values and tensors."""
    edit = small_edit(model, NEAR)
    edit.save(folder / "edit.safetensors")
    ft = get_method("ft", layer=LAYER, steps=3).compute(model, NEAR)
    kn = get_method("kn", steps=3).compute(model, RECORD.request)
    moment = collect_second_moment(model, TEXTS, LAYER, max_tokens=200, progress=False)
    moment.save(folder / "moment.safetensors")
    trace = causal_trace(model, NEAR.subject + " is in", NEAR.subject, progress=False)
    severed = severed_trace(model, NEAR.subject + " is in", NEAR.subject, progress=False)
    rome = Rome(LAYER, random_moment(len(w_out(model, LAYER))), PREFIXES)
    run = evaluate_counterfact(model, [RECORD], rome, progress=False)
    report = show_edit(model, edit, n_samples=2, progress=False)
    with applied(model, edit):
        p_edited = target_log_probs(model, ["The Space Needle"], ["Paris"])
    return {
        "edit": edit.tensors(),
        "scaled": load_edit(folder / "edit.safetensors").scale(0.5).delta(),
        "losses": edit.health.losses,
        "p": (edit.health.p_before, edit.health.p_after),
        "ft": ft.tensors(),
        "kn": kn.tensors(),
        "neurons": kn.provenance["neurons"],
        "C": moment.sum_kk,
        "C again": SecondMoment.load(folder / "moment.safetensors").C,
        "agreement": moment.half_agreement,
        "solved": moment.solve(edit.k_star, ridge=0.1),
        "trace": (trace.samples, trace.corrupted_samples, trace.p_clean),
        "average": average_traces([trace, trace]).to_dataframe().to_csv(),
        "severed": (severed.ordinary, severed.severed),
        "row": (run.after[0].scores, run.scores(), run.compare(run)),
        "report": (report.shares, report.before.samples, report.after.samples),
        "edited": p_edited,
        "texts": sampled_texts(model, 3, length=6, progress=False),
        "top": top_tokens(model, "The Space Needle is", 3),
    }


def flat(value):
    """Tensors and plain values in order, tensors with their dtype and device."""
    if isinstance(value, torch.Tensor):
        return [(value.dtype, value.device, value.detach().clone().numpy().tobytes())]
    if isinstance(value, dict):
        return [part for key in value for part in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flat(item)]
    return [repr(value)]


def states_of_torch():
    """Whatever the caller might find changed."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer, bos_tokenizer):
    """A model of the first class that there is, and what is computed in torch's own state."""

    @functools.cache
    def of(shape):
        model = make_model(CLASSES[0], shape, bos_tokenizer if shape == "gemma3" else tokenizer)
        return model, everything(model, tmp_path_factory.mktemp("plain"))

    return of


CASES = [("gpt2", state) for state in STATES]
CASES += [("gemma3", state) for state in STATES if "bfloat16" in state]
"""Gemma 3, which takes twice as long, in states that another arithmetic could hide in."""


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "state"), CASES)
def test_everything_is_the_same_in_any_state(plain, shape, state, tmp_path):
    model, expected = plain(shape)
    weights = [w_out(model, layer).detach().clone() for layer in range(model.cfg.n_layers)]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch says that anomaly detection is slow
        stack.enter_context(STATES[state]())
        before = states_of_torch()
        found = everything(model, tmp_path)
        assert states_of_torch() == before
        model._rome_trials.clear()  # trials are made in that state, too
        again = top_tokens(model, "The Space Needle is", 3)
    for name in expected:
        assert flat(found[name]) == flat(expected[name]), name
    assert again == expected["top"]
    for layer, weight in enumerate(weights):
        assert torch.equal(weight, w_out(model, layer))


def test_an_edit_reaches_a_pass_in_autocast_and_undo_does_too(gpt2):
    """Autocast holds copies of weights in the other dtype, which no write to a weight reaches."""
    tokens, edit = torch.tensor([[5, 6, 7, 8]]), random_edit(gpt2)
    with torch.autocast("cpu", torch.bfloat16):
        before = gpt2(tokens).float().detach()
        undo = apply_edit(gpt2, edit)
        inside = gpt2(tokens).float().detach()
        undo.revert()
        after = gpt2(tokens).float().detach()
    with torch.autocast("cpu", torch.bfloat16), applied(gpt2, edit):
        expected = gpt2(tokens).float().detach()
    assert torch.equal(before, after)
    assert torch.equal(inside, expected) and (inside - before).abs().max() > 0.1


def test_a_state_is_back_after_an_exception(gpt2):
    with default_dtype(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        before = states_of_torch()
        with pytest.raises(ValueError, match="subject"):
            causal_trace(gpt2, "The Space Needle is in", "Big Ben", progress=False)
        assert states_of_torch() == before


def test_states_are_restored_level_by_level():
    with default_dtype(torch.float64), precision("medium"):
        with torch_defaults():
            assert torch.get_default_dtype() == torch.float32
            assert torch.get_float32_matmul_precision() == "highest"
            with torch_defaults():
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "medium"


def test_a_model_made_in_inference_mode_is_traced_but_not_edited(model_class, tokenizer):
    plain = make_model(model_class, "gpt2", tokenizer)
    with torch.inference_mode():
        model = make_model(model_class, "gpt2", tokenizer)
    subject = "The Space Needle"
    traces = [causal_trace(m, subject + " is in", subject, progress=False) for m in (plain, model)]
    assert torch.equal(traces[0].samples, traces[1].samples)
    for call in (
        lambda: small_edit(model),
        lambda: apply_edit(model, random_edit(plain)),
        lambda: get_method("ft").compute(model, NEAR),
    ):
        with pytest.raises(ValueError, match="inference_mode.*load the model outside"):
            call()
    revert_all(model)


def test_statistics_made_in_inference_mode_go_on_outside():
    keys = torch.arange(12.0).reshape(4, 3)
    with torch.inference_mode():
        moment = SecondMoment.empty(3)
        moment.update(keys)
    moment.update(keys)
    assert torch.equal(moment.sum_kk, 2 * (keys.T @ keys).double())
