"""Draw what many edits one after another do, into `examples/results/figures/sequential.png`.

Reads what `benchmarks/sequential_edits.py` wrote, from `examples/results/sequential/`.
"""

import csv
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

here = Path(__file__).parents[1]
results = here / "results" / "sequential"
styles = {
    "default": ("RomeConfig()", "C0", "-"),
    "released": ("RomeConfig.released()", "C3", "-"),
    "default_guarded": ("RomeConfig(), guarded", "C0", ":"),
    "released_guarded": ("RomeConfig.released(), guarded", "C3", ":"),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, (label, color, line) in styles.items():
    if not (results / f"{name}.jsonl").exists():
        continue
    style = {"color": color, "linestyle": line, "label": label}
    with (results / f"{name}.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["kept"] != "0" and row["nll"]]
    left.plot(
        [int(row["request"]) for row in steps],
        [math.exp(float(row["nll"])) for row in steps],
        linewidth=1,
        marker="x" if "guarded" in name else "",
        markevery=[-1],  # where the guard ended the sequence
        **style,
    )
    rows = [json.loads(text) for text in (results / f"{name}.jsonl").read_text().splitlines()]
    at = [row["reached"] for row in rows]
    right.plot(at, [row["ES"] for row in rows], marker="o", markersize=3, **style)
left.set(xlabel="request", ylabel="perplexity", yscale="log", title="held-out text")
right.set(xlabel="request", ylabel="ES, %", ylim=(0, 103), title="all facts written so far")
left.set_yticks([150, 200, 300, 500, 800], labels=["150", "200", "300", "500", "800"])
left.tick_params(axis="y", which="minor", left=False, labelleft=False)
left.legend(frameon=False)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
figure.savefig(here / "results" / "figures" / "sequential.png", dpi=110)
