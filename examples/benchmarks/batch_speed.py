"""Independent edits searched one by one and in batches: edits an hour, and how far they are apart.

    python examples/benchmarks/batch_speed.py RECORDS [BATCH_SIZE ...]

RECORDS: a CounterFact file; the first requests of it, as many as the largest batch (default sizes:
4 8), are edited on the demo model with its default settings. Every way makes the same edits in one
process. Prints a Markdown table with the counted operations of an edit.
"""

import sys
from functools import partial

from measure import Measured, count_flops

from transformer_lens_rome import CounterFact, compute_rome_edits
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out

sizes = [1, *map(int, sys.argv[2:] or (4, 8))]
requests = [r.request for r in CounterFact.load(sys.argv[1], limit=max(sizes))]
model = load_demo_model()
method = Rome().prepared(model)
known = {
    "layer": method.layer,
    "second_moment": method.second_moment,
    "prefixes": method.prefixes,
    "progress": False,
}
device = w_out(model, method.layer).device
compute_rome_edits(model, requests[:1], **known)  # self-checks run once
print("| batch | edits an hour | ratio | GFLOP an edit | peak memory, MB | largest difference |")
print("|---|---|---|---|---|---|")
alone = None
for size in sizes:
    run = partial(compute_rome_edits, model, requests, batch_size=size, **known)
    with Measured(device) as measured:
        edits = run()
    flops = count_flops(run) / len(edits) / 1e9
    rate = 3600 * len(edits) / measured.seconds
    alone = alone or (rate, edits)
    pairs = zip(edits, alone[1], strict=True)
    apart = max(((a.delta() - b.delta()).norm() / b.delta().norm()).item() for a, b in pairs)
    cells = f"{rate:.0f} | {rate / alone[0]:.2f} | {flops:.0f} | {measured.peak_mb:.0f}"
    print(f"| {size} | {cells} | {apart:.1e} |", flush=True)
