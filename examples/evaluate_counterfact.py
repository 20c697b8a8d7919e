"""The table of FT, FT+L and ROME on CounterFact records that no setting was chosen on.

    python examples/evaluate_counterfact.py RECORDS.json TEXT.txt [N [ft | ft+l | rome ...]]

RECORDS are CounterFact records, of which the first N (200) by case_id are used; settings were
chosen on records 200 to 319. TEXT is where ROME's second moment comes from. Rows go to
examples/results/counterfact/ as they come, and a run that was stopped goes on where it was.
"""

import sys
from pathlib import Path

from transformer_lens_rome import (
    CounterFact,
    collect_second_moment,
    evaluate_counterfact,
    get_method,
)
from transformer_lens_rome.counterfact import comparison, markdown
from transformer_lens_rome.defaults import default_layer
from transformer_lens_rome.demo import load_demo_model

RESULTS = Path(__file__).parent / "results" / "counterfact"


def main(records_file: str, text_file: str, n: str = "200", *names: str) -> None:
    """Run the methods, and print the table, the paired tests and the seconds."""
    records = sorted(CounterFact.load(records_file), key=lambda record: record.case_id)[: int(n)]
    model = load_demo_model()
    runs = []
    for name in names or ("ft", "ft+l", "rome"):
        options = {}
        if name == "rome":
            ids = model.tokenizer(Path(text_file).read_text(), add_special_tokens=False).input_ids
            texts = [ids[i : i + 255] for i in range(0, 240 * 255, 255)]
            layer = default_layer(model)
            moment = collect_second_moment(
                model, texts, layer, max_tokens=61_440, source="wikitext-2"
            )
            options = {"layer": layer, "second_moment": moment}
        method = get_method(name, **options)
        runs.append(evaluate_counterfact(model, records, method, out=RESULTS / f"{name}.jsonl"))
    print(markdown(runs))
    for run in runs[:-1]:
        print("\n" + comparison(runs[-1], run))
    for run in runs:
        print(run.name, {name: round(value, 2) for name, value in run.seconds.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
