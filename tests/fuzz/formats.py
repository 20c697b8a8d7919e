"""The formats that are fuzzed: small whole files, ways to damage, read and use them.

`read` may end in ValueError or FileNotFoundError with the file's name; `use`, of what was read, in
ValueError or NotImplementedError. A `use` fails with AssertionError where something was accepted
that should not have been. The tiny models and networks are those of the tests.
"""

from fuzz import data_files, edit_files, result_files

FORMATS = {
    make.__name__: make
    for make in (
        edit_files.rank_one,
        edit_files.dense,
        edit_files.factored,
        edit_files.history,
        edit_files.statistics,
        edit_files.npz,
        edit_files.editor,
        edit_files.training,
        edit_files.published,
        data_files.counterfact,
        data_files.zsre,
        data_files.known,
        data_files.snippets,
        data_files.vocabulary,
        data_files.idf,
        result_files.run,
        result_files.unedited,
        result_files.steps,
        result_files.trace,
        result_files.average,
        data_files.request,
        data_files.prefixes,
    )
}
