"""The README's code runs: its paths and names replaced by tiny ones, nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from tests.tiny import save_tiny_encoder, tiny_config, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code, folder):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_there_are_three_snippets():
    assert len(SNIPPETS) == 3


@pytest.fixture
def demo(tmp_path):
    """A folder with something in the place of the demo's student."""
    torch.manual_seed(0)
    labels = {0: "Match", 1: "Mismatch"}
    model = LRKDForSequenceClassification(
        LRKDConfig(encoder_config=tiny_config(), id2label=labels, label_gains=[1.0, 0.0])
    )
    folder = tmp_path / "runs" / "demo" / "students" / "lrkd-gat-0"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return tmp_path


def test_load_and_score(demo):
    assert re.search(r"'label': '(Match|Mismatch)', 'score': 0\.\d+", run(SNIPPETS[0], demo))


def test_rank(demo):
    ranks = re.findall(r"^([12]) (Desk lamp|USB-C cable, 2 m) (?:Match|Mismatch) 0\.\d+", run(SNIPPETS[1], demo), re.M)
    assert [rank for rank, _ in ranks] == ["1", "2"]


def test_build_train_and_save(tmp_path):
    save_tiny_encoder(tmp_path / "encoder")
    code = SNIPPETS[2].replace("google-bert/bert-base-multilingual-uncased", "encoder")
    assert code != SNIPPETS[2]
    assert "torch.Size([1, 4]) torch.Size([1, 16])" in run(code, tmp_path)
    assert (tmp_path / "student" / "modeling_lrkd.py").is_file()


@pytest.mark.parametrize("target", re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))
def test_its_commands_are_targets_of_the_makefile(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_its_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", document.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            assert (document.parent / path).exists(), f"{document.name}: {link}"
            headings = re.findall(r"^#+ (.*)$", (document.parent / path).read_text("utf-8"), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in ("", *slugs), f"{document.name}: {link}"
