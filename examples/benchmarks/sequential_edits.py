"""A thousand facts one after another on Gemma-3-270M: what is left of the model, and of the facts.

    python examples/benchmarks/sequential_edits.py RECORDS TEXT FOLDER default|released [guarded]

RECORDS is CounterFact; 1,000 records of different subjects are written, from the 400th by case_id
on (no setting was chosen on them). TEXT is plain text: C comes from its first 61,440 tokens
(WikiText-2), held-out text from what follows. The context prefixes are six of those committed. Each
edit is kept in FOLDER, from which a run that was stopped goes on. What is measured goes to
examples/results/sequential/: NAME.jsonl at checkpoints, NAME.csv after each edit. With "guarded",
edits that damage the model are taken off again, and the sequence ends before too much is lost
(`transformer_lens_rome.sequential.Guard`).
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from transformer_lens_rome import (
    CounterFact,
    RomeConfig,
    SecondMoment,
    collect_second_moment,
    get_method,
)
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import CounterFactRecord
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.held_out import held_out_nll, held_out_rows
from transformer_lens_rome.prompts.scores import target_log_probs
from transformer_lens_rome.sequential import EditSequence, Guard, edit_in_sequence

RESULTS = Path(__file__).parents[1] / "results"
SETTINGS = {"default": (0, RomeConfig()), "released": (5, RomeConfig.released(ridge=1e-6))}
CHECKPOINTS = (1, 10, 25, 50, 75, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
STATISTICS = 240 * 255  # tokens of TEXT
WATCHED, HELD_OUT = (4, 64), (16, 128)  # texts, tokens: after every edit; at checkpoints


def main(records_file: str, text_file: str, folder: str, name: str, guarded: str = "") -> None:
    """Write the facts, and measure at each checkpoint."""
    records = chosen(records_file)
    model = load_demo_model()
    ids = model.tokenizer(
        Path(text_file).read_text(encoding="utf-8"), add_special_tokens=False
    ).input_ids
    watched = texts(model, ids, STATISTICS, *WATCHED)
    held_out = texts(model, ids, STATISTICS + math.prod(WATCHED), *HELD_OUT)
    layer, config = SETTINGS[name]
    every = json.loads((RESULTS / "prefixes.json").read_text())
    method = get_method(
        "rome",
        layer=layer,
        config=config,
        prefixes=tuple([*every[:4], *every[11:13]]),
        second_moment=moment(model, ids, layer, Path(folder) / f"C{layer}.safetensors"),
    )
    name = f"{name}_{guarded}" if guarded else name
    out = RESULTS / "sequential" / f"{name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for n in CHECKPOINTS:
        if any(row["requests"] == n or row["stopped"] for row in done):
            continue
        sequence = edit_in_sequence(
            model,
            [record.request for record in records[:n]],
            method,
            texts=watched,
            guard=Guard() if guarded else None,
            folder=Path(folder) / name,
        )
        with sequence:
            row = measured(model, sequence, records[:n], held_out)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        out.with_suffix(".csv").write_text(per_edit(sequence))
        print(json.dumps(row), flush=True)
        if sequence.stopped:
            break


def chosen(path: str) -> list[CounterFactRecord]:
    """The records to write: no two of one subject."""
    found: dict[str, CounterFactRecord] = {}
    for record in sorted(CounterFact.load(path), key=lambda record: record.case_id)[400:]:
        found.setdefault(record.request.subject, record)
    return list(found.values())[: CHECKPOINTS[-1]]


def texts(model: Any, ids: list[int], start: int, n: int, length: int) -> list[str]:
    """Some texts of about so many tokens, one after another."""
    parts = [ids[start + i * length : start + (i + 1) * length] for i in range(n)]
    return [model.tokenizer.decode(part) for part in parts]


def moment(model: Any, ids: list[int], layer: int, path: Path) -> SecondMoment:
    """C, collected once."""
    if path.exists():
        return SecondMoment.load(path)
    rows = [ids[i : i + 255] for i in range(0, STATISTICS, 255)]
    found = collect_second_moment(model, rows, layer, max_tokens=61_440, source="wikitext-2")
    found.save(path)
    return found


def per_edit(sequence: EditSequence) -> str:
    """NLL of the watched text after each edit, whether it was kept, and P(target) just after it."""
    lines = ["request,kept,nll,p_after", f"0,,{sequence.nll:.4f},"]
    for step in sequence.steps:
        numbers = ["" if x is None else f"{x:.4f}" for x in (step.nll, step.p_after)]
        lines.append(f"{step.number},{step.kept:d},{','.join(numbers)}")
    return "\n".join(lines) + "\n"


def measured(
    model: Any, sequence: EditSequence, records: list[CounterFactRecord], held_out: list[str]
) -> dict[str, Any]:
    """Perplexity, and what is left of all facts written so far."""
    kept = [record for record, step in zip(records, sequence.steps) if step.kept]
    some = kept[:: max(1, len(kept) // 100)]
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
        "PS": [(prompt, record) for record in some for prompt in record.paraphrase_prompts[:1]],
        "NS": [(prompt, record) for record in some for prompt in record.neighborhood_prompts[:1]],
    }
    for metric, pairs in asked.items():
        row[metric] = share(model, encoder, pairs, metric == "NS")
    return row


def share(model: Any, encoder: Encoder, pairs: list[tuple[str, CounterFactRecord]], true: bool):
    """In percent, how often the new target is more probable than the true one, or the reverse."""
    prompts = [prompt for prompt, _ in pairs for _ in range(2)]
    goals = [g for _, r in pairs for g in (r.request.target_new, r.request.target_true)]
    found = [p.mean().item() for p in target_log_probs(model, prompts, goals, encoder=encoder)]
    wins = [new > old for new, old in zip(found[::2], found[1::2])]
    return 100 * sum(win != true for win in wins) / len(wins) if wins else None


if __name__ == "__main__":
    main(*sys.argv[1:])
