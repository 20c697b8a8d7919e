"""Seconds and memory of one method's edits, in a process of its own.

    python examples/benchmarks/edit_cost.py MODEL RECORDS NAME [EDITORS]

Makes, and does not score, the edits of the first 8 of the table's records, one to warm up before
them. Memory is the highest above what the model itself takes. Arguments as for `paper_table.py`.
"""

import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Measured
from paper_table import paper_method, table_records

from transformer_lens_rome.demo import load_demo_model

N = 8


def main(model_name: Any, records_file: str, name: str, editors: str = "") -> None:
    """Time the edits one by one."""
    records = table_records(records_file)
    model = load_demo_model(model_name)
    method = paper_method(name, Path(editors) if editors else None)
    with Measured(torch.device("cpu")) as whole:
        if prepared := getattr(method, "prepared", None):
            method = prepared(model, seed=0)
        method.compute(model, records[N].request)
        seconds = []
        for record in records[:N]:
            with Measured(torch.device("cpu")) as one:
                method.compute(model, record.request)
            seconds.append(one.seconds)
    print(
        f"{name}: {median(seconds):.2f} s an edit ({min(seconds):.2f} to {max(seconds):.2f}), "
        f"{whole.peak_mb / 1e3:.2f} GB, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
