"""What it costs an evaluation to see that a method left the model as it was.

    python examples/benchmarks/check_cost.py RECORDS [METHOD ...]

RECORDS: a CounterFact file, of which three records are evaluated. Prints seconds a record and
the share of them that the check takes, for each method (default: rome, ft).
"""

import sys
import time

from transformer_lens_rome import CounterFact, evaluate_counterfact, get_method
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.model.fingerprint import Fingerprint

model = load_demo_model()
records = CounterFact.load(sys.argv[1], limit=3)
before = Fingerprint.of(model)
before.check(model, "nothing")
started = time.perf_counter()
for _ in range(10):
    before.check(model, "nothing")
check = (time.perf_counter() - started) / 10
for name in sys.argv[2:] or ["rome", "ft"]:
    method = get_method(name)
    method = method.prepared(model) if hasattr(method, "prepared") else method
    started = time.perf_counter()
    evaluate_counterfact(model, records, method, progress=False)
    record = (time.perf_counter() - started) / len(records)
    print(f"{name}: {record:.2f} s a record, the check {1000 * check:.0f} ms, {check / record:.1%}")
