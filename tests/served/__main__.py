"""Which architectures are served: every one that TransformerLens knows, tried at a tiny size.

    cd tests && python -m served [NAME ...]

Each family is built from a configuration with random weights and goes through the checks of
`checks.py`, in a process of its own. Results go to examples/results/served_models/, one
file for each model class of the installed TransformerLens (with names: only their rows are made
anew), and the tables of examples/guide/served_models.md are written. No network is used and nothing
is installed.
"""

import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from helpers.tiny_tokenizer import tiny_tokenizer
from served import page
from served.verdict import unbootable, verdict

SHOWN = ("outcome", "reason", "traced", "said")
SECONDS = 300
"""For one family."""


def one(builder, name, tokenizer, answers):
    """Build and judge one family, in a process of its own."""
    warnings.simplefilter("ignore")
    try:
        model = builder.build(name, tokenizer)
    except Exception as error:
        answers.put(unbootable(error))
        return
    answers.put(verdict(model))


def judged(builder, name, tokenizer):
    """One family's verdict, whatever becomes of its process."""
    context = multiprocessing.get_context("fork")
    answers, start = context.SimpleQueue(), time.perf_counter()
    process = context.Process(target=one, args=(builder, name, tokenizer, answers))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if answers.empty():
        seconds = time.perf_counter() - start
        ended = f"the process ended with {process.exitcode} after {seconds:.0f} s"
        return unbootable(ended) | {"outcome": "not finished"}
    return answers.get()


def main(*names: str) -> None:
    """Judge all families, or some of them anew, and write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.INFO)
    for kind, builder in page.builders().items():
        found = page.known(kind) if names else {}
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = tiny_tokenizer(folder, bos=False)
            for name in builder.families():
                if not names or name in names:
                    found[name] = judged(builder, name, tokenizer)
                    print(kind, name, *(found[name][key] for key in SHOWN), flush=True)
                    page.save(kind, {n: found[n] for n in builder.families() if n in found})
    page.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
