import json
from pathlib import Path

import pytest
import yaml

from recipes.arguments import UserError
from recipes.student.bench import BenchArguments, bench, plan

SYSTEMS = {"bert": {"extractor_type": "none"}, "gat": {"seeds": [0, 1]}}


@pytest.fixture
def arguments(options, workspace):
    recipe = {name: value for name, value in options.items() if name != "output"}
    (workspace / "student.yaml").write_text(yaml.safe_dump(recipe))

    def make(systems=SYSTEMS, **changes):
        given = {"baseline": "bert", "output": str(workspace / "bench"), **changes}
        return BenchArguments(student=str(workspace / "student.yaml"), systems=systems, **given)

    return make


def test_a_bench_and_a_seed_added_later(arguments, workspace, capsys):
    bench(arguments())
    runs = [json.loads(line) for line in (workspace / "bench" / "runs.jsonl").read_text().splitlines()]
    assert [(run["system"], run["seed"]) for run in runs] == [("bert", 0), ("gat", 0), ("gat", 1)]
    trained = {path: path.stat().st_mtime_ns for path in (workspace / "bench").glob("*/training.json")}
    assert len(trained) == 3

    comparison = bench(arguments({"bert": {"extractor_type": "none", "seeds": [0, 1]}, "gat": {"seeds": [0, 1]}}))
    runs = [json.loads(line) for line in (workspace / "bench" / "runs.jsonl").read_text().splitlines()]
    assert [(run["system"], run["seed"]) for run in runs] == [("bert", 0), ("gat", 0), ("bert", 1), ("gat", 1)]
    assert all(path.stat().st_mtime_ns == time for path, time in trained.items())
    assert (workspace / "bench" / "comparison" / "table.md").is_file()
    assert comparison["baseline"] == "bert"
    for run in runs:
        metrics = json.loads(Path(workspace, "bench", run["predictions"]).with_name("metrics.json").read_text())
        assert metrics["overall"]["accuracy"] == run["accuracy"]
        assert metrics["facts"]["seed"] == run["seed"]


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({"bert": {}, "gat": {"gardance_weight": 1}}, "system 'gat': unknown option 'gardance_weight'"),
        ({"bert": {}, "gat": {"guidance_weight": "much"}}, "system 'gat'.*guidance_weight"),
        ({"bert": {"seeds": []}}, "system 'bert': no seeds"),
        ({"gat": {}}, "baseline 'bert' is not one of the systems gat"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_trained(arguments, systems, message):
    with pytest.raises(UserError, match=message):
        plan(arguments(systems))
