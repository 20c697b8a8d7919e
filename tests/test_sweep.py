"""Sweeps: a layer's scores are those of a run, the model stays, a stopped sweep goes on."""

import dataclasses
import json

import pytest
import torch
from helpers.rome_setting import CONFIG, PREFIXES, random_moment

from transformer_lens_rome import CounterFact, evaluate_counterfact, sweep_layers
from transformer_lens_rome.evaluation import Results
from transformer_lens_rome.evaluation.records import as_record
from transformer_lens_rome.evaluation.work import ScoreEdited
from transformer_lens_rome.methods.rome import Rome
from transformer_lens_rome.model.adapter import w_out, weight_hash

RECORDS = [
    {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "{} is located in the city of",
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": true},
        },
        "paraphrase_prompts": [f"Everyone knows {subject} in the old city of", "not scored"],
        "neighborhood_prompts": ["The Colosseum is located in the city of", "not scored"],
    }
    for number, (subject, new, true) in enumerate(
        [("The Space Needle", "Paris", "Seattle"), ("The Tower", "Rome", "London")], start=7
    )
]
LAYERS = [0, 1]
MOMENTS = {layer: random_moment(128, seed=layer) for layer in LAYERS}


def run(model, records=RECORDS, layers=LAYERS, **options):
    known = {"second_moments": MOMENTS, "prefixes": PREFIXES, "config": CONFIG, "progress": False}
    return sweep_layers(model, records, layers, **(known | options))


def cases(folder):
    """The layers and records in a sweep's folder, in the order of the files' lines."""
    lines = {
        path.stem: [json.loads(line)["case_id"] for line in path.read_text().splitlines()[1:]]
        for path in sorted(folder.glob("layer_*.jsonl"))
    }
    return [(int(name[6:]), case) for name, some in lines.items() for case in some]


def scores(swept):
    """The metrics of a sweep, without its times."""
    return [(score.layer, score.results.metrics(), score.ES, score.S) for score in swept]


def test_a_layer_is_a_run_of_all_prompts(gpt2, tmp_path):
    hashes = [weight_hash(w_out(gpt2, layer)) for layer in range(3)]
    swept = run(gpt2, out=tmp_path)
    assert [weight_hash(w_out(gpt2, layer)) for layer in range(3)] == hashes
    assert cases(tmp_path) == [(0, 7), (0, 8), (1, 7), (1, 8)]
    for layer, one in zip(LAYERS, swept, strict=True):
        rome = Rome(layer, MOMENTS[layer], PREFIXES, CONFIG)
        parsed = [as_record(record) for record in RECORDS]
        alone = evaluate_counterfact(gpt2, parsed, rome, progress=False)
        assert one.layer == layer and one.results.metrics() == alone.metrics()
        assert [one.ES, one.PS, one.NS, one.S] == [
            alone.scores()[name].mean for name in ("ES", "PS", "NS", "S")
        ]
        assert f"layer {layer}: ES {alone.scores()['ES']}, PS" in str(one)
        assert Results.load(tmp_path / f"layer_{layer}.jsonl").metrics() == alone.metrics()
        prompts = one.results.after[7].scores
        assert [len(prompts[kind]) for kind in ("paraphrase", "neighborhood")] == [2, 2]


def test_a_layer_where_every_edit_fails_has_no_score(gpt2, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("no v*")

    monkeypatch.setattr(Rome, "_compute", fails)
    (one,) = run(gpt2, layers=[1], out=tmp_path)
    assert str(one) == "layer 1: , 2 failed"
    with pytest.raises(ValueError, match=r"every edit at layer 1 failed.*no v\*"):
        one.S


def test_records_come_from_a_file_of_either_schema(gpt2, tmp_path):
    """A flat record needs to be known to have a paraphrase."""
    flat = [
        {
            "case_id": record["case_id"],
            "prompt": f"{rewrite['subject']} is located in the city of",
            "subject": rewrite["subject"],
            "target_new": rewrite["target_new"]["str"],
            "ground_truth": rewrite["target_true"]["str"],
            "rephrase_prompt": record["paraphrase_prompts"][0],
            "locality_prompt": record["neighborhood_prompts"][0],
        }
        for record in RECORDS
        for rewrite in [record["requested_rewrite"]]
    ]
    (tmp_path / "records.json").write_text(json.dumps(flat))
    loaded = CounterFact.load(tmp_path / "records.json", true_paraphrases=[7, 8])
    (full,), (few,) = run(gpt2, layers=[0]), run(gpt2, loaded, layers=[0])
    for case, row in few.results.after.items():
        for kind, (first, *more) in row.scores.items():
            other = full.results.after[case].scores[kind]
            assert not more and first.new == pytest.approx(other[0].new, abs=1e-4)
    assert few.results.data["sha256"] == loaded.digest
    with pytest.raises(ValueError, match="record 7 has no paraphrase or no neighbour"):
        run(gpt2, flat)
    with pytest.raises(ValueError, match="rephrase_prompt: it is missing"):
        run(gpt2, [{k: v for k, v in flat[0].items() if k != "rephrase_prompt"}])


@pytest.mark.slow
def test_a_cut_sweep_goes_on_and_does_nothing_twice(gpt2, tmp_path, monkeypatch):
    out = tmp_path / "new"
    whole = run(gpt2, out=out, batch_size=1)
    lines = (out / "layer_1.jsonl").read_text().splitlines(keepends=True)
    (out / "layer_1.jsonl").write_text("".join(lines[:2]) + lines[2][:25])  # the second is torn
    made = []
    edits = ScoreEdited._edits

    def counted(work, model, records):
        made.extend((work.method.layer, record.case_id) for record in records)
        return edits(work, model, records)

    monkeypatch.setattr(ScoreEdited, "_edits", counted)
    assert scores(run(gpt2, out=out)) == scores(whole)
    assert made == [(1, 8)] and cases(out) == [(0, 7), (0, 8), (1, 7), (1, 8)]
    made.clear()
    assert scores(run(gpt2, out=out)) == scores(whole) and not made


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "another seed"),
        ({"prefixes": ("",)}, "another method"),
        ({"config": dataclasses.replace(CONFIG, lr=0.25)}, "another method"),
        ({"second_moments": dict.fromkeys(LAYERS, MOMENTS[0])}, "another method"),
        ({"records": [r | {"paraphrase_prompts": ["In Cairo, the"]} for r in RECORDS]}, "record 7"),
    ],
)
def test_rows_of_another_sweep_are_not_taken(gpt2, tmp_path, other, words):
    run(gpt2, out=tmp_path, layers=[1])
    with pytest.raises(ValueError, match=words):
        run(gpt2, **({"out": tmp_path, "layers": [1]} | other))


def test_rows_of_another_model_are_not_taken(gpt2, tmp_path):
    run(gpt2, out=tmp_path, layers=[1])
    with torch.no_grad():
        w_out(gpt2, 2).mul_(1.01)
    with pytest.raises(ValueError, match="another model_hash"):
        run(gpt2, out=tmp_path, layers=[1])


@pytest.mark.slow
def test_more_layers_and_records_are_added(gpt2, tmp_path):
    run(gpt2, RECORDS[:1], layers=[1], out=tmp_path)
    first = (tmp_path / "layer_1.jsonl").read_text()
    run(gpt2, out=tmp_path)
    assert (tmp_path / "layer_1.jsonl").read_text().startswith(first)
    assert cases(tmp_path) == [(0, 7), (0, 8), (1, 7), (1, 8)]
