import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recipes.arguments import UserError
from recipes.evaluate.ensemble import average
from recipes.evaluate.run import RunArguments, evaluate
from recipes.schemas import PREDICTIONS, load_labels, read, write

ROOT = Path(__file__).parents[2]
PROBABILITIES = {
    "a": [[0.6, 0.4, 0.0, 0.0], [0.5, 0.1, 0.1, 0.3], [0.2, 0.2, 0.2, 0.4]],
    "b": [[0.1, 0.9, 0.0, 0.0], [0.3, 0.1, 0.1, 0.5], [0.4, 0.2, 0.2, 0.2]],
}


def save(folder, name, order=(0, 1, 2), **columns):
    import pandas as pd

    probabilities = np.array(PROBABILITIES[name], dtype="float32")
    names = load_labels("esci").names
    frame = pd.DataFrame(
        {
            "pair_id": ["p0", "p1", "p2"],
            "query": ["q", "q", "r"],
            "locale": "us",
            "label": ["Substitute", "Exact", "Exact"],
            "predicted_label": [names[index] for index in probabilities.argmax(axis=1)],
            "probabilities": list(probabilities),
        }
    ).assign(**columns)
    return write(frame.iloc[list(order)], folder / name / "predictions.parquet", PREDICTIONS)


def test_the_mean_of_the_members_is_what_is_measured(tmp_path):
    """By hand: means (.35, .65, 0, 0), (.4, .1, .1, .4), (.3, .2, .2, .3); a tie goes to the first class, as in run."""
    files = [save(tmp_path, "a"), save(tmp_path, "b", order=(2, 0, 1))]
    metrics = average(files, tmp_path / "average", "esci")
    table = read(tmp_path / "average" / "predictions.parquet", PREDICTIONS)
    assert table["pair_id"].tolist() == ["p0", "p1", "p2"]
    expected = [[0.35, 0.65, 0, 0], [0.4, 0.1, 0.1, 0.4], [0.3, 0.2, 0.2, 0.3]]
    np.testing.assert_allclose(np.stack(table["probabilities"]), expected, atol=1e-6)
    assert table["predicted_label"].tolist()[0] == "Substitute"
    assert metrics["overall"]["accuracy"] == pytest.approx(1.0)
    assert json.loads((tmp_path / "average" / "metrics.json").read_text()) == metrics
    assert (tmp_path / "average" / "confusion.png").is_file()


def test_members_are_what_run_writes_and_so_is_the_average(checkpoint, pairs_folder, tmp_path):
    arguments = {"model": str(checkpoint), "pairs": str(pairs_folder), "device": "cpu"}
    one = evaluate(RunArguments(**arguments, output=str(tmp_path / "one")))
    evaluate(RunArguments(**arguments, output=str(tmp_path / "two")))
    both = average([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert one.keys() == both.keys()
    assert one["facts"].keys() <= both["facts"].keys()
    assert both["facts"]["pairs_sha256"] == one["facts"]["pairs_sha256"]
    for name, value in one["overall"].items():  # of a member with itself
        assert both["overall"][name] == (pytest.approx(value) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_id": ["p0", "p1", "p9"]}, r"b/predictions.parquet: pair 'p2' is missing"),
        ({"label": ["Exact"] * 3}, "pair 'p0': label is 'Exact'; .*a/predictions.parquet has 'Substitute'"),
        ({"probabilities": [[0.5, 0.5]] * 3}, r"b/predictions.parquet: column 'probabilities' has 2 numbers a row"),
    ],
)
def test_a_member_of_other_pairs_or_labels(tmp_path, change, message):
    files = [save(tmp_path, "a"), save(tmp_path, "b", **change)]
    with pytest.raises(UserError, match=message):
        average(files, tmp_path / "average", "esci")
    assert not (tmp_path / "average").exists()


def test_too_few_members_or_one_twice(tmp_path):
    file = save(tmp_path, "a")
    for files in ([file], [file, file.parent]):
        with pytest.raises(UserError, match="expected two members or more, each once"):
            average(files, tmp_path / "average", "esci")


def test_members_without_a_record_need_the_schema(tmp_path):
    files = [save(tmp_path, "a"), save(tmp_path, "b")]
    with pytest.raises(UserError, match="pass --labels"):
        average(files, tmp_path / "average")


def test_the_command(tmp_path):
    files = [str(save(tmp_path, "a")), str(save(tmp_path, "b").parent)]
    command = [sys.executable, "-m", "recipes.evaluate.ensemble", "--labels", "esci", "--predictions", *files]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "average")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Next: python -m recipes.evaluate.compare" in result.stdout
