"""Bulk scoring from and to object storage: an S3 server on loopback, spoken to by pyarrow as it would speak to AWS."""

import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from pyarrow.fs import FileSelector, LocalFileSystem, S3FileSystem, copy_files

from recipes.arguments import UserError
from recipes.serve.partitions import MANIFEST
from tests.serve.test_score import ROOT, command, read_all, run, save_pairs, save_student

# In a process of its own: pyarrow must not wait for an answer that this one's interpreter has to give.
SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def endpoint():
    pytest.importorskip("moto")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        url = server.stdout.readline().strip()
        assert url, "the server did not start"
        yield url
        server.stdin.close()  # which ends it


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def shop(endpoint, tmp_path_factory):
    """A file system on the server, with pairs in the bucket `shop`, and the folder that they are a copy of."""
    account = {"access_key": "maria", "secret_key": "secret", "region": "us-east-1"}
    s3 = S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True, **account)
    s3.create_dir("shop")
    folder = save_pairs(tmp_path_factory.mktemp("shop") / "pairs")
    copy_files(folder, "shop/pairs", LocalFileSystem(), s3)
    return s3, folder


@pytest.fixture
def s3(shop):
    return shop[0]


@pytest.fixture
def options(student, endpoint, shop, tmp_path, monkeypatch):
    """Arguments; and in the environment what lets this process, and those that it starts, find the server."""
    environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "maria", "AWS_SECRET_ACCESS_KEY": "secret"}
    environment |= {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ends = {"input": "s3://shop/pairs", "output": f"s3://shop/{tmp_path.name}"}
    return {"model": student, **ends, "partition_rows": 7, "threads": 1}


def on_server(options):
    return options["output"].removeprefix("s3://")


def start(options, **how):
    return subprocess.Popen(command(options), cwd=ROOT, text=True, **how)


def check(options, s3, folder, tmp_path):
    """What came to lie on the server is what the local `folder` gives, to the last bit."""
    run(options, input=str(folder), output=str(tmp_path / "locally"))
    (tmp_path / "fetched").mkdir()
    copy_files(on_server(options), str(tmp_path / "fetched"), s3, LocalFileSystem())
    pd.testing.assert_frame_equal(read_all(tmp_path / "fetched"), read_all(tmp_path / "locally"))


def test_from_s3_to_s3_as_from_folder_to_folder(options, shop, tmp_path):
    s3, folder = shop
    manifest = run(options)
    assert (manifest["rows"], manifest["partitions"], manifest["complete"]) == (37, 6, True)
    found = [(item["path"], item["rows"]) for item in manifest["inputs"]]
    assert found == [("0.parquet", 23), ("1.parquet", 0), ("2.parquet", 14)]
    names = {info.base_name for info in s3.get_file_info(FileSelector(on_server(options), recursive=True))}
    assert names == {MANIFEST, *(f"part-0000{number}.parquet" for number in range(6))}
    check(options, s3, folder, tmp_path)


def test_one_file(options, s3):
    run(options, input="s3://shop/pairs/2.parquet")
    assert len(pd.read_parquet(on_server(options), filesystem=s3)) == 14


def test_killed_it_goes_on_from_what_lies_on_the_server(options, s3, tmp_path):
    folder = save_pairs(tmp_path / "pairs", rows=(120,))
    s3.create_dir("killed")
    copy_files(folder, "killed/pairs", LocalFileSystem(), s3)
    options |= {"input": "s3://killed/pairs", "partition_rows": 3}
    process = start(options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    third = f"{on_server(options)}/part-00002.parquet"
    while process.poll() is None and time.monotonic() < deadline and not s3.get_file_info(third).is_file:
        time.sleep(0.005)
    assert s3.get_file_info(third).is_file, "nothing was scored"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not s3.get_file_info(f"{on_server(options)}/part-00039.parquet").is_file
    whole = pd.read_parquet(third, filesystem=s3)
    whole.assign(predicted_label="kept").to_parquet(third, filesystem=s3)
    s3.delete_file(f"{on_server(options)}/part-00000.parquet")
    run(options)
    assert pd.read_parquet(third, filesystem=s3)["predicted_label"].tolist() == ["kept"] * 3  # not scored again
    whole.to_parquet(third, filesystem=s3)
    check(options, s3, folder, tmp_path)


def test_several_workers_write_to_the_server(options, shop, tmp_path):
    pytest.importorskip("ray")
    job = start({**options, "workers": 2}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = job.communicate()
    assert job.returncode == 0, output[-3000:]
    assert "Scored 37 rows" in output
    check(options, *shop, tmp_path)


def test_results_of_another_model_on_the_server_are_not_gone_on_with(options, s3, tmp_path):
    run(options, partition_rows=100)
    s3.delete_file(f"{on_server(options)}/part-00000.parquet")
    with pytest.raises(UserError, match=r"holds results with another model_sha256.*Choose another output folder"):
        run(options, partition_rows=100, model=save_student(tmp_path / "other", seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "s3://nowhere/pairs"}, r"s3://nowhere/pairs: no parquet file there.*Pass a parquet file"),
        ({"input": "s3://shop/nothing"}, r"s3://shop/nothing: no parquet file there.*Pass a parquet file"),
        (
            {"output": "s3://nowhere/scored"},
            r"s3://nowhere/scored/_manifest\.json: could not be written.*bucket is there",
        ),
        ({"output": "s3://shop/pairs/scored"}, "output: s3://shop/pairs/scored is the input, or lies in it"),
        ({"output": "hf://datasets/shop/scored"}, "output: hf://datasets/shop/scored: results go to a folder or s3"),
    ],
)
def test_places_that_are_not_there(options, changes, message):
    with pytest.raises(UserError, match=message):
        run(options, **changes)


def test_a_server_that_does_not_answer(options):
    """Nothing listens on port 1 of this machine."""
    options["output"] += "?scheme=http&endpoint_override=127.0.0.1:1"
    with pytest.raises(UserError, match=r"s3://shop/.*could not be reached \(.*127\.0\.0\.1.*AWS_ENDPOINT_URL"):
        run(options)
