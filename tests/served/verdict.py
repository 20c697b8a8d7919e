"""One family's verdict: served, refused, or neither, from the checks on one tiny model."""

from __future__ import annotations

from typing import Any

from served import checks, traces
from served.bridges import NotBootable

from transformer_lens_rome.model import refusals

KINDS = ("resid", "mlp", "attn")


def verdict(model: Any) -> dict[str, Any]:
    """What the package does with a model: every check's note, and what follows from them."""
    try:
        refusals.check_model(model)
    except checks.REFUSALS as error:
        return _refused(model, str(error))
    try:
        checks.runs(model)
    except Exception as error:
        return unbootable(f"a plain pass fails: {type(error).__name__}: {error}")
    layers, reason = checks.editable_layers(model)
    if not layers:
        return _refused(model, reason)
    layer = layers[min(1, len(layers) - 1)]
    each = [
        ("hooks", checks.hooks_fire_once, layers),
        ("orientation", checks.value_is_key_times_w_out, layers),
        ("causal", checks.later_tokens_are_not_seen, layer),
        ("algebra", checks.edit_does_its_algebra, layer),
        ("rome", checks.rome_reaches_what_it_says, layer),
        ("undo", checks.undo_gives_the_same_bytes, layer),
    ]
    with checks.said() as messages:
        found = {name: checks.attempt(check, model, given) for name, check, given in each}
        found["passes"] = checks.attempt(checks.partial_pass_is_the_whole, model, layer)
        found["text"] = checks.attempt(checks.text_is_what_plain_passes_go_on_with, model, layer)
        traced, wrong = _traced(model)
    failed = {name: note for name, (good, note) in found.items() if not good} | wrong
    return {
        "outcome": "half-served" if failed else "served",
        "reason": "; ".join(f"{name}: {note}" for name, note in failed.items()) or reason,
        "layers": layers,
        "n_layers": model.cfg.n_layers,
        "checks": {name: note for name, (_, note) in found.items()},
        "traced": traced,
        "said": list(dict.fromkeys(messages)),
    }


def unbootable(why: Exception | str) -> dict[str, Any]:
    """The result where there is no tiny model, or none that a plain pass runs through."""
    first = str(why).strip().split("\n")[0]
    plain = isinstance(why, (str, NotBootable))
    return {
        "outcome": "not bootable",
        "reason": first if plain else f"{type(why).__name__}: {first}",
        "layers": [],
        "n_layers": 0,
        "checks": {},
        "traced": [],
        "said": [],
    }


def _traced(model: Any) -> tuple[list[str], dict[str, str]]:
    """The kinds of trace that are right, and those that are neither right nor refused in words."""
    traced, wrong = [], {}
    for kind in KINDS:
        good, note = checks.attempt(traces.trace_is_what_hooks_give, model, kind)
        if good:
            traced.append(kind)
        elif not note.startswith(("NotImplementedError", "ValueError")):
            wrong[f"tracing {kind}"] = note
    return traced, wrong


def _refused(model: Any, reason: str) -> dict[str, Any]:
    """An edit must be refused before the model has run or changed; traces must be right, or so."""
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    before = checks.fingerprint(model)
    good, note = checks.attempt(checks.refuses_in_words, model)
    handle.remove()
    failed = {} if good else {"refusal": note}
    if passes or checks.fingerprint(model) != before:
        failed["refusal"] = f"the model ran {len(passes)} times before it was refused"
    traced, wrong = _traced(model)
    failed |= wrong
    return {
        "outcome": "half-served" if failed else "refused",
        "reason": "; ".join(f"{name}: {note}" for name, note in failed.items()) or reason,
        "layers": [],
        "n_layers": getattr(model.cfg, "n_layers", 0),
        "checks": {},
        "traced": traced,
        "said": [],
    }
