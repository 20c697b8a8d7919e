"""Ways to damage a file: its bytes, its JSON, its safetensors header, its zip parts, its lines.

Each takes a `random.Random` and one content (and for a splice another), and gives a new content; so
the same seed gives the same files.
"""

import copy
import io
import json
import re
import struct
import zipfile

BYTES = (0x00, 0xFF, 0x7F, 0x80, 0x20, 0x22, 0x5C, 0x7B, 0x0A)
SIZES = (0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (0.0, -1.0, 1e-320, 3e38, -3e38, 1e308, float("nan"), float("inf"), float("-inf"))
RAW = (  # JSON that Python's writer does not write
    "1e400",
    "-1e400",
    "1" + "0" * 30,
    "-1" + "0" * 400,
    "1" + "0" * 5000,
    "[" * 40 + "]" * 40,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '{"a": 1, "a": 2}',
    "1.",
    "'x'",
    '"\\ud800"',
    '"\\udfff\\ud800"',
    "\\u0000",
)
HOSTILE = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    2**64,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "a/" * 300,
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{}",
    "{}{}",
    "NaN",
    "0",
    "$\\frac",
    "%s%n{0}",
    "🏳️‍🌈",
    "__class__",
    "_factor",
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"": None},
    {"str": None},
    {"__reduce__": ["os.system", "true"]},
    [0] * 1000,
)


