"""The paper's methods with the settings of this comparison, for the scripts beside it."""

from pathlib import Path
from typing import Any

from transformer_lens_rome import collect_second_moment, get_method
from transformer_lens_rome.model.default_layer import default_layer

NAMES = ("ft", "ft+l", "kn", "ke", "ke-cf", "mend", "mend-cf", "rome")
RESULTS = Path(__file__).parents[1] / "results"


def paper_method(name: str, model: Any, text: str, editors: str) -> Any:
    """A method with its defaults.

    Args:
        name: One of NAMES.
        model: The model to edit.
        text: A file of plain text, from which ROME's second moment is collected (61,440 tokens).
        editors: The folder to which `train_editors.py` wrote.
    """
    if name.startswith(("ke", "mend")):
        return get_method(name, editor=Path(editors) / name)
    if name != "rome":
        return get_method(name)
    ids = model.tokenizer(
        Path(text).read_text(encoding="utf-8"), add_special_tokens=False
    ).input_ids
    texts = [ids[i : i + 255] for i in range(0, 240 * 255, 255)]
    layer = default_layer(model)
    moment = collect_second_moment(model, texts, layer, max_tokens=61_440, source="wikitext-2")
    return get_method(name, layer=layer, second_moment=moment)
