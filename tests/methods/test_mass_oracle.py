"""Parity with the released programs of MEMIT, EMMET, AlphaEdit, ENCORE and NAS."""

from __future__ import annotations

import json
from collections import defaultdict
from random import Random

import numpy as np
import pytest
import torch
from conftest import newest

from transformer_lens_rome import EditRequest, SecondMoment, apply_edit, get_method, revert_all
from transformer_lens_rome.methods import MemitConfig, mass_method, mean_value_norm
from transformer_lens_rome.methods.mass_solve import NullSpace, metric_of, solve_many
from transformer_lens_rome.model.adapter import Weight

CASES = (
    ("memit4", "memit4_early", "memit12", "memit12_easy", "memit_history", "memit_history_easy")
    + ("emmet4", "emmet1", "emmet4_free", "alphaedit", "alphaedit_easy", "alphaedit_L2_10")
    + ("encore_mpes", "encore_norm", "nas")
)
TOKENS = 46_976


class Oracle:
    """The numbers of the released programs."""

    def __init__(self, folder):
        record = json.loads((folder / "mass_dev.json").read_text())
        self.arrays = np.load(folder / "mass_dev.npz")
        self.cases = {case["case"]: case for case in record["cases"]}
        templates = [one for group in record["meta"]["context_templates"] for one in group]
        self.prefixes = [template.replace("{}", "") for template in templates]
        C = np.load(folder / "mass_gpt2_C.npz")["mom2"]
        # the released programs round C to float32
        self.moments = {
            layer: SecondMoment.from_moment(torch.from_numpy(one).float(), TOKENS)
            for layer, one in enumerate(C)
        }

    def has(self, name):
        return name in self.arrays.files

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def change(self, case, batch, layer):
        """The released change of W_out."""
        known = f"{case}/b{batch}_"
        if self.has(f"{known}dW{layer}"):
            return self[f"{known}dW{layer}"]
        return self[f"{known}A{layer}"].double() @ self[f"{known}R{layer}"].double().T

    def solve_of(self, case):
        name = case["case"]
        if name.startswith(("alphaedit", "nas")):
            return "alphaedit"
        return "emmet" if name.startswith("emmet") else "memit"

    def projectors(self, case):
        if self.solve_of(case) != "alphaedit":
            return None
        stored = case["case"] if self.has(f"{case['case']}/P") else "alphaedit"
        return dict(zip(case["hparams"]["layers"], self[f"{stored}/P"], strict=True))

    def config(self, case):
        known = case["hparams"]
        cutoff = known.get("prob_cutoff")
        return MemitConfig(
            steps=known["v_num_grad_steps"],
            lr=known["v_lr"],
            clamp=known["clamp_norm_factor"],
            weight_decay=known["v_weight_decay"],
            kl_factor=known["kl_factor"],
            stop="top" if cutoff else "loss",
            stop_loss=0.0501 if case["case"] == "memit4_smollm2" else 0.05,
            top_steps=-cutoff if cutoff else 1,
            covariance_weight=known.get("mom2_update_weight"),
            norm_weight=known.get("L2", known.get("update_norm_lambda")),
            slack=known.get("emmet_lambda", 0.0),
            anchor=case.get("nas_anchor", {}).get("mean_vstar_norm"),
            history_keys="after" if cutoff is None else "solved",
            variant="released",
        )


@pytest.fixture(scope="module")
def oracle(shared):
    return Oracle(shared / "oracle")


def relative(mine, released):
    mine, released = mine.double(), released.double()
    return ((mine - released).norm() / released.norm()).item()


def spied(monkeypatch):
    """Record the results of the searches and the solves, as the method calls them."""
    seen = {"z": [], "keys": []}
    search, solve = mass_method.search_targets, mass_method.solve_many

    def noting_search(*args, **options):
        seen["z"].append(search(*args, **options))
        return seen["z"][-1]

    def noting_solve(metric, keys, *args, **options):
        seen["keys"].append(keys)
        return solve(metric, keys, *args, **options)

    monkeypatch.setattr(mass_method, "search_targets", noting_search)
    monkeypatch.setattr(mass_method, "solve_many", noting_solve)
    return seen


def compare(model, oracle, case, moments, monkeypatch):
    """Run a case; return the largest errors of z*, keys, residuals and changes, and the health."""
    name, layers = case["case"], case["hparams"]["layers"]
    seen, errors = spied(monkeypatch), defaultdict(list)
    method = get_method(
        oracle.solve_of(case),
        layers=layers,
        second_moments=moments,
        prefixes=oracle.prefixes,
        config=oracle.config(case),
        projectors=oracle.projectors(case),
    )
    try:
        for b, requests in enumerate(case["requests"]):
            edit = method.compute_many(model, [EditRequest(**one) for one in requests])
            z = torch.stack([target.start + target.delta for target in seen["z"][b]])
            errors["z"].append(relative(z, oracle[f"{name}/b{b}_z"]))
            for i, layer in enumerate(layers):
                where, known = Weight("W_out", layer), f"{name}/b{b}_"
                keys = seen["keys"][b * len(layers) + i]
                errors["keys"].append(relative(keys, oracle[f"{known}K{layer}"]))
                right = edit.factors[where][1].T
                errors["residuals"].append(relative(right, oracle[f"{known}R{layer}"]))
                released = oracle.change(name, b, layer)
                errors["changes"].append(relative(edit.change(where), released))
            wanted = case["losses"][b]
            assert [fact.steps for fact in edit.health.facts] == [len(one) for one in wanted]
            last = [one[-1][0] for one in wanted]
            assert [fact.losses[1] for fact in edit.health.facts] == pytest.approx(last, abs=2e-3)
            apply_edit(model, edit)
            if len(case["requests"]) > b + 1:
                method = method.after(model, edit)
    finally:
        revert_all(model)
    return {kind: max(some) for kind, some in errors.items()}, edit.health


