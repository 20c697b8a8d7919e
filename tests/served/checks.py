"""What "served" means: each check compares the package with plain forward passes of one model.

A check gives a short note of what it measured, or raises: AssertionError where the package is
wrong, anything else where it breaks.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from served.tiny_configs import D_MLP
from torch import Tensor

from transformer_lens_rome import (
    EditRequest,
    RankOneEdit,
    RomeConfig,
    SecondMoment,
    applied,
    apply_edit,
    compute_rome_edit,
)
from transformer_lens_rome.model import adapter, passes, refusals
from transformer_lens_rome.model.adapter import Point
from transformer_lens_rome.model.changes import Change
from transformer_lens_rome.model.partial_forward import PartialForward
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_tokens

REQUEST = EditRequest("{} is in", "The Space Needle", "Paris")
PREFIXES = ("", "The old man said.")
CONFIG = RomeConfig(steps=6, lr=0.05, clamp=4.0, weight_decay=0.0, kl_factor=0.0)
TOKENS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
REFUSALS = (NotImplementedError, ValueError)


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def agree(what: str, found: Tensor, expected: Tensor, limit: float = 1e-4) -> str:
    """Raise unless two tensors are equal to float rounding; their gap, else."""
    error = gap(found.float(), expected.float())
    assert error < limit, f"{what} is off by {error:.1e}"
    return f"{error:.0e}"


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """A plain whole pass, as a user would run it."""
    return model(tokens, attention_mask=torch.ones_like(tokens), return_type="logits")


@torch.no_grad()
def runs(model: Any) -> None:
    """Plain passes, with and without a cache; they raise what TransformerLens raises."""
    logits_of(model)
    if adapter.model_class(model) == "bridge":
        model(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False)


def fingerprint(model: Any) -> dict[str, str]:
    """sha256 of every parameter's bytes."""
    flat = {n: p.detach().contiguous().view(-1).view(torch.uint8) for n, p in parameters(model)}
    return {n: hashlib.sha256(bytes(p.numpy().data)).hexdigest() for n, p in flat.items()}


def parameters(model: Any) -> list[tuple[str, Tensor]]:
    """Every parameter of a model by name, those of the Hugging Face model inside a bridge too."""
    inside = getattr(model, "original_model", model)
    return list(inside.named_parameters())


def moment(d_mlp: int) -> SecondMoment:
    """C from random keys with no special axes."""
    keys = torch.randn(2 * d_mlp, d_mlp, generator=torch.Generator().manual_seed(1)).double()
    return SecondMoment.from_moment(keys.T @ keys / len(keys), len(keys))


def small_edit(model: Any, layer: int) -> RankOneEdit:
    """`compute_rome_edit` with few steps."""
    return compute_rome_edit(
        model,
        REQUEST,
        layer=layer,
        second_moment=moment(len(adapter.w_out(model, layer))),
        prefixes=PREFIXES,
        config=CONFIG,
        progress=False,
    )


# ---------------------------------------------------------------- the checks, one by one


def hooks_fire_once(model: Any, layers: Sequence[int]) -> str:
    """Key and value are passed once in a pass, in every editable layer, with their shapes."""
    seen: list[tuple[Point, tuple[int, ...]]] = []
    points = [Point(name, layer) for layer in layers for name in ("key", "value")]
    record = [(p, lambda t, p=p: seen.append((p, tuple(t.shape)))) for p in points]
    with adapter.hooks(model, record):
        logits_of(model)
    for point in points:
        shape = [s for p, s in seen if p == point]
        width = adapter.w_out(model, point.layer).shape[0 if point.name == "key" else 1]
        assert shape == [(*TOKENS.shape, width)], f"{tuple(point)} fired as {shape}"
    return f"{len(points)} points"


def value_is_key_times_w_out(model: Any, layers: Sequence[int]) -> str:
    """`key @ W_out + b_out` is the value, and what was read is what the model used."""
    worst = 0.0
    for layer in layers:
        key, value = (Point(name, layer) for name in ("key", "value"))
        found = passes.read(model, TOKENS, [key, value])
        computed = found[key] @ adapter.w_out(model, layer) + adapter.b_out(model, layer)
        worst = max(worst, float(agree(f"the value at layer {layer}", computed, found[value])))
    return f"{worst:.0e}"


def later_tokens_are_not_seen(model: Any, _layer: int) -> str:
    """Right padding is harmless: what stands later changes nothing before it."""
    other = TOKENS.clone()
    other[:, 5:] = (other[:, 5:] + 7) % 400
    return agree("a later token", logits_of(model, other)[:, :5], logits_of(model)[:, :5])


@torch.no_grad()
def edit_does_its_algebra(model: Any, layer: int) -> str:
    """A rank-one edit gives one key v*, moves the others by (key·u) lam, and the logits with it."""
    points = key, value = Point("key", layer), Point("value", layer)
    before = passes.read(model, TOKENS, points)
    k, weight = before[key][0, 4], adapter.w_out(model, layer).detach()
    u = moment(len(k)).solve(k).float()
    draw = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(2))
    v_star = before[value][0, 4] + before[value].norm(dim=-1).mean() * draw / draw.norm()
    lam = (v_star - before[value][0, 4]) / (u @ k)
    kept = {"model_hash": adapter.weight_hash(weight), "request": REQUEST}
    edit = RankOneEdit(layer=layer, k_star=k, u=u, lam=lam, v_star=v_star, **kept)
    clean, moved = logits_of(model), (before[key] @ u)[..., None] * lam
    with adapter.hooks(model, [(value, lambda v: v + moved)]):
        by_hook = logits_of(model)
    with applied(model, edit):
        after, by_weight = passes.read(model, TOKENS, points), logits_of(model)
    assert torch.equal(before[key], after[key]), "the edit changed keys at its own layer"
    agree("v* at the key", after[value][0, 4], v_star)
    agree("(key·u) lam at other keys", after[value], before[value] + moved)
    assert gap(by_weight, clean) > 1e-3, "the edit does not reach the logits"
    return agree("the edit in logits, against a change of the value", by_weight, by_hook, 1e-3)


