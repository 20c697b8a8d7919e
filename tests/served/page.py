"""The page of served models: its tables are made from the results that are kept beside it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RESULTS = EXAMPLES / "results" / "served_models"
PAGE = EXAMPLES / "guide" / "served_models.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
TITLES = {"bridge": "TransformerBridge", "hooked": "HookedTransformer"}
_ADVICE = "; editing and tracing|: mixtures of experts|; wrap a Hugging| from the '| but it was not"
OUTCOMES = ("served", "refused", "not bootable")


def builders() -> dict[str, ModuleType]:
    """For each model class of the installed TransformerLens, what makes its tiny models."""
    from served import bridges, hooked

    found = {"bridge": ("transformer_lens.model_bridge", bridges)}
    found["hooked"] = ("transformer_lens.HookedTransformer", hooked)
    return {kind: module for kind, (there, module) in found.items() if find_spec(there)}


def results_file(kind: str) -> Path:
    """Where the results of the installed TransformerLens stand."""
    return RESULTS / f"{kind}-{version('transformer-lens')}.json"


def known(kind: str) -> dict[str, dict[str, Any]]:
    """The results that are there already, for the installed TransformerLens."""
    file = results_file(kind)
    return json.loads(file.read_text())["families"] if file.exists() else {}


def save(kind: str, families: Mapping[str, dict[str, Any]]) -> None:
    """Keep the results of one model class."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = {name: version(name) for name in ("transformer-lens", "transformers", "torch")}
    whole = {"class": TITLES[kind], **kept, "families": families}
    results_file(kind).write_text(json.dumps(whole, indent=1) + "\n")


def write() -> None:
    """Put the tables between the page's two markers."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}{tables()}{END}{after}")


def tables() -> str:
    """Every table, from the results files alone."""
    files = sorted(RESULTS.glob("*.json"), key=_order)
    return "".join(line + "\n" for file in files for line in _section(json.loads(file.read_text())))


def _order(file: Path) -> tuple[str, list[int]]:
    """Bridges first, new versions first."""
    kind, numbers = file.stem.rsplit("-", 1)
    return kind, [-int(n) for n in numbers.split(".")]


def _section(result: dict[str, Any]) -> Iterator[str]:
    families = result["families"]
    count = Counter(row["outcome"] for row in families.values())
    counted = ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES)
    yield ""
    yield f"## {result['class']}, TransformerLens {result['transformer-lens']}"
    yield ""
    yield (
        f"{len(families)} architectures: {counted} "
        f"(transformers {result['transformers']}, torch {result['torch']})."
    )
    yield ""
    yield "| served | layers | passes | traces |"
    yield "|---|---|---|---|"
    for name, row in families.items():
        if row["outcome"] == "served":
            yield f"| {name} | {_layers(row)} | {_passes(row)} | {', '.join(row['traced'])} |"
    for outcome in OUTCOMES[1:]:
        if count[outcome]:
            yield from _reasons(families, outcome)


def _reasons(families: Mapping[str, dict[str, Any]], outcome: str) -> Iterator[str]:
    """A table of the families with one outcome other than served."""
    refused = outcome == "refused"
    yield ""
    yield f"| {outcome} | why |" + (" traces |" if refused else "")
    yield "|---|---|" + ("---|" if refused else "")
    for name, row in families.items():
        if row["outcome"] == outcome:
            traces = f" {', '.join(row['traced']) or 'refused'} |" if refused else ""
            yield f"| {name} | {short(row['reason'], name)} |{traces}"


def _layers(row: Mapping[str, Any]) -> str:
    """Which layers can be edited."""
    some = ", ".join(map(str, row["layers"]))
    return "all" if len(row["layers"]) == row["n_layers"] else f"{some} of {row['n_layers']}"


def _passes(row: Mapping[str, Any]) -> str:
    """Whether passes are cut; where not, why not."""
    said = [line.split("slower: ")[1] for line in row["said"] if line.startswith("whole passes")]
    return f"whole: {short(said[0], '')}" if said else row["checks"]["passes"]


def short(reason: str, name: str) -> str:
    """A message without the names before it and the advice after it, fit for a cell."""
    reason = re.sub(r"^\w+(Error|Exception): ", "", reason).removeprefix(f"{name} ")
    reason = re.split(_ADVICE, reason)[0].replace("(NoneType)", "(TransformerLens shows no MLP)")
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason)
    return reason.replace("|", "/").replace("\n", " ")[:160]