@pytest.mark.parametrize("name", CASES)
def test_released_edits_of_tiny_gpt2(tiny_gpt2, oracle, name, monkeypatch, record_property):
    case = oracle.cases[name]
    layers = case["hparams"]["layers"]
    moments = {layer: oracle.moments[layer] for layer in layers}
    errors, _ = compare(tiny_gpt2, oracle, case, moments, monkeypatch)
    record_property("relative_errors", errors)
    assert errors["z"] < 3e-4 and errors["keys"] < 3e-4
    assert errors["residuals"] < 1e-3 and errors["changes"] < 1e-3


@newest
@pytest.mark.real_model
def test_released_edit_of_smollm2(smollm2, oracle, shared, monkeypatch, record_property):
    """MEMIT on a Llama, whose searches stop early; a subject at position 0 absorbs nothing.

    One released search stops at a loss of 0.050, where ours has 0.0500 and would take a step more.
    """
    case, C = oracle.cases["memit4_smollm2"], np.load(shared / "oracle/mass_smollm2_C345.npz")
    layers = case["hparams"]["layers"]
    each = zip(layers, C[C.files[0]], strict=True)
    moments = {n: SecondMoment.from_moment(torch.from_numpy(one), 61_440) for n, one in each}
    errors, health = compare(smollm2, oracle, case, moments, monkeypatch)
    record_property("relative_errors", errors)
    assert errors["z"] < 1e-3 and errors["keys"] < 1e-4
    assert errors["residuals"] < 1e-3 and errors["changes"] < 2e-3
    italy, *others = health.facts
    assert sum(italy.absorbed) < 0.05 < 0.7 < min(sum(fact.absorbed) for fact in others)
    assert italy.warnings and "Italy" in health.warnings[-1]
    assert not any(fact.warnings for fact in others)


# ---------------------------------------------------------------- the solve, from stored keys


def stored(oracle, case):
    """Each batch and layer: keys, residuals, the change, and the keys of earlier batches."""
    name = case["case"]
    earlier: dict[int, list] = defaultdict(list)
    for b in range(len(case["requests"])):
        for layer in case["hparams"]["layers"]:
            known = f"{name}/b{b}_"
            before = torch.cat(earlier[layer], 1) if earlier[layer] else None
            keys, right = oracle[f"{known}K{layer}"], oracle[f"{known}R{layer}"].T
            yield layer, keys, right, oracle[f"{known}dW{layer}"], before
        for layer in case["hparams"]["layers"]:
            kind = "Kpost" if oracle.has(f"{name}/b{b}_Kpost{layer}") else "K"
            earlier[layer].append(oracle[f"{name}/b{b}_{kind}{layer}"])


TOLERANCES = {"alphaedit": 1e-3, "alphaedit_easy": 1e-3, "nas": 1e-3, "alphaedit_L2_10": 1e-5}
"""AlphaEdit and NAS solve in float32; a sum of float32 is in every history."""


@pytest.mark.parametrize("name", CASES)
def test_the_solve_gives_the_released_change_from_the_released_keys(oracle, name):
    case = oracle.cases[name]
    config, solve = oracle.config(case), oracle.solve_of(case)
    projectors = oracle.projectors(case) or {}
    for layer, keys, right, released, earlier in stored(oracle, case):
        metric = metric_of(solve, config, oracle.moments[layer], projectors.get(layer))
        slack = 1.0 if solve != "emmet" else config.slack if keys.shape[1] > 1 else 0.0
        change = solve_many(metric, keys, earlier, slack=slack).left @ right.double()
        alone = TOLERANCES.get(name, 1e-6 if earlier is None else 3e-5)
        assert relative(change, released) < alone


def test_own_null_space_is_that_of_the_released_program_as_far_as_it_is_determined(oracle):
    """The singular vectors in float32 are wrong by about 1% where values near the threshold mix."""
    case = oracle.cases["alphaedit"]
    config = MemitConfig(threshold=case["hparams"]["nullspace_threshold"], norm_weight=0.01)
    for i, (layer, released) in enumerate(oracle.projectors(case).items()):
        space = NullSpace.of(oracle.moments[layer], config)
        assert space.basis.shape[1] == case["rank_P"][i]
        assert relative(space.basis @ space.basis.T, released) < 3e-2
        keys = oracle[f"alphaedit/b0_K{layer}"]
        s = (space.inverse(keys) * keys.double()).sum(0) * 0.01
        assert s.tolist() == pytest.approx(case["kPk"][i], rel=2e-2)


@pytest.mark.slow
def test_the_anchor_of_the_released_program(tiny_gpt2, oracle, shared):
    """The mean norm of values, over bare prompts; the program searches 16 of them together."""
    case = oracle.cases["nas"]
    pool = json.loads((shared / "oracle" / "mass_nas_pool.json").read_text())
    drawn = Random(0).sample(pool, case["nas_anchor"]["nas_restart"])
    requests = [EditRequest.from_dict(one["requested_rewrite"]) for one in drawn]
    mine = mean_value_norm(
        tiny_gpt2,
        requests,
        case["hparams"]["layers"][-1],
        config=oracle.config(case),
        progress=False,
    )
    assert mine == pytest.approx(case["nas_anchor"]["mean_vstar_norm"], rel=1e-3)
