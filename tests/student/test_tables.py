"""Tables of hand-made runs: four pairs, so that every figure can be checked by counting."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from recipes.arguments import UserError, to_dict
from recipes.record import sha256, write_json
from recipes.schemas import PAIRS, PREDICTIONS, load_labels, read, write
from recipes.student.layout import format_markdown, format_terminal
from recipes.student.plan import BenchArguments, plan
from recipes.student.tables import write_tables

ESCI = load_labels("esci")
GOLD = ["Exact", "Exact", "Substitute", "Substitute"]
# Accuracy and macro-F1 over the two classes that occur: F1 of E and of S.
PREDICTED = {
    "EESS": (1.0, 1.0),
    "EESE": (0.75, (4 / 5 + 2 / 3) / 2),
    "ESSE": (0.5, (1 / 2 + 1 / 2) / 2),
    "EEEE": (0.5, (2 / 3 + 0) / 2),
}
LETTER = {name[0]: name for name in ESCI.names}


def save_run(run, predicted, seconds, parameters=2_500_000):
    """Write what a finished run's folder holds; an average after its members."""
    names = [LETTER[letter] for letter in predicted]
    frame = pd.DataFrame(
        {
            "pair_id": ["a", "b", "c", "d"],
            "query": ["q1", "q1", "q2", "q2"],
            "locale": ["us", "us", "jp", "jp"],
            "label": GOLD,
            "predicted_label": names,
            "probabilities": [np.eye(4)[ESCI.label2id[name]] for name in names],
        }
    )
    write(frame, run.folder / "evaluation-test" / "predictions.parquet", PREDICTIONS)
    accuracy, macro_f1 = PREDICTED[predicted]
    overall = {"accuracy": accuracy, "macro_f1": macro_f1, "ndcg": None}
    members = [
        {"sha256": sha256(run.folder.with_name(f"{member}-{run.seed}") / "evaluation-test" / "predictions.parquet")}
        for member in run.members
    ]
    metrics = {"overall": overall, "facts": {"members": members}}
    write_json(run.folder / "evaluation-test" / "metrics.json", metrics)
    record = {
        "arguments": to_dict(run.student),
        "validation": {"accuracy": 0.1, "macro_f1": 0.1},
        "parameters": parameters,
        "train_seconds": seconds,
    }
    if not run.members:
        write_json(run.folder / "training.json", record)


@pytest.fixture
def arguments(tmp_path):
    recipe = {"pairs": "p", "rationales": "r", "encoder": "e", "labels": "esci"}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(recipe))

    def make(**changes):
        systems = {
            "bert": {"extractor_type": "none"},
            "gat": {"seeds": [0, 1, 2]},
            "cls": {"extractor_type": "cls"},
            "later": {"epochs": 2},
            "average": {"members": ["bert", "cls"]},
        }
        options = {"baseline": ["bert", "gat"], "ablations": {"gat": ["later", "cls"]}, "draws": 200, **changes}
        return BenchArguments(
            student=str(tmp_path / "student.yaml"), systems=systems, output=str(tmp_path / "bench"), **options
        )

    return make


def rows_of(text, start):
    """Return the cells of the rows whose first cell is `start`."""
    found = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    return [row for row in found if row[0] == start]


def save_all(planned):
    runs = {run.name.rpartition("/")[2]: run for run in planned}
    save_run(runs["bert-0"], "ESSE", 60)
    save_run(runs["gat-0"], "EESS", 120)
    save_run(runs["gat-1"], "EESE", 240, parameters=3_000_000)
    save_run(runs["cls-0"], "EEEE", 30)
    save_run(runs["average-0"], "EESE", 0)
    return runs


