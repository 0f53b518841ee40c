import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from recipes.arguments import UserError
from recipes.student.bench import BenchArguments, bench, main, plan
from recipes.student.layout import format_terminal
from recipes.student.workers import run_all, stopping_politely, why_failed
from tests.student.conftest import make_options, make_workspace

ROOT = Path(__file__).parents[2]
SYSTEMS = {"bert": {"extractor_type": "none"}, "gat": {"seeds": [0, 1]}}
MATRIX = {
    "bert": {"extractor_type": "none"},
    "average": {"members": ["bert", "gat"]},
    "broken": {"extractor_type": "poly", "rationales": "{folder}/later.parquet"},
    "waits": {"members": ["gat", "broken"]},
    "gat": {"seeds": [0, 1]},
}


def write_recipe(folder, **changes):
    recipe = {name: value for name, value in make_options(folder).items() if name != "output"}
    (folder / "student.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    return str(folder / "student.yaml")


@pytest.fixture
def arguments(tmp_path):
    """The arguments of a bench whose data need not exist: it is only planned."""
    student = write_recipe(tmp_path)

    def make(systems=SYSTEMS, **changes):
        given = {"baseline": "bert", "output": "bench", **changes}
        return BenchArguments(student=student, systems=systems, **given)

    return make


def test_the_order_grows_the_table_evenly(arguments):
    systems = {
        "average": {"members": ["bert", "gat"], "datasets": ["esci"]},
        "gat": {"seeds": [0, 1], "rationales": "runs/{dataset}/joined.parquet"},
        "bert": {"extractor_type": "none", "seeds": [1, 0]},
        "only": {"datasets": ["bazaar"], "epochs": 7},
    }
    datasets = {"esci": {"pairs": "runs/esci/pairs"}, "bazaar": {"labels": "aliexpress6", "epochs": 3}}
    runs = plan(arguments(systems, datasets=datasets))
    assert [run.name for run in runs] == [
        *("esci/gat-0", "esci/bert-0", "esci/average-0", "bazaar/gat-0", "bazaar/bert-0", "bazaar/only-0"),
        *("esci/gat-1", "esci/bert-1", "bazaar/gat-1", "bazaar/bert-1"),
    ]
    students = {run.name: run.student for run in runs}
    assert students["bazaar/gat-1"].rationales == "runs/bazaar/joined.parquet"
    assert students["bazaar/gat-1"].output == "bench/bazaar/gat-1"
    assert students["bazaar/bert-0"].labels == "aliexpress6"
    assert [students[f"bazaar/{name}-0"].epochs for name in ("bert", "only")] == [3, 7]  # the system has the last word
    assert students["esci/bert-0"].pairs == "runs/esci/pairs"


@pytest.mark.parametrize(
    ("systems", "changes", "message"),
    [
        ({"bert": {}, "gat": {"gardance_weight": 1}}, {}, "unknown option 'gardance_weight' .*'guidance_weight'"),
        ({**SYSTEMS, "avg": {"member": ["bert", "gat"]}}, {}, "'avg': unknown option 'member' .*'members'"),
        ({"bert": {}, "gat": {"guidance_weight": "much"}}, {}, "system 'gat'.*guidance_weight"),
        ({"bert": {}, "gat": {"epochs": 0}}, {}, "system 'gat': epochs: expected more than 0"),
        ({"bert": {"seeds": []}}, {}, "system 'bert': no seeds"),
        ({"bert": {"seeds": 3}}, {}, "system 'bert': seeds 3: expected a list"),
        ({"bert": {"seeds": [1, 1]}}, {}, "system 'bert': seeds .*named twice"),
        ({"bert": {"seeds": [-1]}}, {}, "system 'bert': seeds .*from 0 on"),
        ({"bert": {"seed": 5}}, {}, "system 'bert': 'seed' is set by the bench.*seeds"),
        ({"bert": {"output": "x"}}, {}, "system 'bert': 'output' is set by the bench"),
        ({"bert": "gat"}, {}, "system 'bert': expected options"),
        ({"gat": {}}, {}, "baseline 'bert' is not one of the systems gat"),
        (SYSTEMS, {"baseline": ["bert", "typo"]}, "baseline 'typo' is not one"),
        (SYSTEMS, {"blocks": {"Rivals": ["ced"]}}, "block 'Rivals' 'ced' is not one"),
        (SYSTEMS, {"ablations": {"gat": ["cls"]}}, "ablations of 'gat' 'cls' is not one"),
        (SYSTEMS, {"blocks": {"Rivals": "bert"}}, "block 'Rivals': expected a list of systems.*found 'bert'"),
        (SYSTEMS, {"ablations": {"gat": None}}, "ablations of 'gat': expected a list of systems.*found None"),
        (SYSTEMS, {"ablations": {"cls": ["gat"]}}, "ablations of 'cls' is not one"),
        (SYSTEMS, {"workers": 0}, "workers: expected at least 1"),
        (SYSTEMS, {"draws": 1}, "draws: expected at least 100"),
        (SYSTEMS, {"logit_adjustment": -1.0}, "logit_adjustment: expected at least 0"),
        (SYSTEMS, {"datasets": {"a": "x"}}, "dataset 'a': expected options.*found 'x'"),
        (SYSTEMS, {"datasets": {"a": {"seed": 1}}}, "dataset 'a': 'seed' is set by the bench"),
        ({"bert": {"datasets": "a"}}, {"datasets": {"a": {}}}, "system 'bert': datasets 'a': expected a list of names"),
        ({"bert": {}, 1: {}}, {}, "1: a system or dataset names a folder.*quotes"),
        ({**SYSTEMS, "avg": {"members": "bert"}}, {}, "system 'avg': members 'bert': expected a list of two systems"),
        ({**SYSTEMS, "avg": {"members": []}}, {}, r"system 'avg': members \[\]: expected a list of two systems"),
        ({**SYSTEMS, "avg": {"members": ["bert", "bert"]}}, {}, "system 'avg': members .*each once"),
        (SYSTEMS, {"datasets": {"a": {"pears": "x"}}}, "dataset 'a': unknown key 'pears'.*'pairs'"),
        (SYSTEMS, {"datasets": {"a": {}}, "pairs": "x"}, "pairs: the recipe has `datasets`"),
        ({"bert": {"datasets": ["b"]}}, {"datasets": {"a": {}}}, "system 'bert': dataset 'b' is not one of a"),
        ({"bert": {}, "../x": {}}, {}, r"'\.\./x': a system or dataset names a folder"),
        ({**SYSTEMS, "avg": {"members": ["bert", "typo"]}}, {}, "system 'avg': member 'typo' is not one"),
        ({**SYSTEMS, "avg": {"members": ["bert", "gat"], "epochs": 2}}, {}, "'avg': has `members`, .*'epochs' means"),
        ({**SYSTEMS, "avg": {"members": ["bert", "gat"], "seeds": [1]}}, {}, "'avg': its member 'bert'.* seed 1"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_trained(arguments, systems, changes, message):
    with pytest.raises(UserError, match=message):
        plan(arguments(systems, **changes))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """A bench with a system that cannot be trained, run once in this process."""
    folder = make_workspace(tmp_path_factory.mktemp("matrix"))
    student = write_recipe(folder, epochs=1)
    systems = json.loads(json.dumps(MATRIX).replace("{folder}", str(folder)))

    def make(**changes):
        return BenchArguments(student=student, baseline="bert", output=str(folder / "bench"), draws=200,
                              **{"systems": systems, **changes})  # fmt: skip

    return folder, make, bench(make())


def read_lines(folder):
    return [json.loads(line) for line in (folder / "bench" / "runs.jsonl").read_text().splitlines()]


def test_a_failing_run_stops_no_other_and_is_in_the_table(matrix):
    folder, _, tables = matrix
    assert [(line["system"], line["seed"]) for line in read_lines(folder)] == [
        ("bert", 0), ("gat", 0), ("average", 0), ("gat", 1)
    ]  # fmt: skip
    assert list(tables["failed"]) == ["broken-0"]
    assert "later.parquet: no such file" in tables["failed"]["broken-0"]
    assert tables["unfinished"] == ["waits-0"]
    assert "Traceback" in (folder / "bench" / "logs" / "broken-0.log").read_text()
    text = format_terminal(tables)
    assert [line.split()[:3] for line in text.splitlines() if line.startswith("broken ")] == [
        ["broken", "0/1", "failed"]
    ]
    assert "- broken-0: " in text
    assert max(map(len, text.partition("Failed")[0].splitlines())) <= 100
    for line in read_lines(folder):
        metrics = json.loads((folder / "bench" / line["predictions"]).with_name("metrics.json").read_text())
        assert metrics["overall"]["accuracy"] == line["accuracy"]
        assert metrics["facts"]["seed"] == line["seed"]


def test_an_average_is_that_of_its_members_and_costs_what_they_cost(matrix):
    folder, _, tables = matrix
    bert, gat, average = (
        pd.read_parquet(folder / "bench" / f"{name}-0" / "evaluation-test" / "predictions.parquet").set_index("pair_id")
        for name in ("bert", "gat", "average")
    )
    expected = (np.stack(bert["probabilities"]) + np.stack(gat["probabilities"].loc[bert.index])) / 2
    assert np.allclose(np.stack(average["probabilities"].loc[bert.index]), expected, atol=1e-6)
    costs = tables["datasets"][""]["costs"]
    assert costs["average"]["parameters"] == costs["bert"]["parameters"] + costs["gat"]["parameters"]


def test_started_again_it_trains_what_is_missing_and_tries_again_what_failed(matrix, monkeypatch, capsys):
    folder, make, _ = matrix
    trained = {path: path.stat().st_mtime_ns for path in (folder / "bench").glob("*/training.json")}
    assert len(trained) == 3
    (folder / "later.parquet").write_bytes((folder / "rationales.parquet").read_bytes())
    tables = bench(make())
    assert [line["system"] for line in read_lines(folder)] == ["bert", "broken", "gat", "average", "waits", "gat"]
    assert (tables["failed"], tables["unfinished"]) == ({}, [])
    assert not list((folder / "bench" / "logs").glob("*.failed"))
    assert all(path.stat().st_mtime_ns == then for path, then in trained.items())

    # Another learning rate would be another student: neither overwritten nor reported under the new recipe's name.
    systems = {"gat": {}, "bert": {"extractor_type": "none", "learning_rate": 0.5}}
    (folder / "bench.yaml").write_text(yaml.safe_dump({**vars(make(systems=systems)), "baseline": "gat"}))
    monkeypatch.setattr(sys, "argv", ["bench", "--config", str(folder / "bench.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "bert-0: " in capsys.readouterr().out
    assert [line["system"] for line in read_lines(folder)] == ["gat"]
    assert all(path.stat().st_mtime_ns == then for path, then in trained.items())


def test_what_is_there_no_longer_is_made_again_or_refused(tmp_path):
    folder = make_workspace(tmp_path)
    student = write_recipe(folder, epochs=1)
    systems = {"bert": {"extractor_type": "none"}, "gat": {}, "cls": {"extractor_type": "cls"}}

    def tables_of(members, **changes):
        given = {"baseline": "bert", "output": str(folder / "bench"), "draws": 200, **changes}
        return bench(BenchArguments(student, {**systems, "average": {"members": members}}, **given))

    def averaged():
        metrics = json.loads((folder / "bench" / "average-0" / "evaluation-test" / "metrics.json").read_text())
        return [Path(member["predictions"]).parent.parent.name for member in metrics["facts"]["members"]]

    # The split to score is looked for before anything is trained.
    with pytest.raises(UserError, match=r"dev\.parquet: no such file"):
        tables_of(["bert", "gat"], split="dev")
    assert not list((folder / "bench").glob("*/training.json"))

    tables_of(["bert", "gat"])
    assert averaged() == ["bert-0", "gat-0"]
    # An average of other members has the same name and folder.
    tables = tables_of(["bert", "cls"])
    assert averaged() == ["bert-0", "cls-0"]
    parameters = {name: cost["parameters"] for name, cost in tables["datasets"][""]["costs"].items()}
    assert parameters["average"] == parameters["bert"] + parameters["cls"]

    # A member of other settings is in no figure, nor is its average.
    systems["cls"] = {"extractor_type": "cls", "epochs": 2}
    tables = tables_of(["bert", "cls"])
    assert (list(tables["failed"]), tables["unfinished"]) == (["cls-0"], ["average-0"])
    del systems["cls"]

    # Other test pairs: the finished runs were not scored on these.
    test = pd.read_parquet(folder / "pairs" / "test.parquet")
    test.iloc[:12].to_parquet(folder / "pairs" / "test.parquet")
    with pytest.raises(UserError, match=r"bert-0: .*evaluation-test: scored on another .*test\.parquet than is there"):
        tables_of(["bert", "gat"])
    for evaluation in (folder / "bench").glob("*/evaluation-test"):
        shutil.rmtree(evaluation)
    tables = tables_of(["bert", "gat"])
    assert (tables["failed"], tables["unfinished"]) == ({}, [])
    assert tables["datasets"][""]["comparisons"]["bert"]["slices"]["overall"]["pairs"] == 12


def test_nothing_finished_says_what_failed(tmp_path):
    student = write_recipe(tmp_path)
    with pytest.raises(UserError, match=r"no run .* is finished(?s:.*)bert-0: .*pairs: no such folder"):
        bench(BenchArguments(student, {"bert": {"extractor_type": "none"}}, "bert", str(tmp_path / "bench")))


def test_a_killed_bench_leaves_no_process_and_goes_on_from_its_checkpoints(tmp_path):
    folder = make_workspace(tmp_path)
    recipe = {
        "student": write_recipe(folder, epochs=6),
        "output": str(folder / "bench"),
        "baseline": "gat",
        "systems": {"gat": {}, "broken": {"rationales": str(folder / "nowhere.parquet")}},
        "workers": 2,
        "draws": 200,
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "recipes.student.bench", "--config", str(folder / "bench.yaml")]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        wait_for(lambda: any((folder / "bench").glob("gat-0/checkpoints/*/trainer_state.json")), process)
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
    assert children
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert not (folder / "bench" / "runs.jsonl").is_file()

    tables = bench(BenchArguments(**recipe))
    assert [line["system"] for line in read_lines(folder)] == ["gat"]
    assert "Going on from" in (folder / "bench" / "logs" / "gat-0.log").read_text()
    assert "nowhere.parquet: no such file" in tables["failed"]["broken-0"]
    assert tables["datasets"][""]["costs"]["gat"]["runs"] == 1


def test_whatever_stops_the_bench_stops_its_workers(tmp_path):
    folder = make_workspace(tmp_path)
    systems = {"bert": {"extractor_type": "none", "epochs": 1000}, "broken": {"pairs": str(folder / "nowhere")}}
    planned = plan(BenchArguments(write_recipe(folder), systems, "bert", str(folder / "bench")))
    seen = []

    def ended(run, failure):
        seen.append((run.name, failure))
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop, stopping_politely():
        run_all(planned, 2, "test", ended)
    assert stop.value.code == 128 + signal.SIGINT
    assert [name for name, failure in seen if "nowhere: no such folder" in failure] == ["broken-0"]
    assert not [child for child in psutil.Process().children() if "recipes.student.workers" in child.cmdline()]


def test_a_request_to_end_runs_what_is_in_finally():
    with pytest.raises(SystemExit) as stop, stopping_politely():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 128 + signal.SIGTERM


def test_why_a_child_failed(tmp_path):
    log = tmp_path / "log"
    log.write_text("  3%|x\r 4%|x\nTraceback\nOutOfMemoryError: CUDA out of memory.\n\n")
    assert why_failed(0, log) is None
    assert why_failed(1, log) == "OutOfMemoryError: CUDA out of memory."
    assert why_failed(-9, log) == "killed by SIGKILL (out of memory?)"
    log.write_text("")
    assert why_failed(3, log) == "ended with status 3"


def wait_for(condition, process, seconds=120):
    for _ in range(10 * seconds):
        if condition():
            return
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.1)
    raise AssertionError("it never happened")
