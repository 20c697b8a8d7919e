"""The two ways in which an edit can act: on the weights, or as a text before the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from transformer_lens_rome.edits.context_edit import ContextEdit
from transformer_lens_rome.edits.kinds import Edit


def parted(edits: Sequence[Edit] | None, n_records: int) -> tuple[list[str], Sequence[Edit] | None]:
    """Return the text before the prompts of each record, and the edits that act on weights.

    Args:
        edits: The edit of each record, all by one method; None for the unedited model.
        n_records: The number of records.

    Returns:
        The texts, "" for none; and the edits, or None if no weight changes.
    """
    if edits is None:
        return [""] * n_records, None
    texts = [edit.text if isinstance(edit, ContextEdit) else "" for edit in edits]
    return texts, None if any(texts) else edits