def test_every_figure_of_the_tables(arguments, tmp_path):
    runs = save_all(plan(arguments()))
    runs["gat-2"].failure().parent.mkdir(parents=True)
    runs["gat-2"].failure().write_text("killed by SIGKILL (out of memory?)\n")
    tables = write_tables(arguments(blocks={"Baseline": ["bert"], "Ours": ["gat", "cls"]}))
    written = json.loads((tmp_path / "bench" / "tables" / "tables.json").read_text())
    assert written["failed"] == tables["failed"] == {"gat-2": "killed by SIGKILL (out of memory?)"}
    assert tables["unfinished"] == ["later-0"]
    text = (tmp_path / "bench" / "tables" / "tables.md").read_text()
    assert text == format_markdown(tables)

    bert, *_ = rows_of(text, "bert")
    assert bert[1] == "1/1"
    # jp: both Substitute, one of them called Exact; us: both Exact, one called Substitute. F1 of the class: 2/3.
    assert [cell.partition("<br>")[0] for cell in bert[2:]] == ["50.0", "50.0", "50.0", "66.7", "50.0", "66.7"]
    gat = rows_of(text, "gat")[0]
    accuracy, f1 = [1.0, 0.75], [1.0, PREDICTED["EESE"][1]]
    assert gat[1] == "2/3"
    assert gat[2].startswith(f"87.5 ±{100 * np.std(accuracy, ddof=1):.1f}<br>[")
    assert gat[3].startswith(f"{100 * np.mean(f1):.1f} ±{100 * np.std(f1, ddof=1):.1f}<br>[")
    assert rows_of(text, "later")[0][1:4] == ["0/1", "not yet", "-"]
    first_table = text.partition("##")[0]
    places = [first_table.index(f"| {name}") for name in ("**Baseline**", "bert", "**Ours**", "gat", "cls", "average")]
    assert places == sorted(places)

    # Differences to bert, then to gat, of cls; then as an ablation of gat. EEEE is 37.5 points of accuracy below.
    to_bert, to_gat, ablation = (row[1] for row in rows_of(text, "cls")[1:4])
    assert to_bert.startswith("+0.0 [")
    assert to_gat.startswith("-37.5 [")
    assert ablation.startswith("-37.5 [")
    overall = tables["datasets"][""]
    family = overall["comparisons"]["gat"]["slices"]["overall"]["differences"]
    alone = overall["ablations"]["gat"]["slices"]["overall"]["differences"]
    assert set(family) == {"bert", "cls", "average"}
    assert set(alone) == {"cls"}  # "later" is not there yet
    assert alone["cls"]["accuracy"]["p_holm"] == alone["cls"]["accuracy"]["p"] == family["cls"]["accuracy"]["p"]

    costs = {row[0]: row[1:] for row in (rows_of(text, name)[-1] for name in ("bert", "gat", "average"))}
    assert costs["bert"] == ["1/1", "2.50 M", "1.0 min", "0.02 h"]
    assert costs["gat"] == ["2/3", "2.50 M", "3.0 min", "0.10 h"]
    assert costs["average"] == ["1/1", "5.00 M", "1.5 min", "0.03 h"]
    assert "- gat-2: killed by SIGKILL" in text
    assert text.rstrip().endswith("Not finished: later-0.")
    pictures = {path.name for path in (tmp_path / "bench" / "tables").glob("*.png")}
    assert pictures == {"differences-bert.png", "differences-gat.png", "accuracy_f1.png", "training_time.png"}
    assert (tmp_path / "bench" / "comparison-gat" / "table.md").is_file()
    assert max(map(len, format_terminal(tables).splitlines())) <= 100


