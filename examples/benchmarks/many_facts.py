"""Many facts on the model at once: MEMIT and its family against ROME one after another.

    python examples/benchmarks/many_facts.py MODEL RECORDS [--facts 100] [--choose] SETTING ...

MODEL is gemma or smollm2. RECORDS is CounterFact in the published schema. All facts are written,
and then every record is scored with all of them on the model. The records are the first of those of
the tables, or with `--choose` the first of those on which settings are chosen.

A setting is a method's name and its differences from `MemitConfig()`, for instance
`memit,covariance_weight=200`. `batch=25` writes batches of 25, each on the model with the batches
before it, and `history=0` without the keys of those; `layers=1-3` names the layers. `rome` writes
the facts one after another. Targets that are searched on the unedited model are searched once.

Rows go to examples/results/many_facts/MODEL-N (or -choosing) as they come, N being the number of
facts; a setting that is there is not run again. Then a Markdown table is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paper_table import RESULTS, table_records

from transformer_lens_rome import CounterFact, EditRequest, MemitConfig, evaluate_counterfact
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.edits.ledger import apply_edit
from transformer_lens_rome.edits.several import SeveralEdits
from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.methods import get_method
from transformer_lens_rome.methods.mass_method import Memit

WORDS = {"stop": str, "steps": int, "top_steps": int}
"""The options of a configuration that are no plain numbers."""
SHOWN = ("ES", "PS", "NS", "S", "EM", "PM", "NM", "EA")


@dataclass(frozen=True)
class SearchedOnce(Memit):
    """MEMIT that takes targets from `known` for the same facts of the same model."""

    known: dict[Any, Any] = field(default_factory=dict, metadata={"identifies": False})

    def _searched(self, model: Any, encoder: Any, requests: Any, batch_size: Any) -> Any:
        solve = {"covariance_weight": None, "norm_weight": None, "slack": 0.0, "null_fraction": 0.5}
        search = dataclasses.replace(self.config, **solve)
        hashes = tuple(float(model.blocks[n].mlp.W_out.double().norm()) for n in self._layers)
        key = str((self._layers, self._texts, dataclasses.astuple(search), hashes, requests))
        if key not in self.known:
            self.known[key] = super()._searched(model, encoder, requests, batch_size)
        return self.known[key]


@dataclass(frozen=True)
class OneAfterAnother:
    """A method whose batches are written one after another, as one edit of all facts."""

    method: Any
    batch: int
    history: bool

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.method.name} in batches of {self.batch}"

    def prepared(self, model: Any, *, seed: int = 0) -> OneAfterAnother:
        """Prepare the method."""
        return dataclasses.replace(self, method=self.method.prepared(model, seed=seed))

    def compute_many(
        self, model: Any, requests: Sequence[EditRequest], *, seed: int = 0
    ) -> SeveralEdits:
        """Write the batches, take them off again, and return their sum."""
        method, edits, applied = self.method, [], []
        try:
            for first in range(0, len(requests), self.batch):
                some = requests[first : first + self.batch]
                if hasattr(method, "compute_many"):
                    edit = method.compute_many(model, some, seed=seed)
                else:
                    edit = method.compute(model, some[0], seed=seed)
                edits.append(edit)
                applied.append(apply_edit(model, edit))
                if self.history and hasattr(method, "after"):
                    method = method.after(model, edit)
        finally:
            for one in reversed(applied):
                one.revert()
        return SeveralEdits.of(edits)

    def compute(self, model: Any, request: EditRequest, *, seed: int = 0) -> SeveralEdits:
        """Compute the edit of one fact."""
        return self.compute_many(model, [request], seed=seed)


def method_of(setting: str, known: dict[Any, Any]) -> Any:
    """Return the method of a setting."""
    name, *pairs = setting.split(",")
    options = dict(pair.split("=") for pair in pairs)
    batch, history = int(options.pop("batch", 0)), options.pop("history", "1") == "1"
    if name == "rome":
        return OneAfterAnother(get_method("rome"), 1, False)
    layers = None
    if given := options.pop("layers", ""):
        first, last = (given.split("-") * 2)[:2]
        layers = tuple(range(int(first), int(last) + 1))
    values: dict[str, Any] = {name: WORDS.get(name, float)(x) for name, x in options.items()}
    config = MemitConfig(**values)
    method = SearchedOnce(layers, config=config, solve=name, known=known)
    return OneAfterAnother(method, batch, history) if batch else method


def main() -> None:
    """Read the options, write and score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("gemma", "smollm2"))
    parser.add_argument("records", help="CounterFact, published schema")
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--choose", action="store_true", help="the records for choosing settings")
    args = parser.parse_intermixed_args()
    records = table_records(args.records)
    if args.choose:
        of_tables = {record.case_id for record in records}
        every = CounterFact.load(args.records)
        records = every.only([r.case_id for r in every if r.case_id not in of_tables])
    records = records.only([record.case_id for record in records[: args.facts]])
    kind = "choosing" if args.choose else str(args.facts)
    model, known = load_demo_model(args.model), {}
    folder = RESULTS / "many_facts" / f"{args.model}-{kind}"
    options = {"together": len(records), "progress": False}
    for setting in args.settings:
        started, out = time.perf_counter(), folder / f"{setting}.jsonl"
        evaluate_counterfact(model, records, method_of(setting, known), out=out, **options)
        print(f"{setting}: {time.perf_counter() - started:.0f} s", flush=True)
    print("| setting | " + " | ".join(SHOWN) + " |\n" + "|---" * (len(SHOWN) + 1) + "|")
    for path in sorted(folder.glob("*.jsonl")):
        results = Results.load(path)
        scores = results.scores(edited=path.stem != "unedited")
        print(f"| {path.stem} | " + " | ".join(str(scores[shown]) for shown in SHOWN) + " |")


if __name__ == "__main__":
    main()
