"""Two texts one below the other, so that a reader sees where they differ."""

from __future__ import annotations

from difflib import SequenceMatcher


def aligned(before: str, after: str) -> tuple[str, str]:
    """Return two texts with equal words in the same columns, and differing ones in brackets."""
    old, new = before.split(), after.split()
    parts: tuple[list[str], list[str]] = ([], [])
    for kind, i, j, k, m in SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        both = [" ".join(old[i:j]), " ".join(new[k:m])]
        if kind != "equal":
            both = [f"[{text}]" if text else "" for text in both]
        width = max(map(len, both))
        for side, text in zip(parts, both, strict=True):
            side.append(text.ljust(width))
    return " ".join(parts[0]).rstrip(), " ".join(parts[1]).rstrip()
