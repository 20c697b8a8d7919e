"""Damaged files, thousands of each format: all are refused in words, or fit to be used.

    cd tests && python -m fuzz --count 10000 --out ../examples/results/fuzz.md

For each format a process of its own reads `count` files, each damaged from a seed that is its
number. A file is *accepted* if it is read and then used as users would; *refused* by a ValueError
or FileNotFoundError, which has to name the file; anything else that it ends in is *other*, and so
is taking longer than ten seconds, or a process that dies. `--one N` reads file number N alone.
"""

import argparse
import json
import logging
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIMIT = 10  # seconds for a file
ROOM = 2**31  # bytes of memory; whatever asks for more ends in a MemoryError
HEAD = ("format", "files", "accepted", "refused", "other", "slowest, ms", "memory, MB")


class TooSlow(BaseException):
    """Reading a file took too long; no `except Exception` keeps it."""


def damaged(chosen, name, seed, number):
    """File number `number` of a format."""
    rng = random.Random(f"{seed} {name} {number}")
    data = rng.choice(chosen.seeds)
    if number == 0:
        return data  # the control
    return rng.choice(chosen.mutators)(rng, data, rng.choice(chosen.seeds))


def outcome(chosen, path):
    """Whether a file is accepted or refused, or what else it ends in."""
    try:
        found = chosen.read(path)
    except (ValueError, FileNotFoundError) as error:
        named = path.name in str(error) or "jsonl" in str(error)
        if type(error) in (ValueError, FileNotFoundError) and named and len(str(error)) < 20_000:
            return "refused"
        return f"{type(error).__name__} that does not name the file: {str(error)[:300]}"
    except (Exception, TooSlow):
        return traceback.format_exc(limit=-4)
    try:
        chosen.use(found)
    except (ValueError, NotImplementedError) as error:
        plain = type(error) in (ValueError, NotImplementedError)
        return "refused" if plain else f"in use: {type(error).__name__} {error}"
    except (Exception, TooSlow):
        return "in use: " + traceback.format_exc(limit=-4)
    return "accepted"


def fuzz(name, seed, numbers, show=10):
    """Read damaged files of one format; counts, the slowest in ms, memory in MB."""
    import torch
    from fuzz import formats

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
    chosen = formats.FORMATS[name]()
    counts, slowest = {"accepted": 0, "refused": 0, "other": 0}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{seed}.jsonl"
        path.write_bytes(chosen.seeds[0])
        assert outcome(chosen, path) == "accepted", outcome(chosen, path)
        at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        now = (
            int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
            * resource.getpagesize()
        )
        resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, _too_slow)
        for number in numbers:
            path.write_bytes(damaged(chosen, name, seed, number))
            signal.alarm(LIMIT)
            started = time.perf_counter()
            found = outcome(chosen, path)
            slowest = max(slowest, time.perf_counter() - started)
            signal.alarm(0)
            kind = found if found in counts else "other"
            counts[kind] += 1
            if kind == "other" and counts["other"] <= show:
                print(f"{name} --seed {seed} --one {number}\n{found}", file=sys.stderr)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_start) / 1024
    return {**counts, "slowest, ms": round(1000 * slowest), "memory, MB": round(memory)}


def _too_slow(*_):
    raise TooSlow


def in_a_process(name, options):
    """A row of the table."""
    command = [sys.executable, "-W", "ignore", "-m", "fuzz", "--format", name]
    command += ["--count", str(options.count), "--seed", str(options.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    found = {"other": f"the process died: {done.returncode}"}
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
    print(name, found, file=sys.stderr, flush=True)
    return {"format": f"`{name}`", "files": options.count, **found}


def main():
    """One process a format; a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", help="one format, in this process")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--one", type=int, help="one file, by number")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    if options.format and len(options.format) == 1:
        numbers = range(options.count) if options.one is None else [options.one]
        print(json.dumps(fuzz(options.format[0], options.seed, numbers)))
        return
    from fuzz import formats

    names = options.format or list(formats.FORMATS)
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: in_a_process(name, options), names))
    rows = ["| " + " | ".join(str(row.get(column, "")) for column in HEAD) + " |" for row in rows]
    table = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|", *rows]
    if options.out:
        what = f"`cd tests && python -m fuzz --count {options.count} --seed {options.seed}`"
        options.out.write_text(f"{what}\n\n" + "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
