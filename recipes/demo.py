"""The whole way, small: a marketplace, a teacher's reasoning, four students, a table, a reload, three scored pairs.

    python -m recipes.demo                # make demo
    python -m recipes.demo --size 1000    # quicker, noisier

Every step is a command that works alone; they are printed as they run. Nothing is fetched: the marketplace and its
scripted teacher are synthetic, the encoder is a Python package. Started again, finished steps are not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from recipes.arguments import UserError, parse, run

# Run by a Python that may not import this package: the folder alone has to be enough.
STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_lrkd":
            raise ImportError("the published folder has to be enough")

sys.meta_path.insert(0, Refuse())
from transformers import pipeline
from transformers.utils import logging

logging.disable_progress_bar()
classify = pipeline("text-classification", model=sys.argv[1], trust_remote_code=True)
for pair in json.loads(sys.argv[2]):
    best = classify({"text": pair["query"], "text_pair": pair["product_title"]}, truncation=True)
    best = best[0] if isinstance(best, list) else best
    print(f"  query    {pair['query']}\\n  product  {pair['product_title']}")
    print(f"  student  {best['label']} ({best['score']:.2f})    gold  {pair['label']}\\n")
"""


@dataclass
class DemoArguments:
    """Options of the demo."""

    output: str = field(default="runs/demo", metadata={"help": "Folder of everything it makes."})
    size: int = field(default=3000, metadata={"help": "Pairs of the marketplace, over its three splits."})
    seed: int = field(default=0, metadata={"help": "Of the marketplace and its teacher."})


def step(number: int, title: str, *command: str) -> None:
    """Run one module of the recipes, its command line shown first."""
    print(f"\n[{number}/6] {title}\n$ python -m {' '.join(command)}", flush=True)
    result = subprocess.run([sys.executable, "-m", *command], check=False)
    if result.returncode:
        raise UserError(f"step {number} failed (see above). Correct it and run the demo again: it goes on from there.")


def main() -> None:
    """Run the demo."""
    arguments = parse(DemoArguments, __doc__)
    started = time.time()
    folder = Path(arguments.output)
    bazaar, seed = str(folder / "bazaar"), str(arguments.seed)
    files = {name: str(folder / f"{name}.parquet") for name in ("completions", "rationales", "rationales_embedded")}

    step(1, "A synthetic marketplace", "recipes.data.bazaar", "--size", str(arguments.size), "--seed", seed,
         "--output", bazaar)  # fmt: skip
    step(2, "A scripted teacher reasons from three perspectives", "recipes.teacher.scripted", "--seed", seed,
         "--pairs", bazaar, "--output", files["completions"])  # fmt: skip
    step(3, "Rationales whose verdict is right", "recipes.rationales.build", "--labels", "aliexpress6",
         "--pairs", bazaar, "--completions", files["completions"], "--output", files["rationales"])  # fmt: skip
    step(4, "Their sentence embeddings", "recipes.rationales.embed", "--encoder", "minilm", "--max_length", "256",
         "--rationales", files["rationales"], "--output", files["rationales_embedded"])  # fmt: skip
    step(5, "A plain cross-encoder and three LRKD students", "recipes.student.bench",
         "--config", "recipes/configs/student/demo_bench.yaml", "--pairs", bazaar,
         "--rationales", files["rationales_embedded"], "--output", str(folder / "students"))  # fmt: skip

    student = folder / "students" / "lrkd-gat-0"
    print(f"\n[6/6] {student}, loaded by a process that has never seen this package:\n", flush=True)
    command = [sys.executable, "-c", STRANGER, str(student), json.dumps(examples(Path(bazaar, "test.parquet")))]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"{student}: could not be loaded as remote code (see above).")
    print(
        f"Done in {time.time() - started:.0f} s. The marketplace is synthetic: the table shows that everything works, "
        "not what it gains.\n"
        f"Look at {folder}/students/comparison/plot.png.\n"
        "Next: recipes/README.md has every stage, and how to run it on real pairs."
    )


def examples(pairs: Path) -> list[dict[str, str]]:
    """Return three test pairs of one query: products that the student has to tell apart."""
    import pandas as pd

    frame = pd.read_parquet(pairs, columns=["query", "product_title", "locale", "label"])
    english = frame[frame["locale"] == "en"]
    most_varied = english.groupby("query")["label"].nunique().idxmax()
    return english[english["query"] == most_varied].drop_duplicates("label").head(3).to_dict("records")


if __name__ == "__main__":
    run(main)
