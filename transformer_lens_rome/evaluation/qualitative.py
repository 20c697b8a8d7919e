"""Text that the model generates before and after edits, as in the paper's figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformer_lens_rome.edits.kinds import Edit
from transformer_lens_rome.edits.ledger import applied, edited_weights
from transformer_lens_rome.model.calls import model_call
from transformer_lens_rome.model.protocol import Model
from transformer_lens_rome.prompts.continuations import sample_continuations
from transformer_lens_rome.prompts.encoder import Encoder
from transformer_lens_rome.showing import Shown


@dataclass(frozen=True)
class Generations(Shown):
    """Continuations of the same prompts by several models.

    Attributes:
        prompts: The beginnings of the texts.
        texts: By name of the edit, the continuation of each prompt.
    """

    prompts: tuple[str, ...]
    texts: Mapping[str, tuple[str, ...]]

    def rows(self) -> list[tuple[str, str, str]]:
        """Return rows (prompt, name, continuation); the prompt is only in its first row."""
        return [
            (prompt if first else "", name, " ".join(texts[i].split()))
            for i, prompt in enumerate(self.prompts)
            for first, (name, texts) in zip([True] + [False] * len(self.texts), self.texts.items())
        ]

    def table(self) -> str:
        """Return the rows as a Markdown table."""
        rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in self.rows()]
        return "\n".join(
            ["| prompt | model | goes on |", "|---|---|---|", *map("| {} |".format, rows)]
        )


@model_call
def compare_generations(
    model: Model,
    prompts: Sequence[str],
    edits: Mapping[str, Edit],
    *,
    length: int = 40,
    top_k: int = 5,
    seed: int = 0,
) -> Generations:
    """Continue prompts without edits and with each edit in turn, with the same random draws.

    Args:
        model: A HookedTransformer or TransformerBridge; it is left as it was.
        prompts: Beginnings of text.
        edits: Edits by the name to show.
        length: The number of tokens of a text, prompt included.
        top_k: Sample from the `top_k` most probable tokens.
        seed: The seed of the draws.

    Raises:
        ValueError: There are edits on the model, an edit is named "unedited", or a prompt is as
            long as the text.
    """
    if "unedited" in edits or edited_weights(model):
        raise ValueError(
            '"unedited" is the model without edits; undo its edits with revert_all, and give no '
            'edit the name "unedited"'
        )
    encoder = Encoder.of(model)
    texts: dict[str, tuple[str, ...]] = {}
    if any(len(encoder.ids(prompt)) >= length for prompt in prompts):
        raise ValueError(f"a prompt has {length} tokens or more already; give a larger length")
    variants: dict[str, tuple[Edit, ...]] = {"unedited": ()}
    variants |= {name: (edit,) for name, edit in edits.items()}
    for name, edits_on in variants.items():
        with applied(model, *edits_on):
            full_texts = sample_continuations(
                model, prompts, length, top_k=top_k, seed=seed, encoder=encoder
            )
        pairs = zip(full_texts, prompts, strict=True)
        texts[name] = tuple(text.removeprefix(prompt) for text, prompt in pairs)
    return Generations(tuple(prompts), texts)