def rome_reaches_what_it_says(model: Any, layer: int) -> str:
    """The loss falls, k* gets v*, and P(target) in `health` is what a plain pass gives."""
    edit = small_edit(model, layer)
    losses = edit.health.losses
    assert min(losses) < losses[0], f"the loss does not fall: {losses}"
    encoder = Encoder.of(model)
    row = encoder.templated_row(REQUEST.prompt, REQUEST.subject, target=REQUEST.target_new)
    ids, at = torch.tensor([row.ids]), torch.tensor(row.target)
    said = [edit.health.p_before, edit.health.p_after]
    with torch.no_grad():
        clean = logits_of(model, ids)
        with applied(model, edit):
            weight, bias = adapter.w_out(model, layer), adapter.b_out(model, layer)
            agree("v* at k*", edit.k_star @ weight + bias, edit.v_star)
            edited = logits_of(model, ids)
    for logits, health in zip((clean, edited), said, strict=True):
        p = logits[0, at - 1].log_softmax(-1).gather(1, ids[0, at, None]).sum().exp().item()
        assert abs(p - health) < 1e-4 + 1e-3 * p, f"health says P = {health:.5f}, a pass {p:.5f}"
    return f"P {said[0]:.4f} to {said[1]:.4f}"


@torch.no_grad()
def partial_pass_is_the_whole(model: Any, layer: int) -> str:
    """Partial passes give what whole ones give; where a model cannot be cut they are whole."""
    rows, starts = [TOKENS[0].tolist(), TOKENS[1, 2:].tolist(), TOKENS[0, 4:].tolist()], [4, 2, 0]
    each, last = torch.arange(3), torch.tensor([8, 6, 4])
    change = Change(Point("value", layer), each, torch.tensor(starts), lambda old: old * -2)
    forward = PartialForward(model, layer, rows, starts)
    whole = PartialForward(model, layer, rows, starts, cut=False).logits([change], each, last)
    agree("a partial pass", forward.logits([change], each, last), whole, 1e-3)
    width = len(max(rows, key=len))
    for i, ids in enumerate(rows):
        ids = torch.tensor([ids + [0] * (width - len(ids))])
        point = Point("value", layer)

        def by_hand(value: Tensor, start: int = starts[i]) -> Tensor:
            value = value.clone()
            value[:, start] *= -2
            return value

        with adapter.hooks(model, [(point, by_hand)]):
            agree("a whole pass", whole[i], logits_of(model, ids)[0, last[i]], 1e-3)
    return "cut" if forward.recording is not None else "whole passes"


@torch.no_grad()
def text_is_what_plain_passes_go_on_with(model: Any, layer: int) -> str:
    """Each token that the model writes is the likeliest after a plain pass of all before it."""
    tokens = sample_tokens(model, 2, 8, top_k=1)
    logits = logits_of(model, tokens)[:, :-1].float()
    logits[..., Encoder.of(model).tokenizer.all_special_ids] = -torch.inf
    written = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    agree("what is written, against the likeliest", written, logits.amax(-1), 1e-3)
    cached = [held for trial, held in model._rome_trials.items() if trial.startswith("text")]
    return "cached" if cached == [True] else "whole passes"


@torch.no_grad()
def undo_gives_the_same_bytes(model: Any, layer: int) -> str:
    """Every parameter's bytes after `revert`, and after an exception while the edit was on."""
    weight, before = adapter.w_out(model, layer), fingerprint(model)
    generator = torch.Generator().manual_seed(4)
    k, lam = (torch.randn(n, generator=generator) for n in weight.shape)
    kept = {"model_hash": adapter.weight_hash(weight), "request": REQUEST}
    edit = RankOneEdit(layer=layer, k_star=k, u=k, lam=lam, v_star=lam, **kept)
    on = apply_edit(model, edit)
    changed = [name for name, digest in fingerprint(model).items() if digest != before[name]]
    assert len(changed) == 1, f"the edit changed {changed}"
    on.revert()
    assert fingerprint(model) == before, "revert left other bytes"
    with contextlib.suppress(ZeroDivisionError), applied(model, edit):
        raise ZeroDivisionError
    assert fingerprint(model) == before, "an exception left other bytes"
    return "same bytes"


def refuses_in_words(model: Any) -> str:
    """`compute_rome_edit` with everything given raises the package's own refusal."""
    given = {"second_moment": SecondMoment.identity(D_MLP), "prefixes": PREFIXES}
    try:
        compute_rome_edit(model, REQUEST, layer=0, config=CONFIG, progress=False, **given)
    except REFUSALS as error:
        return str(error)
    raise AssertionError("the edit was not refused")


# ---------------------------------------------------------------- all of them


@contextlib.contextmanager
def said(name: str = "transformer_lens_rome.model.self_check") -> Iterator[list[str]]:
    """What a module logs meanwhile."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def editable_layers(model: Any) -> tuple[list[int], str]:
    """The layers that the package would edit, and why it refuses the first other one."""
    layers, reason = [], ""
    for layer in range(model.cfg.n_layers):
        try:
            refusals.check_editable(model, [layer])
            layers.append(layer)
        except REFUSALS as error:
            reason = reason or f"{error}"
    return layers, reason


def attempt(check: Callable[..., str], *args: Any) -> tuple[bool, str]:
    """Whether a check holds, with its note or the reason why not."""
    try:
        return True, check(*args)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
