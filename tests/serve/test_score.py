"""Bulk scoring: as many rows out as in, in order, whatever is killed; nothing of another model or input is mixed in."""

import json
import os
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
import torch

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from recipes.arguments import UserError
from recipes.serve.partitions import MANIFEST, Storage, find_inputs
from recipes.serve.score import ScoreArguments, score
from recipes.student.saving import save_tokenizer
from tests.tiny import tiny_config, tiny_tokenizer

ROOT = Path(__file__).parents[2]
LABELS = {0: "Exact", 1: "Substitute", 2: "Irrelevant"}
GAINS = [1.0, 0.5, 0.0]


def save_student(folder, seed=0, **options):
    torch.manual_seed(seed)
    config = LRKDConfig(
        encoder_config=tiny_config(initializer_range=0.5),
        id2label=LABELS,
        **{"label_gains": GAINS, "tier_thresholds": [0.2, 0.5], **options},
    )
    model = LRKDForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


def save_pairs(folder, rows=(23, 0, 14), **changes):
    """Files of several row groups, one of them empty."""
    folder.mkdir(parents=True)
    for number, count in enumerate(rows):
        numbers = np.arange(count)
        frame = pd.DataFrame(
            {
                "pair_id": [f"{number}-{n}" for n in numbers],
                "query": pd.Series([f"shoe {n % 7}" for n in numbers], dtype=str),
                "product_title": pd.Series([f"red shoe {n} " + "wide " * (n % 4) for n in numbers], dtype=str),
                "price": numbers * 1.5,
            }
        )
        frame.assign(**changes).to_parquet(folder / f"{number}.parquet", row_group_size=5)
    return str(folder)


@pytest.fixture
def options(student, tmp_path):
    inputs = save_pairs(tmp_path / "pairs")
    output = str(tmp_path / "scored")
    return {"model": student, "input": inputs, "output": output, "partition_rows": 7, "threads": 1}


def run(options, **changes):
    return score(ScoreArguments(**{**options, **changes}))


def read_all(folder):
    frames = [pd.read_parquet(path) for path in sorted(Path(folder).glob("*.parquet"))]
    return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)


def command(options):
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "recipes.serve.score", *flags]


def check(options, scored):
    """Every row of the input, in order, with what the plain model says of it."""
    given = read_all(options["input"])
    pd.testing.assert_frame_equal(scored[given.columns], given)
    model = LRKDForSequenceClassification.from_pretrained(options["model"])
    batch = tiny_tokenizer()(
        given["query"].tolist(), given["product_title"].tolist(), padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(**batch).logits.softmax(dim=1).numpy()
    np.testing.assert_allclose(np.stack(scored["probabilities"]), expected, atol=1e-5)
    assert scored["predicted_label"].tolist() == [LABELS[label] for label in expected.argmax(axis=1)]
    np.testing.assert_allclose(scored["score"], expected @ GAINS, atol=1e-5)
    assert scored["tier"].tolist() == [int((np.array([0.2, 0.5]) <= value).sum()) for value in scored["score"]]


def test_the_same_rows_come_back_with_what_the_plain_model_says(options):
    manifest = run(options)
    assert (manifest["rows"], manifest["partitions"], manifest["complete"]) == (37, 6, True)
    assert manifest["labels"] == list(LABELS.values())
    assert [item["rows"] for item in manifest["inputs"]] == [23, 0, 14]
    check(options, read_all(options["output"]))
    assert len(pd.read_parquet(options["output"])) == 37  # the folder as a whole: nothing in it is in the way
    assert not [path for path in Path(options["output"]).iterdir() if path.name.startswith(".")]


def test_one_file(options, tmp_path):
    run(options, input=str(tmp_path / "pairs" / "2.parquet"))
    assert len(read_all(options["output"])) == 14


def test_finished_partitions_are_left_alone_and_missing_or_damaged_ones_made(options):
    run(options)
    whole = read_all(options["output"])
    output = Path(options["output"])
    moments = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    (output / "part-00001.parquet").unlink()
    damaged = output / "part-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    run(options)
    again = {path.name for path in output.glob("*.parquet") if moments[path.name] != path.stat().st_mtime_ns}
    assert again == {"part-00001.parquet", "part-00003.parquet"}
    pd.testing.assert_frame_equal(read_all(output), whole)


def test_killed_and_started_again_nothing_is_lost_or_scored_twice(student, tmp_path):
    options = {"model": student, "input": save_pairs(tmp_path / "pairs", rows=(600,)), "partition_rows": 4}
    options |= {"output": str(tmp_path / "scored"), "threads": 1}
    process = subprocess.Popen(command(options), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "scored" / "part-00003.parquet").is_file():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scored").glob("*.parquet")}
    assert 4 <= len(done) < 150
    run(options)
    assert all((tmp_path / "scored" / name).stat().st_mtime_ns == moment for name, moment in done.items())
    check(options, read_all(options["output"]))


def test_a_ray_job_that_loses_a_worker_ends_as_if_it_had_not(student, tmp_path):
    pytest.importorskip("ray")
    options = {"model": student, "input": save_pairs(tmp_path / "pairs", rows=(400, 200)), "partition_rows": 4}
    options |= {"output": str(tmp_path / "scored"), "threads": 1, "workers": 2}
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command(options), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 240
        while job.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "scored").glob("*.parquet"))) >= 2:
                break
            time.sleep(0.02)
        assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
        children = psutil.Process(job.pid).children(recursive=True)
        # Not the raylet, whose command line names workers too.
        workers = [child for child in children if "".join(child.cmdline()[:1]).startswith("ray::MapWorker")]
        assert workers, "no worker was running"
        workers[0].kill()
        assert job.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "Scored 600 rows" in (tmp_path / "log").read_text()
    check(options, read_all(options["output"]))


