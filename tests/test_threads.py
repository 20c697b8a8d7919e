"""Two threads on one model wait for one another; each gets what it would get alone."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rome_setting import LAYER, random_edit, small_edit

from transformer_lens_rome import applied, causal_trace, revert_all, target_log_probs
from transformer_lens_rome.adapter import w_out
from transformer_lens_rome.model_call import alone_on

PROMPTS = ["Rome is in", "The Space Needle is in", "Cuba is in", "Paris is the capital of"]


def trace(model, prompt):
    return causal_trace(model, prompt, prompt.split(" is")[0], n_samples=2, progress=False).samples


def test_traces_in_threads_are_those_of_a_loop(gpt2, one_thread):
    expected = [trace(gpt2, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: trace(gpt2, prompt), PROMPTS * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert torch.equal(one, other)


def test_edits_in_threads_leave_the_very_bytes(gpt2, one_thread):
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
        with alone_on(gpt2):
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


def test_a_copy_is_not_locked_with_its_model(gpt2):
    gpt2.requires_grad_(False)
    with alone_on(gpt2), ThreadPoolExecutor(1) as pool:
        twin = copy.deepcopy(gpt2)
        pool.submit(small_edit, twin).result(timeout=60)
    revert_all(twin)


def test_threads_with_other_default_dtypes_get_the_same(gpt2, one_thread):
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
