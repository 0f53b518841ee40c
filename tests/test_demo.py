"""`make demo`, small: the command a newcomer runs first."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_demo_goes_all_the_way(tmp_path):
    command = [sys.executable, "-m", "recipes.demo", "--size", "240", "--output", str(tmp_path / "demo")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for system in ("bert", "lrkd-mlp", "lrkd-poly", "lrkd-gat"):
        assert system in result.stdout
    assert result.stdout.count("  student  ") == 3
    assert "Done in" in result.stdout
    runs = (tmp_path / "demo" / "students" / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["system"] for line in runs} == {"bert", "lrkd-mlp", "lrkd-poly", "lrkd-gat"}
