"""The paper's qualitative comparison: how the model goes on after each method's edit of one fact.

    python examples/benchmarks/after_each_edit.py EDITORS

EDITORS is the folder that `train_editors.py` filled. One prompt is the edited one, two are about
the same subject, two about others: what is written there tells whether the edit bleeds over. Writes
examples/results/counterfact/after_each_edit.md.
"""

import sys
from pathlib import Path

from paper_table import NAMES, RESULTS, paper_method

from transformer_lens_rome import EditRequest
from transformer_lens_rome.demo import load_demo_model
from transformer_lens_rome.evaluation import compare_generations

REQUEST = EditRequest("{} is located in the city of", "The Space Needle", "Paris", "Seattle")
PROMPTS = (
    REQUEST.text,
    "The Space Needle is near",
    "To get to the Space Needle, you can take",
    "Pike Place Market is located in the city of",
    "The Statue of Liberty is located in the city of",
)


def main(editors: str) -> None:
    """Make every edit, and let the model go on with the same draws after each."""
    model, edits = load_demo_model(), {}
    for name in NAMES:
        edits[name] = paper_method(name, Path(editors)).compute(model, REQUEST)
        print(name, edits[name].health)
    found = compare_generations(model, PROMPTS, edits, length=30)
    asked = f"After the edit *{REQUEST.text}* -> *{REQUEST.target_new}* (top-k 5, seed 0):"
    path = RESULTS / "counterfact" / "after_each_edit.md"
    path.write_text(f"{asked}\n\n{found.table()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
