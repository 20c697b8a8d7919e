"""Draw how the editors were trained, into `examples/results/figures/training.png`.

Reads what `train_editors.py` wrote, from `examples/results/editors/`.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

here = Path(__file__).parents[1]
names = ("ke", "ke-cf", "mend", "mend-cf")
runs = {
    name: json.loads((here / "results" / "editors" / f"{name}.json").read_text()) for name in names
}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for color, (name, run) in zip(("C0", "C1", "C2", "C3"), runs.items()):
    steps = [entry["step"] for entry in run["curve"]]
    style = {"color": color, "marker": "o", "markersize": 3, "label": name.upper()}
    left.plot(steps, [entry["edit"] for entry in run["curve"]], **style)
    left.axhline(run["curve"][0]["before"], color=color, linewidth=0.8, linestyle=":")
    right.plot(steps, [entry["locality"] for entry in run["curve"]], **style)
left.set(xlabel="step", ylabel="NLL, nats", title="the target of other edits (dotted: unedited)")
right.set(
    xlabel="step", ylabel="KL(before || after), nats", title="text to leave alone", ylim=(0, None)
)
right.legend(frameon=False)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
figure.savefig(here / "results" / "figures" / "training.png", dpi=110)
