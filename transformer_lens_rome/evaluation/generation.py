"""Fluency and consistency of generated text: GE and RS (Meng et al. 2022, section 3.4).

    GE   (2/3 H2 + 4/3 H3) / 2: H2 and H3 are the entropies in bits of a text's bigrams, trigrams
    RS   the cosine of two TF-IDF vectors: of all generated texts, and of texts about subjects
         that do have the new target as their object

As in the released code, a text has 100 tokens with its prompt, is sampled with top-k 5, and both
numbers are computed from whole texts, prompts included. Here sampling has a seed. Words come from
NLTK's Treebank tokenizer after an untrained sentence splitter, so no language data is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from transformer_lens_rome.evaluation.records import CounterFactRecord
from transformer_lens_rome.extras import needed
from transformer_lens_rome.files.cache import cache_folder
from transformer_lens_rome.files.download import Published, download
from transformer_lens_rome.files.fields import fits
from transformer_lens_rome.files.strict_json import MAX_DEPTH, read_json

HOST = "https://rome.baulab.info/data/dsets/"
PUBLISHED = {
    "attribute_snippets.json": (
        926_285_719,
        "10b5c1cd105e54d5983c72de1b45bfc88bc7af786f7b99def2557886ff23385b",
    ),
    "idf.npy": (11_042_168, "c073d642589d4ac6432f467230329b36364a01e72de63a77a3624b745b923dda"),
    "tfidf_vocab.json": (
        31_639_072,
        "8a78c4f20d8d85dadfd14e283d71af255482ff18aa0eb8a81716024c05ff888b",
    ),
}


def cleaned(text: str) -> str:
    """Return a generated text in the released code's form: NFKD, without blank lines."""
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


def words(text: str) -> list[str]:
    """Return the words of a text, for GE.

    Raises:
        ImportError: NLTK is not installed; the message names the extra that installs it.
    """
    nltk = needed("nltk", "generation")
    sentences = nltk.tokenize.PunktSentenceTokenizer().tokenize(text)
    splitter = nltk.tokenize.NLTKWordTokenizer()
    return [word for sentence in sentences for word in splitter.tokenize(sentence)]


def ngram_entropy(tokens: Sequence[str]) -> float:
    """Return (2/3 H2 + 4/3 H3) / 2 of one text, in bits; 0 for fewer than two words."""
    two, three = (_entropy(zip(*(tokens[i:] for i in range(n)))) for n in (2, 3))
    return (2 / 3 * two + 4 / 3 * three) / 2


def _entropy(items: Iterable[Any]) -> float:
    counts = Counter(items)
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def fluency(texts: Sequence[str]) -> float:
    """Return GE: the mean n-gram entropy of the texts, in bits."""
    return sum(ngram_entropy(words(text)) for text in texts) / len(texts)


@dataclass(frozen=True)
class TfIdf:
    """TF-IDF with scikit-learn's defaults: lower-cased words of two or more characters.

    Attributes:
        idf: The weight of each known term.
    """

    idf: Mapping[str, float] = field(repr=False)

    @classmethod
    def load(cls, vocabulary: Any = None, idf: Any = None) -> TfIdf:
        """Read the published weights, `tfidf_vocab.json` and `idf.npy`; download them by default.

        Raises:
            ValueError: The files are of another format, or do not belong together.
            OSError: There is no such file, or no network.
        """
        path, idf_path = _published("tfidf_vocab.json", vocabulary), _published("idf.npy", idf)
        indices, weights = read_json(path), _numbers(idf_path)
        valid = isinstance(indices, dict) and all(type(i) is int for i in indices.values())
        if not valid or sorted(indices.values()) != list(range(len(weights))):
            raise ValueError(
                f"the vocabulary {path} and the weights {idf_path} do not fit together"
            )
        if not all(0 <= weight < 1000 for weight in weights):  # ln(n) + 1 of n documents
            raise ValueError(f"{idf_path} contains weights outside 0 to 1000")
        return cls({term: weights[i] for term, i in indices.items()})

    @classmethod
    def fit(cls, documents: Iterable[str]) -> TfIdf:
        """Compute smoothed weights, ln((1 + n) / (1 + df)) + 1, from n documents."""
        document_counts: Counter[str] = Counter()
        n = 0
        for document in documents:
            document_counts.update(set(_terms(document)))
            n += 1
        return cls({term: math.log((1 + n) / (1 + df)) + 1 for term, df in document_counts.items()})

    def vector(self, text: str) -> dict[str, float]:
        """Return counts of known terms times their weights, with L2 norm 1 (or empty)."""
        counts = Counter(term for term in _terms(text) if term in self.idf)
        raw = {term: count * self.idf[term] for term, count in counts.items()}
        norm = math.sqrt(sum(value * value for value in raw.values()))
        return {term: value / norm for term, value in raw.items()}

    def similarity(self, one: str, other: str) -> float:
        """Return the cosine of two texts' vectors, 0 to 1."""
        a, b = self.vector(one), self.vector(other)
        return sum(value * b.get(term, 0.0) for term, value in a.items())


