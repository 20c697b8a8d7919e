"""Sweeps: the scores are CounterFact's, the model stays, and a stopped sweep goes on."""

import dataclasses
import json

import pytest
import torch
from helpers.rome_setting import CONFIG, PREFIXES, random_moment

from transformer_lens_rome import (
    CounterFact,
    applied,
    compute_rome_edit,
    sweep,
    sweep_layers,
    target_log_probs,
)
from transformer_lens_rome.files.fields import make
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


def saved(path):
    """The rows of a sweep's file, without its first line."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_hand_made_scores():
    """[new, true] pairs: new must win in ES and PS, true in NS; a tie is a loss."""
    rows = [
        sweep.Means(ES=(-1.0, -2.0), PS=(-3.0, -2.0), NS=(-3.0, -2.0)),
        sweep.Means(ES=(-1.0, -2.0), PS=(-1.0, -2.0), NS=(-1.0, -1.0)),
        sweep.Means(ES=(-1.0, -1.0), PS=(-3.0, -2.0), NS=(-1.0, -2.0)),
        sweep.Means(ES=(-0.1, -0.2), PS=(-1.0, -4.0), NS=(-5.0, -0.2)),
    ]
    found = sweep._percent(rows)
    assert found == {"ES": 75, "PS": 50, "NS": 50, "S": pytest.approx(3 / (1 / 75 + 2 / 50))}
    assert sweep._percent(rows[:1]) == {"ES": 100, "PS": 0, "NS": 100, "S": 0}


def test_scores_are_those_of_the_edits_made_one_by_one(gpt2, tmp_path):
    hashes = [weight_hash(w_out(gpt2, layer)) for layer in range(3)]
    scores = run(gpt2, out=tmp_path / "rows.jsonl")
    assert [weight_hash(w_out(gpt2, layer)) for layer in range(3)] == hashes
    rows = saved(tmp_path / "rows.jsonl")
    assert [(r["layer"], r["case_id"]) for r in rows] == [(0, 7), (0, 8), (1, 7), (1, 8)]
    assert [(score.layer, score.n) for score in scores] == [(0, 2), (1, 2)]

    def means(record, field):
        rewrite = record["requested_rewrite"]
        prompt = record[field][0] if field else rewrite["prompt"].format(rewrite["subject"])
        goals = [rewrite["target_new"]["str"], rewrite["target_true"]["str"]]
        found = target_log_probs(gpt2, [prompt] * 2, goals)
        return pytest.approx([one.mean().item() for one in found], abs=1e-4)

    fields = {"ES": "", "PS": "paraphrase_prompts", "NS": "neighborhood_prompts"}
    for row in rows:
        record, layer = RECORDS[row["case_id"] - 7], row["layer"]
        edit = compute_rome_edit(
            gpt2,
            record["requested_rewrite"],
            layer=layer,
            second_moment=MOMENTS[layer],
            prefixes=PREFIXES,
            config=CONFIG,
            progress=False,
        )
        assert row["before"] == {metric: means(record, name) for metric, name in fields.items()}
        with applied(gpt2, edit):
            assert row["after"] == {metric: means(record, name) for metric, name in fields.items()}
        assert row["after"]["ES"] != row["before"]["ES"]
        assert row["relative_norm"] == pytest.approx(edit.health.relative_norm)
    for score in scores:
        mine = [row for row in rows if row["layer"] == score.layer]
        wins = [row["after"]["ES"][0] > row["after"]["ES"][1] for row in mine]
        assert score.ES == 100 * sum(wins) / 2
        assert score.before == sweep._percent([make(sweep.Means, row["before"]) for row in mine])
        assert score.NS == sweep._percent([make(sweep.Means, row["after"]) for row in mine])["NS"]


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
    run(gpt2, layers=[0], out=tmp_path / "rows.jsonl")
    run(gpt2, loaded, layers=[0], out=tmp_path / "loaded.jsonl")
    both = [saved(tmp_path / name) for name in ("rows.jsonl", "loaded.jsonl")]
    for full, few in zip(*both, strict=True):
        assert full.pop("record") != few.pop("record")  # more prompts
        few["seconds"] = full["seconds"]
        assert few == full
    with pytest.raises(ValueError, match="record 7 has no paraphrase or no neighbour"):
        run(gpt2, flat)
    with pytest.raises(ValueError, match="rephrase_prompt: it is missing"):
        run(gpt2, [{k: v for k, v in flat[0].items() if k != "rephrase_prompt"}])


def test_a_cut_sweep_goes_on_and_does_nothing_twice(gpt2, tmp_path, monkeypatch):
    out = tmp_path / "new" / "rows.jsonl"
    whole = run(gpt2, out=out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:25])  # two done, the third torn
    made = []
    compute = sweep.Rome.compute

    def counted(method, model, request, **options):
        made.append((method.layer, request.subject))
        return compute(method, model, request, **options)

    monkeypatch.setattr(sweep.Rome, "compute", counted)
    assert run(gpt2, out=out) == whole
    assert made == [(1, "The Space Needle"), (1, "The Tower")]
    assert [(r["layer"], r["case_id"]) for r in saved(out)] == [(0, 7), (0, 8), (1, 7), (1, 8)]
    made.clear()
    assert run(gpt2, out=out) == whole and not made
    assert run(gpt2) == whole and len(made) == 4  # control: without the file all is made again


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "another seed"),
        ({"prefixes": ("",)}, "another prefixes"),
        ({"config": dataclasses.replace(CONFIG, lr=0.25)}, "another config"),
        ({"second_moments": dict.fromkeys(LAYERS, MOMENTS[0])}, "other statistics"),
    ],
)
def test_rows_of_another_setting_are_not_taken(gpt2, tmp_path, other, words):
    run(gpt2, out=tmp_path / "rows.jsonl", layers=[1])
    with pytest.raises(ValueError, match=words):
        run(gpt2, out=tmp_path / "rows.jsonl", layers=[1], **other)


def test_rows_of_other_records_are_not_taken(gpt2, tmp_path):
    run(gpt2, out=tmp_path / "rows.jsonl", layers=[1])
    others = [record | {"paraphrase_prompts": ["In Cairo, the"]} for record in RECORDS]
    with pytest.raises(ValueError, match="other records"):
        run(gpt2, others, out=tmp_path / "rows.jsonl", layers=[1])


def test_a_file_of_another_model_or_run_is_not_taken(gpt2, tmp_path):
    run(gpt2, out=tmp_path / "rows.jsonl", layers=[1])
    with torch.no_grad():
        w_out(gpt2, 2).mul_(1.01)
    with pytest.raises(ValueError, match="another model_hash"):
        run(gpt2, out=tmp_path / "rows.jsonl", layers=[1])
    (tmp_path / "rows.jsonl").write_text('{"layer": 1, "case_id": 7}\n')
    with pytest.raises(ValueError, match="is not the file of a run"):
        run(gpt2, out=tmp_path / "rows.jsonl", layers=[1])


def test_more_layers_and_records_are_added(gpt2, tmp_path):
    out = tmp_path / "rows.jsonl"
    run(gpt2, RECORDS[:1], layers=[1], out=out)
    first = out.read_text()
    assert run(gpt2, out=out) == run(gpt2)
    assert out.read_text().startswith(first)
    assert sorted((r["layer"], r["case_id"]) for r in saved(out)) == [
        (0, 7),
        (0, 8),
        (1, 7),
        (1, 8),
    ]


def test_an_error_in_the_middle_keeps_what_was_done_and_the_model(gpt2, tmp_path, monkeypatch):
    out, before = tmp_path / "rows.jsonl", weight_hash(w_out(gpt2, 0))
    score = sweep.Means.of
    calls = []

    def fails_on_the_second_edit(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(sweep.Means, "of", fails_on_the_second_edit)
    with pytest.raises(KeyboardInterrupt):
        run(gpt2, layers=[0], out=out)
    assert weight_hash(w_out(gpt2, 0)) == before
    assert [row["case_id"] for row in saved(out)] == [7]
