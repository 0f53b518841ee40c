"""Building a bank: what is kept, what is refused; and how its rationales are measured, on pairs with known answers."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from modeling_lrkd.bank_lrkd import BANK_FILE, TEXTS_FILE, RationaleBank
from recipes.arguments import UserError
from recipes.bench.bank import BankBenchArguments, bench, resized
from recipes.evaluate.explanations import MEASURES, METHODS, ExplanationsArguments, judge, measure
from recipes.rationales.bank import BankArguments, build, distinct_rows
from recipes.record import sha256
from recipes.schemas import PAIRS, RATIONALES, write
from tests.modeling.test_pipeline import save, tiny_model

SIZE = 8


def rows(count=24, **changed):
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "pair_id": [f"p{number // 2}" for number in range(count)],
            "query": [f"red shoe {number // 2}" for number in range(count)],
            "product_title": "shoe",
            "locale": "us",
            "label": "Exact",
            "perspective": ["user_intent", "business_rule"] * (count // 2),
            "rationale": [f"A red shoe\nof kind {number}." for number in range(count)],
            "predicted_label": [("Exact", "Irrelevant")[number % 3 == 0] for number in range(count)],
            "encoder": "an/encoder",
            "encoder_revision": "1",
            "cot_embedding": list(generator.normal(size=(count, SIZE)).astype(np.float32)),
        }
    )
    return frame.assign(**changed)


def write_rationales(frame, path):
    table = pa.Table.from_pandas(frame.drop(columns="cot_embedding"), preserve_index=False)
    vectors = np.stack(frame["cot_embedding"]) if len(frame) else np.empty((0, SIZE), dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), vectors.shape[1])
    return str(write(table.append_column("cot_embedding", column), path, RATIONALES))


@pytest.fixture
def student(tmp_path):
    folder = save(tiny_model(), tmp_path / "student")
    path = write_rationales(rows(), tmp_path / "rationales.parquet")
    (folder / "training.json").write_text(json.dumps({"data_sha256": {"rationales": sha256(path)}}))
    return folder


def options(student, name="rationales.parquet", **changed):
    return BankArguments(model=str(student), rationales=str(student.parent / name), **changed)


def opened(student):
    return RationaleBank.load(student / BANK_FILE, student / TEXTS_FILE, student / "model.safetensors", SIZE)


def test_what_is_built_can_be_opened_and_says_what_was_read(student):
    record = build(options(student))
    assert (record["entries"], record["without_verdict"], record["near_duplicates"]) == (24, 0, 0)
    assert record["perspectives"] == {"business_rule": 12, "user_intent": 12}
    assert record["bytes"] == {name: (student / name).stat().st_size for name in (BANK_FILE, TEXTS_FILE)}
    bank = opened(student)
    assert sorted(bank.text(entry) for entry in range(24)) == sorted(f"A red shoe of kind {n}." for n in range(24))
    assert (bank.encoder, bank.encoder_revision) == ("an/encoder", "1")
    before = {name: (student / name).read_bytes() for name in (BANK_FILE, TEXTS_FILE)}
    build(options(student))
    assert before == {name: (student / name).read_bytes() for name in before}  # the same again
    assert not (student / ".bank").exists()


def test_the_same_is_kept_once_by_perspective_and_verdict(student):
    frame = rows()
    frame.loc[2, ["rationale", "predicted_label"]] = [" a RED shoe of\tkind 0.", "Irrelevant"]  # row 0's words
    frame.loc[6, "rationale"] = frame.loc[0, "rationale"]  # and verdict, but pair 3: still the same
    frame.loc[1, "rationale"] = frame.loc[0, "rationale"]  # another perspective
    frame.at[4, "cot_embedding"] = 2 * frame.loc[8, "cot_embedding"]  # a cosine of 1, both Exact
    frame.at[10, "cot_embedding"] = frame.loc[12, "cot_embedding"]  # a cosine of 1, verdicts differ
    frame.loc[3, "predicted_label"] = None
    assert frame["predicted_label"][[0, 6, 12]].eq("Irrelevant").all()
    assert frame["predicted_label"][[4, 8, 10]].eq("Exact").all()
    write_rationales(frame, student.parent / "more.parquet")
    trained_on = str(student.parent / "rationales.parquet")
    record = build(options(student, "more.parquet", trained_on=trained_on))
    counted = {name: record[name] for name in ("entries", "read", "without_verdict", "same_text", "near_duplicates")}
    assert counted == {"entries": 20, "read": 24, "without_verdict": 1, "same_text": 2, "near_duplicates": 1}
    assert build(options(student, "more.parquet", trained_on=trained_on, near_duplicate=2))["entries"] == 21


def test_of_a_chain_the_ends_stay():
    """30 degrees each: the second is near the first, the third is near the second only, and the second is gone."""
    angles = np.deg2rad([0, 30, 60])
    units = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert distinct_rows(units, np.cos(np.deg2rad(31))).tolist() == [True, False, True]


def test_refusals(student, tmp_path):
    def refused(match, frame=None, **changed):
        name = "rationales.parquet"
        if frame is not None:
            name = "other.parquet"
            write_rationales(frame, tmp_path / name)
            changed.setdefault("trained_on", str(tmp_path / "rationales.parquet"))
        with pytest.raises(UserError, match=match):
            build(BankArguments(**{"model": str(student), "rationales": str(tmp_path / name), **changed}))
        assert not (student / BANK_FILE).exists()

    refused("embedded by another/encoder 1; the student was guided by", rows(encoder="another/encoder"))
    refused("embedded by an/encoder 2; ", rows(encoder_revision="2"))
    refused(r"not the rationales that guided .*Pass those with --trained_on", rows(locale="es"), trained_on=None)
    refused("embedded by 2 encoders", rows(encoder=["a", "b"] * 12))
    refused("no rationale with a verdict, so the bank would be empty", rows(predicted_label=None))
    refused("no rationale with a verdict, so the bank would be empty", rows()[:0])
    refused("embeddings of 3 numbers; the reasoning_dim", rows(cot_embedding=[np.ones(3, np.float32)] * 24))
    refused("near_duplicate 0", near_duplicate=0.0)
    refused("no config.json with model.safetensors", model=str(tmp_path))
    (student / "training.json").write_text('{"data_sha256": {}}')
    refused("was trained without rationales")
    (student / "training.json").unlink()
    refused("training.json: no such file")
    plain = save(tiny_model(extractor_type="none"), tmp_path / "plain")
    refused("has no latent reasoning", model=str(plain))


# How good they are.


def test_a_rationale_is_judged_by_verdict_and_words():
    pairs = pd.DataFrame({"query": ["oak table"], "product_title": ["A Lamp, 2 m"], "label": ["Irrelevant"]})
    # content words: oak table lamp 2
    texts = {"bank": "The table is oak.", "cosine": "A lamp of 2 watts", "h_cls": "Nothing of this", "random": "cup"}
    found = {(method, "view"): [([text], ["Exact"])] for method, text in texts.items()}
    found["random", "view"] = [(["cup"], ["Irrelevant"]), (["lamp"], ["Exact"])]
    values = judge(pairs, ["Exact"], found, ["view"])
    assert values.shape == (1, 2, len(METHODS), len(MEASURES))
    by_method = dict(zip(METHODS, values[0, 0].tolist()))
    assert by_method["bank"] == [1, 0, 1.0, 1]
    assert by_method["cosine"] == [1, 0, pytest.approx(2 / 3), 0]
    assert by_method["h_cls"] == [1, 0, 0.0, 0]
    assert by_method["random"] == [0.5, 0.5, 0.5, 0]
    assert (values[:, 0] == values[:, 1]).all()  # one perspective is their mean


def test_the_verbs_measure_what_they_say(student, tmp_path):
    """On pairs that are training pairs by another name, so that the nearest h_cls is known."""
    names = {0: "Exact", 1: "Substitute", 2: "Irrelevant"}
    labels = tmp_path / "three.yaml"
    entries = "\n".join(f"- {{name: {name}, gain: {1 - number / 2}, definition: x}}" for number, name in names.items())
    labels.write_text(f"name: three\nrelevant: [Exact]\nlabels:\n{entries}\n")
    pairs = rows().drop_duplicates("pair_id")[["pair_id", "query", "product_title", "locale", "label"]]
    held_out = pairs.assign(pair_id="t" + pairs["pair_id"])
    write(held_out, tmp_path / "pairs" / "test.parquet", PAIRS)
    write(pairs, tmp_path / "pairs" / "train.parquet", PAIRS)
    build(options(student))
    common = {
        "model": str(student),
        "rationales": str(tmp_path / "rationales.parquet"),
        "pairs": str(tmp_path / "pairs"),
    }
    arguments = ExplanationsArguments(**common, output=str(tmp_path / "out"), labels=str(labels), draws=200)
    result = measure(arguments)
    assert json.loads((tmp_path / "out" / "explanations.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["perspectives"]) == {"business_rule", "user_intent", "all"}
    for values in result["perspectives"].values():
        # Query and title are those of a training pair, whose rationales hold the words of its query.
        assert values["methods"]["h_cls"]["query"]["mean"] == 1.0
        for method in METHODS:
            for cell in values["methods"][method].values():
                low, high = cell["interval"]
                assert 0 <= low <= cell["mean"] + 1e-9
                assert cell["mean"] <= high + 1e-9
        gap = values["bank_minus"]["random"]["gold"]["mean"]
        expected = values["methods"]["bank"]["gold"]["mean"] - values["methods"]["random"]["gold"]["mean"]
        assert gap == pytest.approx(expected)
    assert "| all | bank - h_cls |" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(UserError, match="holds rationales of 12 of the pairs to be explained"):
        measure(ExplanationsArguments(**common, output=str(tmp_path), labels=str(labels), split="train"))

    timed = bench(BankBenchArguments(**common, output=str(tmp_path / "bench.json"), searches=6, nearest=2, entries=100))
    assert (timed["entries"], timed["of_them_rationales"]) == (100, 24)
    by_search = {(row["search"], row["probes"]): row for row in timed["rows"]}
    assert by_search["all cells, int8", None]["recall"] > 0.8
    recalls = [row["recall"] for row in timed["rows"] if row["search"] == "cells, int8"]
    assert recalls == sorted(recalls)
    assert timed["float32_bytes"] == 4 * 100 * SIZE
    with pytest.raises(UserError, match="is a folder"):
        bench(BankBenchArguments(**common, output=str(tmp_path)))


def test_invented_entries_lie_between_two_of_a_perspective():
    frame = rows()
    more = resized(frame, 60, seed=0)
    assert len(more) == 60
    assert more["perspective"].isin(frame["perspective"]).all()
    known = np.stack(frame["cot_embedding"])
    for row in range(24, 60):
        one = torch.from_numpy(more["cot_embedding"].iloc[row])
        source = frame["rationale"].tolist().index(more["rationale"].iloc[row])
        assert float(one.norm()) == pytest.approx(np.linalg.norm(known[source]), rel=1e-5)
    assert len(resized(frame, 5, seed=0)) == 5
