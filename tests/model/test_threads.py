"""Two threads on one model wait for one another; each gets what it would get alone."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model
from helpers.rome_setting import LAYER, random_edit

from transformer_lens_rome import applied, causal_trace, target_log_probs
from transformer_lens_rome.model.adapter import w_out
from transformer_lens_rome.torch_states import torch_defaults

PROMPTS = ["Rome is in", "The Space Needle is in", "Cuba is in", "Paris is the capital of"]


def trace(model, prompt):
    return causal_trace(model, prompt, prompt.split(" is")[0], n_samples=2, progress=False).samples


@pytest.mark.slow
def test_traces_in_threads_are_those_of_a_loop(gpt2):
    expected = [trace(gpt2, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: trace(gpt2, prompt), PROMPTS * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert torch.equal(one, other)


def test_edits_in_threads_leave_the_very_bytes(gpt2):
    base, edits = w_out(gpt2, LAYER).detach().clone(), [random_edit(gpt2, seed=n) for n in range(4)]

    def on_and_off(edit):
        for _ in range(5):
            with applied(gpt2, edit):
                target_log_probs(gpt2, ["Rome is"], ["old"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(on_and_off, edits))
    assert torch.equal(w_out(gpt2, LAYER), base)


def test_an_error_in_one_thread_lets_the_next_one_in(gpt2):
    def fails():
        causal_trace(gpt2, "Rome is in", "Cuba", progress=False)

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="Cuba"):
        pool.submit(fails).result(timeout=60)
    trace(gpt2, PROMPTS[0])


def test_waiting_is_said(gpt2, caplog):
    inside, done = threading.Event(), threading.Event()

    def holds():
        with torch_defaults():
            inside.set()
            done.wait(60)

    with ThreadPoolExecutor(2) as pool, caplog.at_level("INFO"):
        holding = pool.submit(holds)
        inside.wait(60)
        waiting = pool.submit(trace, gpt2, PROMPTS[0])
        while "waiting for another thread" not in caplog.text:
            assert not waiting.done()
        done.set()
        holding.result(60)
        waiting.result(60)


def test_two_models_that_call_one_another_do_not_wait_for_ever(gpt2, model_class, tokenizer):
    other, both = make_model(model_class, "gpt2", tokenizer), threading.Barrier(2)

    def through(one, two):
        with torch_defaults():
            target_log_probs(one, ["Rome is"], ["old"])
            return target_log_probs(two, ["Rome is"], ["old"])[0]

    def start(one, two):
        both.wait(60)
        return through(one, two)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(start, *pair) for pair in ((gpt2, other), (other, gpt2))]
        assert torch.equal(*(one.result(timeout=60) for one in found))


@pytest.mark.slow
def test_a_shallow_copy_waits_too(gpt2):
    expected, twin = trace(gpt2, PROMPTS[0]), copy.copy(gpt2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda model: trace(model, PROMPTS[0]), [gpt2, twin] * 4))
    assert all(torch.equal(one, expected) for one in found)


def test_a_dtype_that_is_set_while_another_thread_runs_stays(gpt2):
    """What one thread sets is what it finds after its call, whoever else was running."""
    expected, inside, go = trace(gpt2, PROMPTS[0]), threading.Event(), threading.Event()

    def holds():
        with torch_defaults():
            inside.set()
            go.wait(60)

    try:
        with ThreadPoolExecutor(1) as pool:
            holding = pool.submit(holds)
            inside.wait(60)
            timer = threading.Timer(0.2, go.set)
            timer.start()
            found = trace(gpt2, PROMPTS[0])
            holding.result(60)
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(found, expected) and torch.equal(trace(gpt2, PROMPTS[0]), expected)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_with_other_default_dtypes_get_the_same(gpt2):
    expected = [trace(gpt2, prompt) for prompt in PROMPTS]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda prompt: trace(gpt2, prompt), PROMPTS))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
