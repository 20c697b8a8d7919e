"""Write edits as a LoRA adapter in the format of PEFT, which is not needed for that.

PEFT computes `x W + (lora_alpha / r) B(A x)` with A `[r, d_in]` and B `[d_out, r]`, for `nn.Linear`
and for GPT-2's `Conv1D` alike. An edit `W + left right` with `left` `[d_in, r]` and `right`
`[r, d_out]` is therefore `A = leftᵀ`, `B = rightᵀ`, `lora_alpha = r`; for a rank-one edit u and
lam. The format is that of huggingface/peft, docs/source/developer_guides/checkpoint.md.

Each column of `left` is multiplied by a power of two, and the row of `right` divided by it, so that
both have a similar norm. This changes no product. Without it, an edit of Gemma-3-270M has a u with
norm 1,400 and a lam with entries near 2e-5, which are no normal numbers in float16.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from transformer_lens_rome.edits.base_bytes import ledgers_for
from transformer_lens_rome.edits.card import Answers, Known, adapter_card
from transformer_lens_rome.edits.checkpoint import Checkpoint
from transformer_lens_rome.edits.kinds import DenseEdit, Edit, FactoredEdit, Factors, RankOneEdit
from transformer_lens_rome.edits.ledger import AppliedEdit
from transformer_lens_rome.files.new_folder import new_folder
from transformer_lens_rome.model import adapter
from transformer_lens_rome.model.adapter import Weight
from transformer_lens_rome.model.calls import weights_call
from transformer_lens_rome.model.protocol import Model

logger = logging.getLogger(__name__)


@weights_call
def export_lora(
    model: Model,
    edits: Edit | AppliedEdit | Sequence[Edit | AppliedEdit],
    folder: Any,
    *,
    hf_model: Any = None,
    rank: int | None = None,
    force: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    answers: Sequence[Answers] = (),
) -> Path:
    """Write one adapter that adds some edits to the base model; return the folder.

    `PeftModel.from_pretrained(hf_model, folder)` loads it. It holds `adapter_model.safetensors`
    (float32), `adapter_config.json` and a card, README.md. Edits of one matrix are stacked: their
    ranks add up. For an adapter for each edit, call it for each. The model is not changed, and the
    edits may be applied to it or not.

    Args:
        model: The model that the edits were made on.
        edits: One edit or several.
        folder: The folder to write; its parents are created.
        hf_model: Needed for a HookedTransformer: the Hugging Face model that it was loaded from.
        rank: For a change without factors (FT trains the whole matrix): the rank of the
            approximation to write, by singular values. The log and the card say what is lost.
        force: Accept edits that were made on other weights.
        base_model: The base model on the Hub, `owner/name`; None: as the Hugging Face model has it,
            if it has a name there.
        revision: A branch, a tag or a commit of it; None: as the Hugging Face model has it.
        license: The licence's identifier on the Hub, such as "apache-2.0"; for the card.
        answers: Prompts with the answers before and after, as `show_edit(...).prompts`; for the
            card.

    Raises:
        FileExistsError: the folder exists; nothing is written over it.
        ValueError: an edit does not fit the model, or was made on another weight; it changes a
            bias, nothing at all, or a whole matrix without `rank`; the model's weights were
            processed; a matrix is fused with another in the checkpoint, or tied to another.
    """
    every = _listed(edits)
    for edit in every:
        ledgers_for(model, edit, force=force)  # each fits the model
    checkpoint = Checkpoint.of(model, hf_model)
    each = [factors_of(edit, rank) for edit in every]
    modules = {_module(checkpoint, model, where): pair for where, pair in _stacked(each).items()}
    if base_model is None:
        base_model = checkpoint.hub_name(model)
        revision = revision or (base_model and adapter.hub_commit(checkpoint.model))
    known = Known(base_model, revision, license, answers)
    lost = list(_losses(every, each))
    ranks = {module.path: pair[0].shape[1] for module, pair in modules.items()}
    fan_in_fan_out = any(module.conv1d for module in modules)
    folder = Path(folder)
    with new_folder(folder) as part:
        save_file(dict(_tensors(modules)), part / "adapter_model.safetensors", {"format": "pt"})
        config = json.dumps(_config(ranks, known, fan_in_fan_out), indent=2)
        (part / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        card = adapter_card(every, known, ranks, lost)
        (part / "README.md").write_text(card, encoding="utf-8")
    return folder


class _Module(NamedTuple):
    """A linear module of the Hugging Face model."""

    path: str
    conv1d: bool


def _listed(edits: Edit | AppliedEdit | Sequence[Edit | AppliedEdit]) -> list[Edit]:
    """Return the edits as a list; raise ValueError if something is no edit, or is there twice."""
    several = edits if isinstance(edits, Sequence) and not isinstance(edits, str) else [edits]
    every: list[Edit] = []
    for one in several:
        every += one.edits if isinstance(one, AppliedEdit) else [one]
    if wrong := [one for one in every if not isinstance(one, Edit)] or not every:
        raise ValueError(f"export_lora takes an edit or a list of edits, got {wrong!r:.200}")
    if len({edit.digest for edit in every}) < len(every):
        raise ValueError("an edit is in the list twice; pass edit.scale(2) for a stronger one")
    return every


def factors_of(edit: Edit, rank: int | None = None) -> dict[Weight, Factors]:
    """Return an edit's change of each matrix as two factors, without those that change nothing.

    Args:
        edit: The edit.
        rank: The rank to approximate a change without factors by; None: it is refused.

    Raises:
        ValueError: the edit changes a bias, nothing, or a whole matrix while `rank` is None.
    """
    if isinstance(edit, RankOneEdit):
        factors = {Weight("W_out", edit.layer): (edit.u[:, None], edit.lam[None])}
    elif isinstance(edit, FactoredEdit):
        factors = dict(edit.factors)
    elif isinstance(edit, DenseEdit):
        if edit.bias is not None and edit.bias.any():
            raise ValueError(
                f"this edit changes b_out of layer {edit.layer} too, and a LoRA adapter changes "
                "matrices only; make it without the bias (bias=False of FT), or write the whole "
                "model with export_hf"
            )
        if edit.right is None:
            factors = {Weight("W_out", edit.layer): _approximation(edit.left, rank)}
        else:
            factors = {Weight("W_out", edit.layer): (edit.left, edit.right)}
    else:
        raise ValueError(f"a {type(edit).__name__} cannot be written as a LoRA adapter")
    factors = {w: (left.float(), right.float()) for w, (left, right) in factors.items()}
    factors = {w: pair for w, pair in factors.items() if pair[0].any() and pair[1].any()}
    if not factors:
        raise ValueError(f"the edit of {edit.request.subject!r:.100} changes nothing")
    return factors


def _approximation(change: Float[Tensor, "d_in d_out"], rank: int | None) -> Factors:
    """Return the nearest matrix of a rank (Eckart and Young), as two factors."""
    if rank is None:
        raise ValueError(
            "this edit changes a whole matrix and has no factors; pass rank= (at most "
            f"{min(change.shape)}) to write the best approximation of that rank, with what is lost "
            "said in the log, or write the whole model with export_hf"
        )
    if type(rank) is not int or not 1 <= rank <= min(change.shape):
        raise ValueError(f"rank should be from 1 to {min(change.shape)}, it is {rank!r:.40}")
    left, sizes, right = torch.linalg.svd(change.double(), full_matrices=False)
    return left[:, :rank] * sizes[:rank], right[:rank]


def _losses(
    edits: Sequence[Edit], each: Sequence[dict[Weight, Factors]]
) -> Iterator[tuple[Weight, float]]:
    """Yield and log the weights whose change was approximated, and the share of its norm lost."""
    for edit, factors in zip(edits, each, strict=True):
        if isinstance(edit, DenseEdit) and edit.right is None:
            ((where, (left, right)),) = factors.items()
            share = ((edit.left - left @ right).norm() / edit.left.norm()).item()
            logger.warning(
                "%s of layer %d: rank %d is without %.2f%% of the norm of the change (Frobenius)",
                *(where.name, where.layer, left.shape[1], 100 * share),
            )
            yield where, share


def _stacked(each: Sequence[dict[Weight, Factors]]) -> dict[Weight, Factors]:
    """Return the sum of several changes of each matrix, in factors of similar norms."""
    places = sorted({where for one in each for where in one}, key=lambda w: (w.layer, w.name))
    stacked = {}
    for where in places:
        pairs = [one[where] for one in each if where in one]
        left = torch.cat([left for left, _ in pairs], dim=1)
        right = torch.cat([right for _, right in pairs])
        norms = zip(left.norm(dim=0).tolist(), right.norm(dim=1).tolist(), strict=True)
        powers = torch.tensor([_power(a, b) for a, b in norms])
        stacked[where] = left * powers, right / powers[:, None]
    return stacked


def _power(a: float, b: float) -> float:
    """Return the power of two p for which the norms a p and b / p are nearest to each other."""
    return 2.0 ** round((math.log2(b) - math.log2(a)) / 2) if a > 0 and b > 0 else 1.0


def _module(checkpoint: Checkpoint, model: Model, where: Weight) -> _Module:
    """Return the module of the Hugging Face model that holds a weight.

    Raises:
        ValueError: it has none, holds it in another kind of module, or several modules share it.
    """
    name, _ = checkpoint.stored(model, where)
    if tied := checkpoint.tied_to(name):
        raise ValueError(
            f"{where.name} of layer {where.layer} is one parameter with {', '.join(tied)}, and an "
            "adapter would change it in one place only; write the whole model with export_hf"
        )
    path, _, leaf = name.rpartition(".")
    kind = adapter.kind_of_module(checkpoint.model, path)
    if leaf != "weight" or kind not in ("Linear", "Conv1D"):
        raise ValueError(
            f"{where.name} of layer {where.layer} is {name}, in a {kind}; LoRA is for Linear and "
            "Conv1D; write the whole model with export_hf"
        )
    return _Module(path, kind == "Conv1D")


def _tensors(modules: dict[_Module, Factors]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of an adapter's file."""
    for module, (left, right) in modules.items():
        prefix = f"base_model.model.{module.path}"
        yield f"{prefix}.lora_A.weight", left.T.cpu().contiguous()
        yield f"{prefix}.lora_B.weight", right.T.cpu().contiguous()


def _config(ranks: dict[str, int], known: Known, fan_in_fan_out: bool) -> dict[str, Any]:
    """Return an adapter's configuration; `lora_alpha` is the rank everywhere, so scaling is 1."""
    (r, _), *_ = Counter(ranks.values()).most_common(1)
    others = {path: rank for path, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": known.base_model,
        "revision": known.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
