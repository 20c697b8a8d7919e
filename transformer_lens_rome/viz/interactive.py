"""Interactive views with circuitsvis."""

from __future__ import annotations

from collections.abc import Callable

from circuitsvis.attention import attention_heads
from circuitsvis.logits import token_log_probs
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.viz.page import View, beside, component, stack


def log_probs_before_and_after(
    tokens: Int[Tensor, "pos"],
    before: Float[Tensor, "pos d_vocab"],
    after: Float[Tensor, "pos d_vocab"],
    to_string: Callable[[list[int]], str],
) -> View:
    """Show tokens coloured by log-probability, with the top ten, before and after an edit.

    Args:
        tokens: Token ids; the first is not predicted and not shown.
        before: Log-probabilities of the next token after each token, in nats.
        after: The same with the edit.
        to_string: A function from a list of one token id to its text, such as `tokenizer.decode`.
    """

    def text(token: int) -> str:
        return _text(to_string([int(token)]))

    sides = []
    for name, log_probs in (("before", before), ("after", after)):
        shown = token_log_probs(tokens.cpu(), log_probs.float().cpu(), text)
        sides.append(stack(name, component(shown)))
    return beside(*sides)


def attention_before_and_after(
    tokens: list[str],
    before: Float[Tensor, "head dest src"],
    after: Float[Tensor, "head dest src"],
) -> View:
    """Show one layer's attention patterns before and after an edit, and the largest change."""
    shown = [_text(token) for token in tokens]
    heads = [f"H{head}" for head in range(len(before))]  # longer names overlap on the buttons
    sides = [
        stack(name, component(attention_heads(patterns.float().cpu(), shown, heads)))
        for name, patterns in (("before", before), ("after", after))
    ]
    moved = (after - before).abs().max().item()
    return stack(f"largest change of an attention weight: {moved:.3g}", beside(*sides))


def _text(token: str) -> str:
    """Return a token's text in a form that circuitsvis shows unchanged.

    circuitsvis inserts it as HTML in some places and as text in others. An invisible word joiner
    prevents that "<bos>" becomes a tag, and that "&lt;" becomes an entity.
    """
    return token.replace("<", "<\u2060").replace("&", "&\u2060")
