"""Losses at the unembedding and their gradients: stored logits against slices of the vocabulary.

    python examples/benchmarks/unembedding.py [d_vocab] [d_model] [threads]

By default 262,144 and 640 (Gemma 3 270M), and torch's number of threads. Of 22 rows one is compared
with the model before (KL), as in a search with 21 prefixes. Each row of the Markdown table has
GFLOP/s of products, forward and backward together, of the fastest of five runs, and the memory that
a run takes at most. Layouts: a bridge has W_U as a transposed view of `[d_vocab, d_model]`, a
HookedTransformer as `[d_model, d_vocab]`. The last column is one large square product, what the
machine can do. With one thread, seconds are those of the process, else of the clock.
"""

import sys
import time
from types import SimpleNamespace

import torch
from measure import Measured

from transformer_lens_rome.model import passes, vocabulary

ROWS, SLICES = (4, 6, 12, 15, 16, 22, 96, 352), (1024, 2048, 4096, 8192)


def seconds(run, times: int = 5) -> float:
    """The fastest of several runs, after one that is not counted."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken = []
    for _ in range(times + 1):
        start = clock()
        run()
        taken.append(clock() - start)
    return min(taken[1:])


def ways(model, rows: int) -> dict:
    """Return the functions to compare, which compute losses and the gradient of their sum."""
    d_model, d_vocab = model.W_U.shape
    n = rows - max(1, rows // 22)
    x = torch.randn(rows, d_model, requires_grad=True)
    labels, log_q = torch.randint(d_vocab, (n,)), torch.randn(rows - n, d_vocab).log_softmax(1)
    unembedding = vocabulary.Unembedding(model.W_U, model.b_U)

    def descend(found) -> None:
        torch.autograd.grad(found.nll.sum() + found.kl.sum(), x)

    def product() -> None:
        logits = torch.addmm(model.b_U, x, model.W_U)
        descend(vocabulary.losses_of_logits(logits, labels, log_q))

    def stored() -> None:
        descend(vocabulary.losses_of_logits(passes.unembed(model, x), labels, log_q))

    def sliced(tokens: int) -> None:
        descend(vocabulary.losses(x, unembedding, labels, log_q, tokens=tokens))

    return {"product": product, "stored": stored} | {t: lambda t=t: sliced(t) for t in SLICES}


def main(d_vocab: int = 262_144, d_model: int = 640, threads: int | None = None) -> None:
    """Print a Markdown table."""
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    weight, square = torch.randn(d_vocab, d_model) / d_model**0.5, torch.randn(2048, 2048)
    heads = ["rows", "W_U", "one product", "in blocks", *(f"slices {t:,}" for t in SLICES)]
    heads += ["GB in blocks", "GB slices 4,096", "square"]
    print("|", " | ".join(heads), "|\n|" + "---|" * len(heads))
    for rows in ROWS:
        for layout, W_U in (("bridge", weight.T), ("hooked", weight.T.contiguous())):
            model = SimpleNamespace(ln_final=lambda x: x, W_U=W_U, b_U=torch.zeros(d_vocab))
            model.cfg = SimpleNamespace(output_logits_soft_cap=0.0)
            each, memory = ways(model, rows), []
            speeds = [4e-9 * rows * d_vocab * d_model / seconds(run) for run in each.values()]
            for name in ("stored", 4096):
                with Measured(torch.device("cpu")) as measured:
                    each[name]()
                memory.append(measured.peak_mb / 1e3)
            limit = 2e-9 * len(square) ** 3 / seconds(lambda: square @ square)
            cells = [*(f"{s:.0f}" for s in speeds), *(f"{m:.2f}" for m in memory), f"{limit:.0f}"]
            print(f"| {rows} | {layout} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
