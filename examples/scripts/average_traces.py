"""Trace the known facts that a model gets right, and average: the paper's figures 2 and 3.

    python examples/scripts/average_traces.py FOLDER [KNOWN_FACTS.json] [N_FACTS]

Traces are kept in FOLDER as they are made; run it again after a stop. The averages are written to
`examples/results/averages/`; `python examples/scripts/figures.py` draws them.
"""

import sys
from pathlib import Path

from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.tracing.averages import average_severed, average_traces
from transformer_lens_rome.tracing.fact_traces import facts_known_to, sever_facts, trace_facts
from transformer_lens_rome.tracing.known_facts import load_known_facts

folder = Path(sys.argv[1])
facts = load_known_facts(sys.argv[2] if len(sys.argv) > 2 else None)
limit = int(sys.argv[3]) if len(sys.argv) > 3 else 100
results = Path(__file__).parents[1] / "results" / "averages"

model = load_demo_model()
known, wrong = facts_known_to(model, facts, limit=limit)
for sever in ("mlp", "attn"):
    traces = sever_facts(model, known, sever=sever, folder=folder / f"severed_{sever}")
    average_severed(traces, n_wrong=wrong).save(results / f"severed_{sever}.safetensors")
for kind in ("resid", "mlp", "attn"):
    traces = trace_facts(model, known, kind=kind, folder=folder / kind)
    average_traces(traces, n_wrong=wrong).save(results / f"{kind}.safetensors")
