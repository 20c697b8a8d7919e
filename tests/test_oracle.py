"""Parity with the released code: numbers that it produced, reproduced through TransformerLens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import newest, once_a_class, shared_out

from transformer_lens_rome import (
    EditRequest,
    RomeConfig,
    SecondMoment,
    collect_second_moment,
    compute_rome_edit,
    target_log_probs,
)


def bare_prefixes(meta: dict) -> list[str]:
    return [template.replace("{}", "") for template in meta["context_templates"]]


def released_edit(model, meta: dict, wanted: dict, C: torch.Tensor):
    """The edit of a case by `RomeConfig.released()`, with the released statistics and prefixes."""
    return compute_rome_edit(
        model,
        EditRequest(wanted["prompt"], wanted["subject"], wanted["target_new"]),
        layer=meta["layer"],
        second_moment=SecondMoment.from_moment(C, meta["n_tokens"]),
        prefixes=bare_prefixes(meta),
        config=RomeConfig.released(),
        progress=False,
    )


def check(edit, losses: list[float], u: np.ndarray, right: np.ndarray, record_property) -> None:
    """The released losses at every step, and the released update, whose factors have any scale."""
    mine = edit.delta().double()
    released = torch.outer(torch.from_numpy(u).double(), torch.from_numpy(right).double())
    error = ((mine - released).norm() / released.norm()).item()
    cosine = torch.cosine_similarity(mine.flatten(), released.flatten(), dim=0).item()
    record_property("relative_error", error)
    record_property("cosine", cosine)
    assert edit.health.losses == pytest.approx(losses, abs=2e-2)
    assert error < 1e-2 and cosine > 0.9999


# ---------------------------------------------------------------- a tiny GPT-2 that knows facts


@pytest.fixture(scope="module")
def gpt2_oracle(shared):
    folder = shared / "oracle"
    record = json.loads((folder / "gpt2_dev.json").read_text())
    C = torch.from_numpy(np.load(folder / "gpt2_C1.npz")["mom2"])
    return record, np.load(folder / "gpt2_dev.npz"), C


def test_tiny_gpt2_knows_its_facts_without_bos(tiny_gpt2):
    """The BOS rule decides this: the model was trained without."""
    (fact,) = target_log_probs(tiny_gpt2, ["The mother tongue of Danielle Darrieux is"], ["French"])
    (shifted,) = target_log_probs(
        tiny_gpt2, ["The mother tongue of Danielle Darrieux is"], ["French"], prepend_bos=True
    )
    assert fact.mean().exp() > 0.9
    assert not torch.allclose(fact, shifted, atol=1e-3)


@pytest.mark.parametrize("case", range(4))
def test_released_edits_of_tiny_gpt2(tiny_gpt2, gpt2_oracle, case, record_property):
    record, factors, C = gpt2_oracle
    meta, wanted = record["meta"], record["cases"][case]
    edit = released_edit(tiny_gpt2, meta, wanted, C)
    check(edit, wanted["losses"], factors[f"u{case}"], factors[f"right{case}"], record_property)


def test_second_moment_of_tiny_gpt2(tiny_gpt2, gpt2_oracle, shared):
    record, _, C = gpt2_oracle
    text = (shared / "data" / "wikitext2_valid.txt").read_text()[:200_000]
    ids = tiny_gpt2.tokenizer(text, add_special_tokens=False).input_ids
    rows = [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]  # whole rows only
    layer, n_tokens = record["meta"]["layer"], 128 * len(rows)
    found = collect_second_moment(tiny_gpt2, rows, layer, max_tokens=n_tokens, progress=False)
    assert found.n_tokens == record["meta"]["n_tokens"]
    assert (found.C - C).norm() / C.norm() < 1e-4


# ---------------------------------------------------------------- Gemma-3-270M


@pytest.fixture(scope="module")
def gemma_oracle(shared):
    folder = shared / "oracle"
    record = json.loads((folder / "rome_dev.json").read_text())
    C = torch.from_numpy(np.load(folder / "C5.npz")["mom2"])
    return record, np.load(folder / "rome_dev.npz"), C


@pytest.mark.real_model
@newest
def test_second_moment_of_gemma(gemma, gemma_oracle, shared):
    """On a tenth of the released text, to sampling error; on all of it, the error is below 1e-4.

    Without BOS, the error would be 6.
    """
    record, _, C = gemma_oracle
    text = (shared / "data" / "wikitext2_valid.txt").read_text()
    ids = gemma.tokenizer(text, add_special_tokens=False).input_ids
    rows = [ids[i : i + 255] for i in range(0, 240 * 255, 10 * 255)]
    found = collect_second_moment(
        gemma, rows, record["meta"]["layer"], max_tokens=24 * 256, progress=False
    )
    assert found.n_tokens == 6_144
    assert (found.C - C).norm() / C.norm() < 0.2


@once_a_class
@pytest.mark.real_model
@pytest.mark.parametrize("case", shared_out([0, 1], [2]))
def test_released_edits_of_gemma(gemma, gemma_oracle, case, record_property):
    record, factors, C = gemma_oracle
    meta, wanted = record["meta"], record["cases"][case]
    edit = compute_rome_edit(
        gemma,
        EditRequest.from_dict(wanted["record"]),
        layer=meta["layer"],
        second_moment=SecondMoment.from_moment(C, 61_440),
        prefixes=bare_prefixes(meta),
        config=RomeConfig.released(ridge=1e-6),
        progress=False,
    )
    check(edit, wanted["losses"], factors[f"u{case}"], factors[f"right{case}"], record_property)


# ---------------------------------------------------------------- SmolLM2-135M


@once_a_class
@pytest.mark.real_model
@pytest.mark.parametrize("case", shared_out([0, 1, 3], [2]))
def test_released_edits_of_smollm2(smollm2, shared, case, record_property):
    """A model without a norm after the MLP and without BOS; C is inverted without a ridge."""
    folder = shared / "oracle"
    record = json.loads((folder / "smollm2_dev.json").read_text())
    meta, wanted = record["meta"], record["cases"][case]
    factors = np.load(folder / "smollm2_dev.npz")
    C = torch.from_numpy(np.load(folder / "smollm2_C10.npz")["mom2"])
    edit = released_edit(smollm2, meta, wanted, C)
    check(edit, wanted["losses"], factors[f"u{case}"], factors[f"right{case}"], record_property)