def test_datasets_side_by_side_one_of_them_empty_and_a_baseline_that_is_not_there(arguments):
    changes = {"datasets": {"esci": {}, "bazaar": {}, "none": {}}, "baseline": "later", "ablations": {}}
    planned = plan(arguments(**changes))
    save_all([run for run in planned if run.dataset == "esci"])
    save_run(next(run for run in planned if run.name == "bazaar/bert-0"), "EESE", 60)
    tables = write_tables(arguments(**changes))
    assert {name: content["comparisons"] for name, content in tables["datasets"].items()} == {
        "esci": {}, "bazaar": {}, "none": {}
    }  # fmt: skip
    text = format_markdown(tables)
    header = rows_of(text, "system")[0]
    assert header[2:8] == ["esci all ACC", "esci all F1", "esci jp ACC", "esci jp F1", "esci us ACC", "esci us F1"]
    bert = dict(zip(header, rows_of(text, "bert")[0], strict=True))
    assert (bert["esci all ACC"][:4], bert["bazaar all ACC"][:4]) == ("50.0", "75.0")
    assert dict(zip(header, rows_of(text, "gat")[0], strict=True))["bazaar all ACC"] == "-"
    assert "none/bert-0" in tables["unfinished"]
    assert max(map(len, format_terminal(tables).partition("Not finished")[0].splitlines())) <= 100


def test_a_run_of_other_settings_is_in_no_figure(arguments):
    runs = save_all(plan(arguments()))
    record = json.loads((runs["cls-0"].folder / "training.json").read_text())
    record["arguments"]["epochs"] = 50
    write_json(runs["cls-0"].folder / "training.json", record)
    tables = write_tables(arguments())
    assert "cls-0: holds a student with epochs = 50, not 5" in tables["failed"]["cls-0"]
    assert "cls" not in tables["datasets"][""]["systems"]["overall"]


def test_a_run_that_the_bench_refused_is_in_no_figure(arguments):
    runs = save_all(plan(arguments()))
    runs["bert-0"].failure().parent.mkdir(parents=True)
    runs["bert-0"].failure().write_text("holds a student with train.parquet = 'abc', not 'def'\n")
    tables = write_tables(arguments())
    assert list(tables["failed"]) == ["bert-0"]
    assert set(tables["datasets"][""]["systems"]["overall"]) == {"gat", "cls"}
    assert "average-0" in tables["unfinished"]  # of bert and cls


def test_nothing_finished_is_an_error(arguments):
    with pytest.raises(UserError, match=r"no run of the recipe is finished\. python -m recipes\.student\.bench"):
        write_tables(arguments())


def test_adjusted_decisions_have_tables_of_their_own(arguments, tmp_path):
    pairs = {"pair_id": list("abcdefgh"), "query": "q", "product_title": "t", "locale": "us", "label": list("EEEEESCI")}
    write(pd.DataFrame(pairs), tmp_path / "pairs" / "train.parquet", PAIRS)
    recipe = arguments(pairs=str(tmp_path / "pairs"))
    runs = save_all(plan(recipe))
    for name in ("bert-0", "gat-0", "gat-1", "cls-0"):  # Exact, of a class of five in eight, at 0.8
        file = runs[name].folder / "evaluation-test" / "predictions.parquet"
        frame = read(file, PREDICTIONS)
        frame["probabilities"] = [
            np.array([0.8, 0.2, 0, 0] if name == "Exact" else [0.2, 0.8, 0, 0]) for name in frame["predicted_label"]
        ]
        write(frame, file, PREDICTIONS)
    save_run(runs["average-0"], "EEEE", 0)  # sure of Exact: it stays
    plain = write_tables(recipe)["datasets"][""]["systems"]["overall"]
    assert plain["gat"]["accuracy"]["by_seed"] == [1, 0.75]
    adjusted = write_tables(replace(recipe, logit_adjustment=1.0))["datasets"][""]["systems"]["overall"]
    # 0.8 / 5 < 0.2 / 1: everything becomes Substitute.
    assert {name: metrics["accuracy"]["by_seed"] for name, metrics in adjusted.items()} == {
        "bert": [0.5], "gat": [0.5, 0.5], "cls": [0.5], "average": [0.5],
    }  # fmt: skip
    folder = Path(recipe.output)
    assert {path.name for path in folder.glob("tables*")} == {"tables", "tables-adjusted"}
    assert (folder / "comparison-adjusted" / "compare.json").is_file()
    assert (folder / "comparison-adjusted-gat" / "compare.json").is_file()