def _numbers(path: Path) -> list[float]:
    """Return the numbers of a `.npy` file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:  # a map, because NumPy then compares the array's size with the file's
        array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=1024)
    except Exception as error:  # NumPy raises errors of many types for a damaged header
        raise ValueError(f"{path} is not a complete array of numbers ({error!r:.400})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fi":
        raise ValueError(f"{path} is not a .npy file of numbers")
    return array.reshape(-1).tolist()


def _terms(text: str) -> list[str]:
    return re.findall(r"(?u)\b\w\w+\b", text.lower())


@dataclass(frozen=True)
class References:
    """The reference texts of RS: texts about subjects whose object is a record's new target.

    Attributes:
        texts: Joined texts by "relation_id/target_id".
        tfidf: The weights of terms.
        digest: The first sixteen digits of the sha256 of both, saved with results.
    """

    texts: Mapping[str, str] = field(repr=False)
    tfidf: TfIdf = field(repr=False)
    digest: str = ""

    @classmethod
    def extract(
        cls, records: Iterable[CounterFactRecord], snippets: Any = None, tfidf: TfIdf | None = None
    ) -> References:
        """Stream the snippets (926 MB) and keep the texts that the records need.

        Args:
            records: The records to be evaluated.
            snippets: The path of `attribute_snippets.json`. None: it is downloaded.
            tfidf: The weights of terms. None: the published weights.

        Raises:
            ValueError: The file is not a snippets file.
            OSError: There is no such file, or no network.
            ImportError: ijson is not installed; the message names the extra that installs it.
        """
        wanted = {key(record) for record in records}
        texts_by_key: dict[str, list[str]] = {}
        for name, texts in _snippets(_published("attribute_snippets.json", snippets)):
            if name in wanted:
                texts_by_key.setdefault(name, []).extend(texts)
        joined = {name: " ".join(texts) for name, texts in texts_by_key.items()}
        return cls.of(joined, tfidf or TfIdf.load())

    @classmethod
    def of(cls, texts: Mapping[str, str], tfidf: TfIdf) -> References:
        """Make references from given texts, by "relation_id/target_id"."""
        known = {
            term: tfidf.idf[term]
            for text in texts.values()
            for term in set(_terms(text))
            if term in tfidf.idf
        }
        state = json.dumps([sorted(texts.items()), sorted(known.items())])
        return cls(dict(texts), tfidf, hashlib.sha256(state.encode()).hexdigest()[:16])

    def consistency(self, record: CounterFactRecord, texts: Sequence[str]) -> float | None:
        """Return RS of a record's generated texts, 0 to 1; None if it has no reference texts."""
        if not (reference := self.texts.get(key(record))):
            return None
        return self.tfidf.similarity(" ".join(texts), reference)


def _snippets(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the key and the texts of each item of a snippets file, while it is read."""
    ijson = needed("ijson", "generation")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        try:
            for i, item in enumerate(_items(file, ijson)):
                yield _key_and_texts(item, i)
        except (ijson.JSONError, ValueError) as error:
            raise ValueError(f"{path} is not a snippets file ({str(error):.300})") from error


def _items(file: BinaryIO, ijson: Any) -> Iterator[Any]:
    """Yield the items of a JSON list, from the events of a parser.

    `ijson.items` is shorter, but nesting of depth n takes it memory of n squared, and without
    `use_float` it crashes on a number of 5,000 digits.
    """
    events = ijson.basic_parse(file, use_float=True)
    if next(events)[0] != "start_array":
        raise ValueError("it is not a JSON list")
    builder, depth = ijson.ObjectBuilder(), 0
    for event, value in events:
        depth += event.startswith("start_") - event.startswith("end_")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        if depth >= 0:  # below 0, the list has ended
            builder.event(event, value)
        if depth == 0:
            yield builder.value
            builder = ijson.ObjectBuilder()


def _key_and_texts(item: Any, i: int) -> tuple[str, list[str]]:
    """Return the key and the texts of item i of a snippets file."""
    try:
        texts = [sample["text"] for sample in item["samples"]]
        names = [item["relation_id"], item["target_id"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"item {i}: {error!r:.200}") from error
    if not fits([*names, *texts], list[str]):
        raise ValueError(f"item {i} needs text, relation_id and target_id as strings")
    return "/".join(names), texts


def key(record: CounterFactRecord) -> str:
    """Return the key of a record's reference texts: "relation_id/target_id"."""
    return f"{record.relation_id}/{record.target_new_id}"


def _published(name: str, path: Any) -> Path:
    """Return the given path, or the authors' file in the cache folder, downloaded once."""
    if path is not None:
        return Path(path)
    cached = cache_folder() / name
    if not cached.is_file():
        download(Published(HOST + name, *PUBLISHED[name]), cached)
    return cached
