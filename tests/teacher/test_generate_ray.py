"""The Ray Data job on a small local Ray: the same completions as one process makes, partition by partition."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from recipes.arguments import UserError
from recipes.schemas import COMPLETIONS, read
from recipes.teacher.generate import GenerateArguments, generate
from recipes.teacher.generate_ray import GenerateRayArguments, Worker, generate_ray
from tests.chat_server import serve_chat

ROOT = Path(__file__).parents[2]
KEY = list(COMPLETIONS.key)


@pytest.fixture
def pairs(tmp_path):
    numbers = range(6)
    frame = pd.DataFrame({"pair_id": [f"p{n}" for n in numbers], "query": [f"earbuds {n}" for n in numbers]})
    (tmp_path / "pairs").mkdir()
    frame.assign(product_title="A case", locale="us", label="Exact").to_parquet(tmp_path / "pairs" / "train.parquet")
    return tmp_path / "pairs"


def test_a_job_goes_on_where_a_worker_stopped_and_equals_one_process(pairs, tmp_path):
    pytest.importorskip("ray")
    output = tmp_path / "ray.parquet"
    with serve_chat(refuse=lambda text: "earbuds 4" in text) as server:
        options = {"model": "tiny", "samples": 2, "base_url": [server.url], "backoff": 0.01}
        worker = Worker(GenerateArguments(str(pairs), str(output), **options), partitions=3)
        # Pairs 1 and 4, and a server that will not have pair 4: told, not raised, so that other partitions go on.
        assert "6 of 12 completions could not be had" in worker({"id": 1})["error"]
        assert sum(server.answered.values()) == 3 * 2

        server.refuse = lambda text: False
        values = {"pairs": pairs, "output": output, "model": "tiny", "samples": 2, "partitions": 3, "backoff": 0.01}
        flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "recipes.teacher.generate_ray", *flags, "--base_url", server.url]
        job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert job.returncode == 0, job.stderr
        assert "36 completions of 3 partitions" in job.stdout
        assert set(server.answered.values()) == {1}
        whole = generate(GenerateArguments(str(pairs), str(tmp_path / "one.parquet"), **options))
    frames = [read(path, COMPLETIONS).sort_values(KEY, ignore_index=True) for path in (output, whole)]
    pd.testing.assert_frame_equal(*frames)


def test_bad_arguments(pairs, tmp_path):
    pytest.importorskip("ray")
    for options, message in (
        ({"partitions": 0}, "partitions: 0"),
        ({"partitions": 7}, "partitions: 7 of 6 pairs"),
        ({"workers": 0}, "workers: 0"),
        ({"shard": "0/2"}, "shard: the partitions are the shards"),
    ):
        with pytest.raises(UserError, match=message):
            generate_ray(GenerateRayArguments(str(pairs), str(tmp_path / "c.parquet"), "tiny", **options))