def test_more_workers_than_cores_are_told(options, capsys, monkeypatch):
    monkeypatch.setattr("recipes.serve.score._with_ray", lambda *_: iter([]))
    with pytest.raises(UserError, match="rows are missing"):
        run(options, workers=4000)
    assert "workers: 4000 of 1 threads on" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize("text", [None, "   "])
def test_a_row_without_text(options, text, tmp_path):
    path = tmp_path / "pairs" / "2.parquet"
    frame = pd.read_parquet(path)
    frame.loc[8, "product_title"] = text
    frame.to_parquet(path)
    with pytest.raises(UserError, match=r"1 of 6 partitions are not scored, e\.g\. 2\.parquet: row 8: null or blank"):
        run(options)
    before = {path: path.stat().st_mtime_ns for path in Path(options["output"]).glob("part-*.parquet")}
    assert len(read_all(options["output"])) == 30  # the others stand
    run(options, invalid="null")  # as it was told to, and goes on
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    scored = read_all(options["output"])
    assert len(scored) == 37
    empty = scored[scored["predicted_label"].isna()]
    assert empty["pair_id"].tolist() == ["2-8"]
    assert empty[["probabilities", "score", "tier"]].isna().all(axis=None)
    with pytest.raises(UserError, match="holds results with another invalid: 'null', not 'refuse'"):
        run(options)


