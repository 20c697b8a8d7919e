"""What the model writes, before and after edits: the paper's figure of generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens_rome.edits.kinds import Edit
from transformer_lens_rome.edits.ledger import applied, edited_weights
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.prompts.sampling import sample_continuations
from transformer_lens_rome.showing import Shown


@dataclass(frozen=True)
class Generations(Shown):
    """Texts that begin with the same prompts.

    Attributes:
        prompts: The beginnings.
        texts: By name, what followed each of them.
    """

    prompts: tuple[str, ...]
    texts: Mapping[str, tuple[str, ...]]

    def rows(self) -> list[tuple[str, str, str]]:
        """(prompt, name, what followed), prompt by prompt; the prompt stands in its first row."""
        return [
            (prompt if first else "", name, " ".join(texts[i].split()))
            for i, prompt in enumerate(self.prompts)
            for first, (name, texts) in zip([True] + [False] * len(self.texts), self.texts.items())
        ]

    def table(self) -> str:
        """The same as a Markdown table."""
        rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in self.rows()]
        return "\n".join(
            ["| prompt | model | goes on |", "|---|---|---|", *map("| {} |".format, rows)]
        )


@model_call
def compare_generations(
    model: Any,
    prompts: Sequence[str],
    edits: Mapping[str, Edit],
    *,
    length: int = 40,
    top_k: int = 5,
    seed: int = 0,
) -> Generations:
    """Let the model go on from prompts, unedited and with each edit on it, with the same draws.

    Args:
        model: A HookedTransformer or TransformerBridge; it is left as it was.
        prompts: Beginnings of text.
        edits: By the name to show.
        length: Tokens of a text, its prompt counted.
        top_k: How many tokens are drawn from.
        seed: Of the draws.

    Raises:
        ValueError: edits on the model, or a prompt that is as long as the text.
    """
    if "unedited" in edits or edited_weights(model):
        raise ValueError('"unedited" is the model without edits; take them off with revert_all')
    encoder, texts = Encoder.of(model), {}
    if any(len(encoder.ids(prompt)) >= length for prompt in prompts):
        raise ValueError(f"a prompt has {length} tokens or more already; give a larger length")
    for name, some in {"unedited": (), **{name: (edit,) for name, edit in edits.items()}}.items():
        with applied(model, *some):
            whole = sample_continuations(
                model, prompts, length, top_k=top_k, seed=seed, encoder=encoder
            )
        pairs = zip(whole, prompts, strict=True)
        texts[name] = tuple(text.removeprefix(prompt) for text, prompt in pairs)
    return Generations(tuple(prompts), texts)
