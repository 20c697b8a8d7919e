"""What is fuzzed: for each format small whole files, ways to damage them, how one is read and used.

`read` may end in ValueError or FileNotFoundError with the file's name; `use`, of what was read, in
ValueError or NotImplementedError. A `use` fails with AssertionError where something was accepted
that should not have been. The tiny models and networks are those of the tests.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import fuzz_data
import fuzz_edits
import fuzz_results

FORMATS = {
    make.__name__: make
    for make in (
        fuzz_edits.rank_one,
        fuzz_edits.dense,
        fuzz_edits.factored,
        fuzz_edits.statistics,
        fuzz_edits.npz,
        fuzz_edits.editor,
        fuzz_edits.training,
        fuzz_edits.published,
        fuzz_data.counterfact,
        fuzz_data.zsre,
        fuzz_data.known,
        fuzz_data.snippets,
        fuzz_data.vocabulary,
        fuzz_data.idf,
        fuzz_results.run,
        fuzz_results.unedited,
        fuzz_results.sweep,
        fuzz_results.steps,
        fuzz_results.trace,
        fuzz_results.average,
        fuzz_data.request,
        fuzz_data.prefixes,
    )
}
