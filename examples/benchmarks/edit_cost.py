"""Seconds and memory of one method's edits, in a process of its own.

    python examples/benchmarks/edit_cost.py RECORDS TEXT EDITORS NAME [N]

Makes, and does not score, the edits of the first N (8) records by case_id, one to warm up before
them. Memory is the highest above what the model itself takes. Arguments as for `paper_table.py`.
"""

import sys
from statistics import median

import torch
from measure import Measured
from paper_methods import paper_method

from transformer_lens_rome import CounterFact
from transformer_lens_rome.demo import load_demo_model


def main(records_file: str, text: str, editors: str, name: str, n: str = "8") -> None:
    """Time the edits one by one."""
    records = sorted(CounterFact.load(records_file), key=lambda record: record.case_id)
    model = load_demo_model()
    method = paper_method(name, model, text, editors)
    with Measured(torch.device("cpu")) as whole:
        method = method.prepared(model, seed=0)
        method.compute(model, records[int(n)].request)
        seconds = []
        for record in records[: int(n)]:
            with Measured(torch.device("cpu")) as one:
                method.compute(model, record.request)
            seconds.append(one.seconds)
    print(
        f"{name}: {median(seconds):.2f} s an edit ({min(seconds):.2f} to {max(seconds):.2f}), "
        f"{whole.peak_mb / 1e3:.2f} GB, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