def test_enormous_text(options, tmp_path):
    path = tmp_path / "pairs" / "2.parquet"
    frame = pd.read_parquet(path)
    frame.loc[8, "product_title"] = "shoe " * 1_000_000
    frame.to_parquet(path)
    assert run(options)["rows"] == 37


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": 3}, r"0\.parquet: column 'query' holds int64; expected string"),
        ({"score": 0.5}, r"has a column 'score', which the results bring"),
    ],
)
def test_columns_that_cannot_be(options, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(options, input=save_pairs(tmp_path / "other", **changes))
    assert not Path(options["output"]).exists()


def test_inputs_that_cannot_be(options, tmp_path):
    with pytest.raises(UserError, match=r"column 'title' is missing; found pair_id, query, product_title, price"):
        run(options, product_column="title")
    with pytest.raises(UserError, match="has no rows"):
        run(options, input=save_pairs(tmp_path / "empty", rows=(0,)))
    with pytest.raises(UserError, match="no parquet file there"):
        run(options, input=str(tmp_path / "nowhere"))
    (tmp_path / "nothing.parquet").touch()
    with pytest.raises(UserError, match="not a readable parquet file"):
        run(options, input=str(tmp_path / "nothing.parquet"))
    pd.DataFrame({"query": ["a"], "product_title": ["b"]}).to_parquet(tmp_path / "pairs" / "9.parquet")
    with pytest.raises(UserError, match=r"9\.parquet: has other columns than"):
        run(options)
    with pytest.raises(UserError, match="not a storage that can be reached"):
        run(options, input="gopher://pairs")
    with pytest.raises(UserError, match="is the input, or lies in it"):
        run(options, output=options["input"])
    with pytest.raises(UserError, match="workers: expected 1 or more, got 0"):
        run(options, workers=0)
    with pytest.raises(UserError, match=r"no config\.json there"):
        run(options, model=str(tmp_path))


def test_a_model_without_gains(options, tmp_path):
    with pytest.raises(UserError, match="label_gains: ranking needs one gain a class"):
        run(options, model=save_student(tmp_path / "plain", label_gains=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "holds results with another model_sha256"),
        ("labels", "holds results with another labels"),
        ("input", r"holds results with another inputs: 2\.parquet: \{'path': '2\.parquet', 'rows': 14"),
        ("rows", "holds results with another partition_rows: 7, not 8"),
    ],
)
def test_results_of_another_model_or_input_are_not_gone_on_with(options, tmp_path, change, message):
    run(options)
    (Path(options["output"]) / "part-00000.parquet").unlink()
    if change == "model":
        options["model"] = save_student(tmp_path / "other", seed=1)
    elif change == "labels":
        shutil.copytree(options["model"], tmp_path / "renamed")
        path = tmp_path / "renamed" / "config.json"
        path.write_text(path.read_text().replace("Substitute", "Almost"))
        options["model"] = str(tmp_path / "renamed")
    elif change == "input":
        path = tmp_path / "pairs" / "2.parquet"
        pd.read_parquet(path).replace({"shoe 1": "shoe 8"}).to_parquet(path, row_group_size=5)
    else:
        options["partition_rows"] = 8
    with pytest.raises(UserError, match=message):
        run(options)


@pytest.mark.parametrize("name", ["part-00000.parquet", "prices.parquet"])
def test_files_of_others_are_not_taken_for_results_nor_written_over(options, name):
    path = Path(options["output"], name)
    path.parent.mkdir()
    pd.DataFrame({"query": ["a"] * 7, "product_title": ["b"] * 7}).to_parquet(path)
    content = path.read_bytes()
    with pytest.raises(UserError, match=f"holds {name}, but no _manifest.json"):
        run(options)
    with pytest.raises(UserError, match=f"holds {name}, but no _manifest.json"):
        run(options, input=str(path))
    assert os.listdir(path.parent) == [name]
    assert path.read_bytes() == content


def test_a_damaged_manifest(options):
    run(options)
    path = Path(options["output"], MANIFEST)
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=r"_manifest\.json: not readable"):
        run(options)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "not a loadable student: Error no file named model.safetensors"),
        ("tokenizer.json", r"no tokenizer\.json there"),
        (None, "max_length: .* takes at most 128 tokens, got 4000"),
    ],
)
def test_a_model_or_option_that_cannot_be_leaves_the_output_free(options, file, message, tmp_path):
    broken = shutil.copytree(options["model"], tmp_path / "broken")
    if file is not None:
        (broken / file).unlink()
    with pytest.raises(UserError, match=message):
        run(options, model=str(broken), max_length=None if file else 4000, workers=2)
    assert not Path(options["output"]).exists()
    assert run(options)["rows"] == 37


def test_pairs_are_read_from_the_hub(options, tmp_path):
    """hf:// against a Hub on loopback, in a process that knows no other."""
    from tests.hub_server import Repository, serve

    content = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "pairs").glob("*.parquet")}
    with serve({("datasets", "shop/pairs"): Repository(content)}) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "hf", None), "HF_HUB_OFFLINE": "0"}
        options["input"] = "hf://datasets/shop/pairs/data"
        job = subprocess.run(command(options), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr[-3000:]
    check({**options, "input": str(tmp_path / "pairs")}, read_all(options["output"]))
    manifest = json.loads(Path(options["output"], MANIFEST).read_text())
    assert [item["path"] for item in manifest["inputs"]] == ["0.parquet", "1.parquet", "2.parquet"]


def test_a_digest_names_the_content(tmp_path):
    folders = [save_pairs(tmp_path / name) for name in "ab"]
    one, other = (find_inputs(Storage(folder), ("query",), ()) for folder in folders)
    assert one == other
