"""The steps of `.ci/release` that are easier said in Python; standard library only.

python release_checks.py contents DIST...    what the wheel and the sdist hold
python release_checks.py version WHEEL       the installed package is this wheel's
python release_checks.py records FILE        two made-up records in CounterFact's schema
python release_checks.py readme FILE         run every Python block in order, in one process
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "transformer_lens_rome"
MACHINE_PATH = re.compile(rb"(?<![\w.:/}])/(?:root|home|work|Users|mnt|opt)/\w[\w./-]*")


def members(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file in a wheel or an sdist."""
    if path.endswith(".whl"):
        with zipfile.ZipFile(path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist())
        return
    with tarfile.open(path) as sdist:
        for member in sdist:
            if member.isfile():
                file = sdist.extractfile(member)
                assert file is not None
                yield member.name.partition("/")[2], file.read()


def contents(*paths: str) -> None:
    """The wheel holds the package and its metadata only; no file names a place on a machine."""
    faults = []
    for path in paths:
        files = dict(members(path))
        for name, data in files.items():
            text = b"\0" not in data[:4096]
            found = [hit.decode() for hit in MACHINE_PATH.findall(data)] if text else []
            faults += [f"{Path(path).name}: {name} names {hit}" for hit in sorted(set(found))]
        if path.endswith(".whl"):
            top = {name.split("/")[0] for name in files}
            info = next(name for name in top if name.endswith(".dist-info"))
            needed = {f"{PACKAGE}/py.typed", f"{info}/licenses/LICENSE"}
            others = [n for n in files if n.endswith((".pyc", ".ipynb")) or "test" in n.lower()]
        else:
            top, others = {PACKAGE, "info"}, []
            needed = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"}
            info = "info"
        faults += [f"{Path(path).name}: {name} is no part of it" for name in others]
        faults += [f"{Path(path).name}: {n} is no part of it" for n in top - {PACKAGE, info}]
        faults += [f"{Path(path).name}: {name} is missing" for name in needed - set(files)]
        size = sum(map(len, files.values()))
        print(f"{Path(path).name}: {len(files)} files, {size / 1e6:.2f} MB unpacked")
    if faults:
        sys.exit("\n".join(faults))


def version(wheel: str) -> None:
    """What is imported comes from this wheel, and says its version."""
    from importlib.metadata import version as installed

    import transformer_lens_rome

    expected = Path(wheel).name.split("-")[1]
    found = transformer_lens_rome.__version__
    if not found == installed(PACKAGE) == expected:
        sys.exit(f"__version__ {found}, metadata {installed(PACKAGE)}, wheel {expected}")
    if "site-packages" not in transformer_lens_rome.__file__:
        sys.exit(f"not the installed package: {transformer_lens_rome.__file__}")
    print(f"{PACKAGE} {found}")


def records(path: str) -> None:
    """Two records of the published schema, about places and languages."""
    asked = (
        ("{} is located in the city of", "The Colosseum", "London", "Rome"),
        ("The mother tongue of {} is", "Victor Hugo", "English", "French"),
    )
    items = [
        {
            "case_id": i,
            "requested_rewrite": {
                "prompt": prompt,
                "relation_id": "",
                "subject": subject,
                "target_new": {"str": new, "id": ""},
                "target_true": {"str": true, "id": ""},
            },
            "paraphrase_prompts": [f"It is known that {prompt.format(subject)}"],
            "neighborhood_prompts": [prompt.format(other) for other in ("The Forum", "Moliere")],
            "attribute_prompts": [],
            "generation_prompts": [],
        }
        for i, (prompt, subject, new, true) in enumerate(asked)
    ]
    Path(path).write_text(json.dumps(items), encoding="utf-8")


def readme(path: str) -> None:
    """Paste each block after the one before, as a reader would."""
    text = Path(path).read_text(encoding="utf-8")
    blocks = [
        (match[1], text.count("\n", 0, match.start(1)) + 1)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]
    if not blocks:
        sys.exit(f"{path} has no Python block")
    names: dict[str, object] = {"__name__": "__main__"}
    for number, (code, line) in enumerate(blocks, start=1):
        started = time.perf_counter()
        exec(compile("\n" * (line - 1) + code, path, "exec"), names)
        seconds = time.perf_counter() - started
        print(f"--- block {number} of {len(blocks)}, line {line}: {seconds:.0f} s", flush=True)
    written = sorted(str(f) for f in Path().rglob("*") if f.is_file())
    print("files written: " + ", ".join(written))


if __name__ == "__main__":
    steps = {step.__name__: step for step in (contents, version, records, readme)}
    if len(sys.argv) < 3 or sys.argv[1] not in steps:
        sys.exit(__doc__)
    steps[sys.argv[1]](*sys.argv[2:])
