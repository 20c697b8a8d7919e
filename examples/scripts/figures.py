"""Draw the figures of this repository, into `examples/results/figures/`.

    python examples/scripts/figures.py

The averages come from `average_traces.py` in this folder; the trace and the edit of the README are
made here, on the demo model.
"""

from pathlib import Path

from transformer_lens_rome import causal_trace, compute_rome_edit, show_edit, viz
from transformer_lens_rome.demo import ASK, REQUEST, load_demo_model
from transformer_lens_rome.statistics.sources import sampled_second_moment
from transformer_lens_rome.tracing.averages import AverageSevered, AverageTrace

here = Path(__file__).parents[1]
results, figures = here / "results" / "averages" / "gemma", here / "results" / "figures"
figures.mkdir(exist_ok=True)

kinds = ("resid", "mlp", "attn")
averages = [AverageTrace.load(results / f"{kind}.safetensors") for kind in kinds]
severed = [AverageSevered.load(results / f"severed_{path}.safetensors") for path in ("attn", "mlp")]
viz.plot_averages(averages).savefig(figures / "averages.png", dpi=110)
viz.plot_lines(averages).savefig(figures / "lines.png", dpi=110)
viz.plot_severed(*severed).savefig(figures / "severed.png", dpi=110)

model = load_demo_model()
trace = causal_trace(model, REQUEST.text, REQUEST.subject, kind="mlp")
trace.plot().savefig(figures / "trace.png", dpi=110)
edit = compute_rome_edit(model, REQUEST, second_moment=sampled_second_moment(model))
report = show_edit(model, edit, [prompt for _, prompt in ASK], kind="mlp")
report.plot().savefig(figures / "edit.png", dpi=110)
