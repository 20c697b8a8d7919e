"""Interactive views with circuitsvis."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

from circuitsvis.attention import attention_heads
from circuitsvis.logits import token_log_probs
from circuitsvis.tokens import colored_tokens_multi
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_rome.viz.page import View, beside, stack

if TYPE_CHECKING:
    from transformer_lens_rome.causal_trace import CausalTrace


def tokens_by_layer(trace: CausalTrace) -> View:
    """The prompt's tokens, coloured by indirect effect; point at a layer to choose it."""
    labels = [f"layer {layer}" for layer in range(trace.scores.shape[0])]
    tokens = [html.escape(token) for token in trace.tokens]  # or "<bos>" is taken for a tag
    return component(colored_tokens_multi(tokens, trace.indirect_effect.T, labels))


def log_probs_before_and_after(
    tokens: Int[Tensor, "pos"],
    before: Float[Tensor, "pos d_vocab"],
    after: Float[Tensor, "pos d_vocab"],
    to_string: Any,
) -> View:
    """Tokens coloured by log-probability, with the top ten at each, before and after an edit.

    Args:
        tokens: Token ids, of which the first is not predicted and not shown.
        before: Log-probabilities of what follows each token, in nats.
        after: The same with the edit.
        to_string: From a token id to its text, such as `tokenizer.decode`.
    """

    def text(token: int) -> str:
        return html.escape(to_string([int(token)]))

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
    """One layer's attention patterns before and after an edit, and by how much they differ."""
    sides = [
        stack(name, component(attention_heads(patterns.float().cpu(), tokens)))
        for name, patterns in (("before", before), ("after", after))
    ]
    moved = (after - before).abs().max().item()
    return stack(f"largest change of an attention weight: {moved:.3g}", beside(*sides))


def component(rendered: Any) -> View:
    """What circuitsvis rendered, without the program and without its references to a server.

    It renders `<div id=ID/> <script> PROGRAM; CircuitsVis.render(ID, ...) </script>`, with a `div`
    that browsers do not take for closed.
    """
    source = rendered.local_src
    name = re.match(r'<div id="([\w-]+)"', source)
    call = source.rfind(f'CircuitsVis.render(\n      "{name[1]}"') if name else -1
    if call < 0:
        raise RuntimeError("this version of circuitsvis renders otherwise; please report it")
    end = source.rindex("</script>")
    script = source[call:end].replace("</", "<\\/")
    return View(
        f'<div id="{name[1]}"></div><script type="module">{script}</script>', interactive=True
    )
