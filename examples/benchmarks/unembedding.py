"""Unembedding a few rows: one product against a batch of products with blocks of the vocabulary.

    python examples/benchmarks/unembedding.py

Milliseconds, forward and backward, for W_U as a bridge holds it (rows are tokens, transposed) and
as a HookedTransformer does, for the vocabularies of Gemma 3 270M and GPT-2 XL.
"""

import time

import torch

from transformer_lens_rome.model.passes import products


def in_blocks(x: torch.Tensor, W_U: torch.Tensor, b_U: torch.Tensor) -> torch.Tensor:
    """The same as one product."""
    parts = [part.transpose(0, 1).flatten(1) for part in products(x, W_U, b_U)]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def milliseconds(run, x: torch.Tensor, W_U: torch.Tensor, times: int = 6) -> float:
    """One forward and backward pass through a product, the mean after a first one."""
    towards, b_U = torch.randn(len(x), W_U.shape[1]), torch.zeros(W_U.shape[1])
    for i in range(times + 1):
        if i == 1:
            start = time.perf_counter()
        torch.autograd.grad(run(x, W_U, b_U), x, towards)
    return (time.perf_counter() - start) / times * 1e3


def main() -> None:
    """Print a Markdown table."""
    print("| d_model | d_vocab | layout | rows | one product | blocks | ratio |")
    print("|---|---|---|---|---|---|---|")
    for d_model, d_vocab in ((640, 262_144), (1600, 50_257)):
        weight = torch.randn(d_vocab, d_model)
        for layout, W_U in (("bridge", weight.T), ("hooked", weight.T.contiguous())):
            for rows in (1, 12, 60, 180):
                x = torch.randn(rows, d_model, requires_grad=True)
                one = milliseconds(lambda x, W, b: torch.addmm(b, x, W), x, W_U)
                blocks = milliseconds(in_blocks, x, W_U)
                cells = (d_model, d_vocab, layout, rows, f"{one:.0f}", f"{blocks:.0f}")
                print("|", " | ".join(map(str, cells)), f"| {one / blocks:.2f} |")


if __name__ == "__main__":
    main()
