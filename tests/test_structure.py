"""The house rules that a parser can hold: imports run one way, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import transformer_lens_rome

PACKAGE = Path(transformer_lens_rome.__file__).parent
NAME = PACKAGE.name
ORDER = (
    "extras torch_states showing < files model < prompts distributed < edits < statistics tracing"
    " < methods < evaluation < edit_report rate sequential sweep < viz demo < cli"
    " < __init__ < __main__"
)
"""The house: a folder imports from those on its left, and from none beside it."""
RANK = {name: i for i, some in enumerate(ORDER.split(" < ")) for name in some.split()}
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}
PATHS = {name.removesuffix(".__init__"): path for name, path in PATHS.items()}
MODULES = sorted(PATHS)
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}


def running(tree):
    """Every node but what stands under `if TYPE_CHECKING:`, which never runs."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from running(node)


def imports(tree):
    """Dotted names of everything that a module imports, at any depth."""
    for node in running(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree):
    """Modules of the package that a module imports; `__init__` for the package's own names."""
    for name in imports(tree):
        package, _, rest = name.partition(".")
        if package == NAME:
            within = [m for m in MODULES if f"{rest}.".startswith(f"{m}.")]
            yield max(within, key=len, default="__init__")


def called(tree):
    """Dotted names of everything that a module calls."""
    return {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}


def literals(tree, name, option):
    """What each call of a function gives for an option, as it is written; None: nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield {k.arg: ast.unparse(k.value) for k in node.keywords}.get(option)


def test_the_parser_finds_what_it_looks_for():
    tree = ast.parse(
        f"import {NAME}.methods.rome\nfrom {NAME} import edits, rome_edit\n"
        f"if TYPE_CHECKING:\n    import {NAME}.sweep\n"
        f"def f():\n    from {NAME}.edits.kinds import Edit\n    torch.load(print(1))\n"
        f"    from {NAME}.viz.page import View"
    )
    assert list(own_imports(tree)) == [
        "methods.rome",
        "edits",
        "__init__",
        "edits.kinds",
        "viz.page",
    ]
    assert called(tree) == {"torch.load", "print"}
    assert [*literals(tree, "torch.load", "weights_only")] == [None]
    tree = ast.parse("torch.load(a, weights_only=False); torch.load(b, weights_only=True, mmap=c)")
    assert [*literals(tree, "torch.load", "weights_only")] == ["False", "True"]


def room(module):
    """The folder of a module, or the module itself where it stands in no folder."""
    return module.split(".")[0]


def test_every_folder_has_its_place():
    assert {room(module) for module in MODULES} == set(RANK), "give the new folder a place in ORDER"


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_up(module):
    mine = room(module)
    others = {room(name) for name in own_imports(TREES[module])} - {mine}
    assert not {other for other in others if RANK[other] >= RANK[mine]}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_adapter_knows_the_model_classes(module):
    classes = {"HookedTransformer", "TransformerBridge"}
    tree = TREES[module]
    if module != "model.load":
        mentioned = {name.split(".")[-1] for name in imports(tree)}
        mentioned |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        mentioned |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not mentioned & classes
    knowing = ("adapter", "passes", "block_calls", "load")
    if module not in (*(f"model.{name}" for name in knowing), "tracing.patching"):
        assert not [n for n in imports(tree) if n.split(".")[0] == "transformer_lens"]
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not attributes & {"blocks", "W_out", "W_U", "W_E", "hook_dict"}, "a module path"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_prints_unpickles_or_seeds(module):
    calls = called(TREES[module])
    forbidden = {"torch.load", "torch.manual_seed", "torch.seed", "np.random.seed", "random.seed"}
    if module == "methods.hypernetworks.published_editors":
        forbidden.remove("torch.load")
        assert [*literals(TREES[module], "torch.load", "weights_only")] == ["True"]
    if module != "cli.commands":
        forbidden |= {"print", "logging.basicConfig"}
    assert not calls & forbidden
    assert not {"pickle", "dill", "joblib", "random"} & {
        name.split(".")[0] for name in imports(TREES[module])
    }
    assert {*literals(TREES[module], "np.load", "allow_pickle")} <= {"False"}


def test_every_public_name_is_there_and_there_are_few():
    names = transformer_lens_rome.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(transformer_lens_rome, name) for name in names)
    assert len(names) <= 30


_QUIET = """
import logging, random, socket, sys
import numpy, torch, transformers, transformer_lens  # whatever these do, they do first
ALREADY = set(sys.modules)
def refuse(*_, **__):
    raise AssertionError("the network was touched")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
def state():
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    own = [l for l in known if isinstance(l, logging.Logger)]
    return {
        "python": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
        "torch": torch.random.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "root": (logging.root.level, list(logging.root.handlers)),
    }, own
before, _ = state()
import transformer_lens_rome
after, loggers = state()
assert before == after, [k for k in before if before[k] != after[k]]
mine = [l for l in loggers if l.name.split(".")[0] == "transformer_lens_rome"]
assert mine and all(l.level == 0 and not l.handlers for l in mine), mine
assert not {"matplotlib", "datasets", "ray"} & (set(sys.modules) - ALREADY)
print("quiet")
"""


@pytest.mark.slow
def test_importing_the_package_changes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _QUIET], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.strip().endswith("quiet"), done.stderr
    assert not list(tmp_path.iterdir())
