"""Hundreds of facts one after another on Gemma-3-270M: what is left of the model, and of the facts.

    python examples/benchmarks/sequential_edits.py RECORDS TABLE IDS TEXT FOLDER NAME

RECORDS is CounterFact in the flat schema, TABLE the file of the tables in the published one, IDS
the JSON list of the `case_id`s whose `rephrase_prompt` is a true paraphrase. Records of different
subjects are written. None of them is in TABLE, which has those on which settings were chosen, and
none among the first 2,000 others of RECORDS, on which editors were trained. NAME is one of

    rome        ROME, one fact after another
    released    ROME with the released constants, at layer 5
    memit       MEMIT in batches of 100, each of which preserves the keys of the batches before it
    alone       MEMIT in batches of 100 that preserve nothing
    alphaedit   AlphaEdit in batches of 100
    encore      MEMIT with ENCORE's stop and norm term, in batches of 100

Watched and held-out text come from TEXT (WikiText-2). Each edit is kept in FOLDER, from which a run
that was stopped goes on. What is measured goes to examples/results/sequential/: NAME.jsonl at
checkpoints, NAME.csv after each edit. With --guarded, edits that damage the model are taken off
again, and the sequence ends before too much is lost (`transformer_lens_rome.sequential.Guard`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformer_lens_rome import CounterFact, MemitConfig, RomeConfig, get_method
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import CounterFactRecord
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.held_out import held_out_nll, held_out_rows
from transformer_lens_rome.prompts.scores import target_log_probs
from transformer_lens_rome.sequential import EditSequence, Guard, edit_in_sequence

RESULTS = Path(__file__).parents[1] / "results" / "sequential"
FIRST = 2000
ONE_BY_ONE = (1, 10, 25, 50, 75, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
BATCH = 100
WATCHED, HELD_OUT = (4, 64), (16, 128)  # texts, tokens: after every edit; at checkpoints


class Sequence(NamedTuple):
    """How facts are written."""

    method: Callable[[], Any]
    batch: int = BATCH
    history: bool = True


ENCORE = MemitConfig(stop="top", top_steps=3, norm_weight=10)
SEQUENCES = {
    "rome": Sequence(lambda: get_method("rome"), 1),
    "released": Sequence(
        lambda: get_method("rome", layer=5, config=RomeConfig.released(ridge=1e-6)), 1
    ),
    "memit": Sequence(lambda: get_method("memit")),
    "alone": Sequence(lambda: get_method("memit"), history=False),
    "alphaedit": Sequence(lambda: get_method("alphaedit")),
    "encore": Sequence(lambda: get_method("memit", config=ENCORE)),
}


def main() -> None:
    """Write the facts, and measure at each checkpoint."""
    args = options()
    records = chosen(args.records, args.table, args.ids)[: args.facts]
    model, sequence = load_demo_model(), SEQUENCES[args.name]
    texts = Path(args.text).read_text(encoding="utf-8")
    ids = model.tokenizer(texts, add_special_tokens=False).input_ids
    watched = pieces(model, ids, 0, *WATCHED)
    held_out = pieces(model, ids, math.prod(WATCHED), *HELD_OUT)
    method = sequence.method().prepared(model)
    name = f"{args.name}_guarded" if args.guarded else args.name
    out = RESULTS / f"{name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    checkpoints = ONE_BY_ONE if sequence.batch == 1 else range(BATCH, len(records) + 1, BATCH)
    for n in checkpoints:
        if n > len(records) or any(row["requests"] == n or row["stopped"] for row in done):
            continue
        written = edit_in_sequence(
            model,
            [record.request for record in records[:n]],
            method,
            texts=watched,
            guard=Guard() if args.guarded else None,
            folder=Path(args.folder) / name,
            batch_size=sequence.batch,
            history=sequence.history,
        )
        with written:
            row = measured(model, written, records[:n], held_out)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        out.with_suffix(".csv").write_text(per_edit(written))
        print(json.dumps(row), flush=True)
        if written.stopped:
            break


def options() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", help="CounterFact, flat schema")
    parser.add_argument("table", help="CounterFact, published schema")
    parser.add_argument("ids", help="case_ids with a true paraphrase")
    parser.add_argument("text", help="plain text")
    parser.add_argument("folder", help="for the edits")
    parser.add_argument("name", choices=SEQUENCES)
    parser.add_argument("--facts", type=int, default=300)
    parser.add_argument("--guarded", action="store_true")
    return parser.parse_args()


def chosen(path: str, table: str, ids: str) -> list[CounterFactRecord]:
    """Return the records to write: no two of one subject."""
    known = {record.case_id for record in CounterFact.load(table)}
    true = set(json.loads(Path(ids).read_text(encoding="utf-8")))
    every = CounterFact.load(path, true_paraphrases=true)
    found: dict[str, CounterFactRecord] = {}
    for record in [one for one in every if one.case_id not in known][FIRST:]:
        if record.paraphrase_prompts:
            found.setdefault(record.request.subject, record)
    return list(found.values())


def pieces(model: Any, ids: list[int], start: int, n: int, length: int) -> list[str]:
    """Return some texts of about so many tokens, one after another."""
    parts = [ids[start + i * length : start + (i + 1) * length] for i in range(n)]
    return [model.tokenizer.decode(part) for part in parts]


def per_edit(sequence: EditSequence) -> str:
    """Return the NLL of the watched text after each edit, and P(target) just after it."""
    lines = ["request,kept,nll,p_after", f"0,,{sequence.nll:.4f},"]
    for step in sequence.steps:
        numbers = ["" if x is None else f"{x:.4f}" for x in (step.nll, step.p_after)]
        lines.append(f"{step.number},{step.kept:d},{','.join(numbers)}")
    return "\n".join(lines) + "\n"


def measured(
    model: Any, sequence: EditSequence, records: list[CounterFactRecord], held_out: list[str]
) -> dict[str, Any]:
    """Return the perplexity, and what is left of all facts written so far."""
    kept = [record for record, step in zip(records, sequence.steps) if step.kept]
    encoder = Encoder.of(model)
    row = {
        "requests": len(records),
        "reached": len(sequence.steps),
        "kept": len(kept),
        "stopped": sequence.stopped,
        "perplexity": math.exp(held_out_nll(model, held_out_rows(encoder, held_out))),
    }
    asked = {
        "ES": [(record.request.text, record) for record in kept],
        "PS": [(prompt, record) for record in kept for prompt in record.paraphrase_prompts[:1]],
        "NS": [(prompt, record) for record in kept for prompt in record.neighborhood_prompts[:1]],
    }
    for metric, pairs in asked.items():
        row[metric] = share(model, encoder, pairs, metric == "NS")
    return row


def share(model: Any, encoder: Encoder, pairs: list[tuple[str, CounterFactRecord]], true: bool):
    """Return how often the new target is more probable than the true one, or the reverse, in %."""
    prompts = [prompt for prompt, _ in pairs for _ in range(2)]
    goals = [g for _, r in pairs for g in (r.request.target_new, r.request.target_true)]
    found = [p.mean().item() for p in target_log_probs(model, prompts, goals, encoder=encoder)]
    wins = [new > old for new, old in zip(found[::2], found[1::2])]
    return 100 * sum(win != true for win in wins) / len(wins) if wins else None


if __name__ == "__main__":
    main()
