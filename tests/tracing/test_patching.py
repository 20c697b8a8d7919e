"""Windows for activation patching agree with the host's functions and with `causal_trace`."""

from __future__ import annotations

import pytest
import torch
import transformer_lens.patching as host

from transformer_lens_rome.tracing.causal_trace import causal_trace
from transformer_lens_rome.tracing.patching import get_act_patch_window, window_of

CLEAN, OTHER = torch.tensor([[3, 8, 2, 9, 4]]), torch.tensor([[3, 5, 7, 9, 4]])
HOST = {"mlp": host.get_act_patch_mlp_out, "attn": host.get_act_patch_attn_out}


def metric(logits):
    return logits[0, -1].log_softmax(-1)[11]


def each(logits):
    return logits[:, -1].log_softmax(-1)[:, 11]


@pytest.mark.parametrize("kind", HOST)
@torch.no_grad()
def test_a_window_of_one_is_what_the_host_does(gpt2, kind):
    _, cache = gpt2.run_with_cache(CLEAN)
    found = get_act_patch_window(gpt2, OTHER, cache, metric, kind=kind, window=1, progress=False)
    torch.testing.assert_close(found, HOST[kind](gpt2, OTHER, cache, metric).to(found))
    wide = get_act_patch_window(gpt2, OTHER, cache, metric, kind=kind, window=3, progress=False)
    assert not torch.allclose(found, wide, atol=1e-3)


@torch.no_grad()
def test_residuals_are_patched_one_layer_at_a_time(gpt2):
    _, cache = gpt2.run_with_cache(CLEAN)
    found = get_act_patch_window(gpt2, OTHER, cache, metric, kind="resid", progress=False)
    for layer in range(3):
        hook = (f"blocks.{layer}.hook_resid_post", lambda old, hook: _put(old, cache[hook.name]))
        torch.testing.assert_close(
            found[layer, 2], metric(gpt2.run_with_hooks(OTHER, fwd_hooks=[hook]))
        )


@torch.no_grad()
def test_positions_and_windows(gpt2):
    _, cache = gpt2.run_with_cache(CLEAN)
    options = {"kind": "mlp", "window": 2, "progress": False}
    every = get_act_patch_window(gpt2, OTHER, cache, metric, **options)
    some = get_act_patch_window(gpt2, OTHER, cache, metric, positions=[2], **options)
    assert torch.equal(some, every[:, [2]]) and every.shape == (3, 5)
    hooks = [
        (f"blocks.{layer}.hook_mlp_out", lambda old, hook: _put(old, cache[hook.name]))
        for layer in (0, 1)
    ]
    wanted = metric(gpt2.run_with_hooks(OTHER, fwd_hooks=hooks))
    torch.testing.assert_close(every[1, 2], wanted)
    assert list(window_of(8, 10, 18)) == list(range(3, 13))
    assert list(window_of(0, 3, 18)) == [0, 1] and list(window_of(17, 4, 18)) == [15, 16, 17]


def _put(old, clean):
    old = old.clone()
    old[:, 2] = clean[:, 2]
    return old


@torch.no_grad()
def test_per_sample_results_are_the_hosts(gpt2):
    pytest.importorskip("transformer_lens.utilities.statistics", reason="no PatchingResult yet")
    _, cache = gpt2.run_with_cache(CLEAN.expand(2, -1))
    other = torch.cat([OTHER, OTHER.flip(1)])
    options = {"kind": "mlp", "window": 1, "reduce": "none", "progress": False}
    found = get_act_patch_window(gpt2, other, cache, each, **options)
    theirs = host.get_act_patch_mlp_out(gpt2, other, cache, each, reduce="none", baseline=True)
    torch.testing.assert_close(found.values, theirs.values.to(found.values))
    torch.testing.assert_close(found.baseline, theirs.baseline.to(found.baseline))
    assert found.axis_names == theirs.axis_names
    assert found.index_df.equals(theirs.index_df)
    assert list(found.to_dataframe()) == list(theirs.to_dataframe())


def test_a_trace_becomes_a_patching_result(gpt2):
    trace = causal_trace(
        gpt2, "Space Needle is", "Space Needle", noise_std=1.0, n_samples=4, progress=False
    )
    if not hasattr(host, "PatchingResult"):
        with pytest.raises(ImportError, match="to_dataframe"):
            trace.to_patching_result()
        return
    result = trace.to_patching_result()
    torch.testing.assert_close(result.mean(), trace.scores)
    torch.testing.assert_close(result.effect().mean(-1), trace.indirect_effect)
    assert len(result.to_dataframe()) == trace.samples.numel()


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"kind": "key"}, "kind must be one of"),
        ({"window": 0}, "window must be at least 1"),
        ({"reduce": "mean"}, "'scalar' or 'none'"),
    ),
)
@torch.no_grad()
def test_bad_input(gpt2, options, words):
    _, cache = gpt2.run_with_cache(CLEAN)
    with pytest.raises(ValueError, match=words):
        get_act_patch_window(gpt2, OTHER, cache, metric, **options)
    with pytest.raises(ValueError, match="same number of tokens"):
        get_act_patch_window(gpt2, OTHER[:, :4], cache, metric)
    _, cache = gpt2.run_with_cache(CLEAN, names_filter="blocks.0.hook_mlp_out")
    with pytest.raises(ValueError, match="lacks blocks.1.hook_mlp_out"):
        get_act_patch_window(gpt2, OTHER, cache, metric)