def damaged_bytes(rng, data, other=b""):
    """Bits, bytes and ranges."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        n, at = len(data), rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and at < n:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < n:
            data[at] = rng.choice(BYTES)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 4:
            del data[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 5:
            data[at:at] = data[at : at + rng.choice((1, 8, 100))]
        elif kind == 6 and other:
            data = data[:at] + other[rng.randrange(len(other) + 1) :]
        elif kind == 7:
            data[at : at + 8] = struct.pack("<Q", rng.choice(SIZES))
        else:
            data[at : at + 4] = struct.pack(">I", rng.randrange(2**32))
    return bytes(data)


# ---------------------------------------------------------------- JSON


def _places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from _places(inner, (*path, key))


def hostile(rng, raws):
    """A value to put somewhere; what Python cannot write is a mark that `written` replaces."""
    if rng.random() < 0.25:
        raws.append(rng.choice(RAW))
        return f"@raw{len(raws) - 1}@"
    if rng.random() < 0.01:
        return "x" * rng.choice((100_000, 1_000_001))
    return copy.deepcopy(rng.choice(HOSTILE))


def retyped(rng, value):
    """The same in another type."""
    if isinstance(value, str):
        return rng.choice((value.encode().hex(), [value], {"str": value}, list(value), len(value)))
    if isinstance(value, bool) or value is None:
        return rng.choice((str(value), int(bool(value)), [value]))
    if isinstance(value, (int, float)):
        return rng.choice((str(value), float(value), -value, [value], value * 2**40, bool(value)))
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.items()), str(value)))
    return rng.choice((dict(enumerate(value)), str(value), [value], value * 2, value[::-1]))


def damaged_value(rng, value, raws):
    """A JSON value with one or a few places changed; the value given may be changed, too."""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        places = list(_places(value))
        *path, last = rng.choice(places[1:]) if len(places) > 1 else (None,)
        if last is None:
            return hostile(rng, raws)
        inside = value
        for key in path:
            inside = inside[key]
        kind = rng.randrange(6)
        if kind < 3:
            inside[last] = hostile(rng, raws)
        elif kind == 3:
            del inside[last]
        elif kind == 4:
            inside[last] = retyped(rng, inside[last])
        elif isinstance(inside, dict):
            key = rng.choice(("", "extra", "__class__", "_factor", "format", "layer", f"{last}_"))
            inside[key] = inside.pop(last) if rng.random() < 0.5 else hostile(rng, raws)
        else:
            inside.append(inside[last])
    return value


def written(value, raws):
    """JSON text, with raw parts put in."""
    text = json.dumps(value)
    return re.sub(r'"@raw(\d+)@"', lambda mark: raws[int(mark[1])], text)


def damaged_json(rng, data, other=b""):
    """One JSON value changed, as JSON."""
    raws = []
    return written(damaged_value(rng, json.loads(data), raws), raws).encode()


def damaged_lines(rng, data, other=b""):
    """A file of JSON lines, with lines changed, dropped, doubled or exchanged."""
    lines = data.splitlines(keepends=True)
    kind, at = rng.randrange(6), rng.randrange(len(lines))
    if kind < 3:
        lines[at] = damaged_json(rng, lines[at]) + b"\n"
    elif kind == 3:
        del lines[at]
    elif kind == 4:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    else:
        lines[at], lines[-1] = lines[-1], lines[at]
    return b"".join(lines)


# ---------------------------------------------------------------- safetensors


def _parts(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header, rest):
    return len(header).to_bytes(8, "little") + header + rest


def damaged_metadata(rng, data, other=b""):
    """The JSON that describes the tensors."""
    header, rest = _parts(data)
    own = header["__metadata__"]
    own["transformer_lens_rome"] = damaged_json(rng, own["transformer_lens_rome"]).decode()
    return _joined(json.dumps(header).encode(), rest)


def damaged_header(rng, data, other=b""):
    """Types, shapes, places and names of tensors; or how long the header is said to be."""
    header, rest = _parts(data)
    raws, names = [], [name for name in header if name != "__metadata__"]
    kind, name = rng.randrange(7), rng.choice(names)
    entry = header[name]
    if kind == 0:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2", "X", 3))
    elif kind == 1:
        entry["shape"] = [rng.choice((*SIZES, -1, 3, 4)) for _ in range(rng.randrange(4))]
    elif kind == 2:
        entry["data_offsets"] = [rng.choice((*SIZES, -8)), rng.choice((*SIZES, len(rest)))]
    elif kind == 3:
        header[rng.choice(("extra", "../x", "", "layer", "__metadata__"))] = header.pop(name)
    elif kind == 4:
        header["empty"] = {"dtype": "F32", "shape": [0, rng.choice(SIZES)], "data_offsets": [0, 0]}
    elif kind == 5:
        header = damaged_value(rng, header, raws)
    else:
        return struct.pack("<Q", rng.choice((*SIZES, len(data) - 8, len(data)))) + data[8:]
    return _joined(written(header, raws).encode(), rest)


def damaged_tensors(rng, data, other=b""):
    """Numbers of the tensors; or another order of the axes of one."""
    header, rest = _parts(data)
    rest = bytearray(rest)
    if rng.random() < 0.2:
        entry = rng.choice([value for name, value in header.items() if name != "__metadata__"])
        entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1]))
    for _ in range(rng.choice((1, 3)) if len(rest) > 8 else 0):
        at = rng.randrange(len(rest) // 8) * 8
        number, form = rng.choice(NUMBERS), rng.choice("fde")
        try:
            new = struct.pack(f"<{form}", number)
        except OverflowError:
            new = b"\xff" * 4
        rest[at : at + len(new)] = new
    return _joined(json.dumps(header).encode(), bytes(rest))


# ---------------------------------------------------------------- zip


def damaged_npy(rng, data, other=b""):
    """The header of one array: its type, order and shape; or its bytes."""
    if not data.startswith(b"\x93NUMPY") or rng.random() < 0.3:
        return damaged_bytes(rng, data)
    length = int.from_bytes(data[8:10], "little")
    header, rest = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    shape = ", ".join(str(rng.choice((*SIZES, -1, 3))) for _ in range(rng.randrange(4)))
    kind = rng.randrange(5)
    if kind == 0:
        header = re.sub(r"\(.*?\)", f"({shape},)", header)
    elif kind == 1:
        dtype = rng.choice(("|O", ">f8", "<f2", "<i8", "<U9", "|V8", "<c16", "<f4, <f4", "x"))
        header = re.sub(r"'descr': '[^']*'", f"'descr': '{dtype}'", header)
    elif kind == 2:
        header = header.replace("False", rng.choice(("True", "None", "1/0", "()" * 40, "[" * 300)))
    elif kind == 3:
        header = "__import__('os').abort()".ljust(len(header))
    else:
        header += " " * rng.choice((1, 4000, 60000))
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x09\x00"))
    return data[:6] + version + len(header).to_bytes(2, "little") + header.encode() + rest


def damaged_zip(rng, data, other=b""):
    """The parts of a zip: their content, names, number and compression."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        parts = [(info.filename, file.read(info)) for info in file.infolist()]
    at, target = rng.randrange(len(parts)), io.BytesIO()
    name, content = parts[at]
    kind = rng.randrange(7)
    if kind < 3:
        parts[at] = name, damaged_npy(rng, content)
    elif kind == 3:
        parts[at] = rng.choice(("../../evil", "/etc/evil", "x" * 5000, "_", name + "\x00")), content
    elif kind == 4:
        parts.append((name, rng.choice(parts)[1]))
    elif kind == 5:
        del parts[at]
    packed = zipfile.ZIP_DEFLATED if kind == 6 else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", packed) as file:
        for name, content in parts:
            file.writestr(name, content)
    data = target.getvalue()
    if rng.random() < 0.2:  # sizes and places in the directory at the end
        at = data.rfind(b"PK\x01\x02") + rng.randrange(46)
        data = data[:at] + struct.pack("<I", rng.choice(SIZES) % 2**32) + data[at + 4 :]
    return data


def damaged_pickle(rng, data, other=b""):
    """The pickle inside a `.pt` file."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        parts = [(info.filename, file.read(info)) for info in file.infolist()]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name, content in parts:
            file.writestr(name, _damaged(rng, content) if name.endswith("data.pkl") else content)
    return target.getvalue()


def _damaged(rng, pickled):
    """Its bytes, its opcodes, what it asks for, or the sizes and places of its tensors."""
    kind, at = rng.randrange(4), rng.randrange(len(pickled))
    if kind == 0:
        return damaged_bytes(rng, pickled)
    if kind == 1:
        old = rng.choice((b"collections\nOrderedDict", b"torch\nFloatStorage"))
        new = rng.choice((b"posix\nsystem", b"builtins\neval", b"torch\nload", b"a\nb"))
        return pickled.replace(old, new)
    if kind == 2:
        at = max(pickled.find(b"K", at), 0)
        return pickled[:at] + b"\x8a\x08" + rng.randbytes(8) + pickled[at + 2 :]
    return pickled[:at] + rng.choice((b"(", b"t", b"R", b"b", b"2", b"0", b".")) + pickled[at:]
