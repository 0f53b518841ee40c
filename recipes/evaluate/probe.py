"""Probe what a student's latent reasoning knows of the rationale (Figure 4 of arXiv 2601.21611).

    python -m recipes.rationales.build --pairs runs/esci/pairs --completions COMPLETIONS.parquet \
        --splits train test --keep all --output runs/esci/probe_rationales.parquet
    python -m recipes.evaluate.probe --models gat=runs/esci/bench/gat-0 unguided=runs/esci/bench/gat-unguided-0 \
        --pairs runs/esci/pairs --rationales runs/esci/probe_rationales.parquet --output runs/esci/keyword_probe

Does a vector tell whether the rationale of its pair has a word, though neither query nor title has it? The keywords are
the most frequent such words of the fitting pairs, stop words left out (recipes/evaluate/keywords.py says what a word
is). For each keyword, over the pairs whose query and title lack it, one logistic regression is fitted on r_qp and one
on h_cls, and both are measured by F1 on the pairs of `split`.

- Each of the `--runs` fits on another random 80 % of the queries. The paired t-tests over runs, as in the paper, look
  at how sure the fits are, and the runs share most of their data: read the 95 % interval over queries of `split` first.
- With the same split for both, each run is scored on the queries that it was not fitted on.
- A student that was guided by these very rationales has seen those of `train`; those of `test` it has not.
- `always`: F1 of saying yes to every pair, which no vector is needed for.
- Several models share keywords, runs and draws, e.g. a guided student and its unguided control.

Where the paper is silent: standardised vectors, `--c`, classes weighted inversely to their frequency, `--max_share`.
Writes probe.json, probe.md and probe.png.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import sha256, weights_sha256, write_json
from recipes.schemas import RATIONALES, make_folder, read, read_pairs

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

LATENT, PLAIN, PROJECTED = "r_qp", "h_cls", "projected"


@dataclass
class ProbeArguments:
    """Options of `recipes.evaluate.probe`."""

    models: list[str] = field(metadata={"help": "Students: NAME=FOLDER, or FOLDER alone."})
    pairs: str = field(metadata={"help": "Folder of pairs."})
    rationales: str = field(metadata={"help": "Rationales of the pairs of both splits; a pair's are joined."})
    output: str = field(metadata={"help": "Folder to write probe.json, probe.md and probe.png to."})
    fit_split: str = field(default="train", metadata={"help": "Split that keywords are chosen and probes fitted on."})
    split: str = field(default="test", metadata={"help": "Split that the probes are scored on."})
    locale: str | None = field(default=None, metadata={"help": "Only pairs of this locale (the paper: us)."})
    top: int = field(default=15, metadata={"help": "Keywords."})
    max_share: float = field(default=0.5, metadata={"help": "Words in a larger share of the rationales are left out."})
    ignore: list[str] = field(default_factory=list, metadata={"help": "Further words that are no keywords."})
    runs: int = field(default=10, metadata={"help": "Fits of each probe, each on another 80 % of the queries."})
    class_weight: Literal["balanced", "none"] = field(default="balanced", metadata={"help": "Of the probes."})
    c: float = field(default=0.01, metadata={"help": "Inverse strength of the probes' L2 penalty (scikit-learn's C)."})
    projected: bool = field(default=False, metadata={"help": "Probe the projected reasoning too."})
    draws: int = field(default=2000, metadata={"help": "Bootstrap draws of the queries of `split`."})
    seed: int = field(default=0, metadata={"help": "Of the runs and the draws."})
    batch_size: int = field(default=64, metadata={"help": "Pairs a batch."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a pair (None: the student's own)."})
    device: str = field(default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda:1, mps."})


def probe(arguments: ProbeArguments) -> dict[str, Any]:
    """Choose keywords, compute the vectors, fit, score, write; return what probe.json holds.

    Raises:
        UserError: A model is no student or has no latent reasoning of its own, a split has no pair with a rationale,
            or no keyword is left.
    """
    import numpy as np
    import pandas as pd

    from recipes.evaluate.keywords import choose_keywords, label_pairs
    from recipes.evaluate.probing import fit_and_count, summarise

    if arguments.c <= 0:
        raise UserError(f"--c {arguments.c}: expected more than 0.")
    for name, least in (("top", 1), ("runs", 2), ("draws", 100), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected at least {least}.")
    folders = _named(arguments.models)
    for name, folder in folders.items():
        _check_student(name, folder)
    frames = {split: _pairs_with_rationales(arguments, split) for split in (arguments.fit_split, arguments.split)}
    fit_frame = frames[arguments.fit_split]
    keywords = choose_keywords(
        fit_frame["rationale"], fit_frame["surface"], arguments.top, arguments.max_share, _ignored(arguments.ignore)
    )
    if not keywords:
        raise UserError(f"{arguments.rationales}: no keyword is left. Raise --max_share, or look at the rationales.")
    output = make_folder(arguments.output)

    same = arguments.fit_split == arguments.split
    frame = fit_frame if same else pd.concat([fit_frame, frames[arguments.split]], ignore_index=True)
    is_fit = np.arange(len(frame)) < len(fit_frame)
    is_scored = is_fit if same else ~is_fit
    present, lacking = label_pairs(keywords, frame["rationale"], frame["surface"])
    query = frame.groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    features = {name: _features(folder, frame, arguments) for name, folder in folders.items()}
    counts, skipped = fit_and_count(
        features,
        present,
        lacking,
        query,
        is_fit,
        is_scored,
        arguments.runs,
        arguments.class_weight,
        arguments.c,
        arguments.seed,
    )
    eligible = lacking & is_scored  # (keywords, pairs)
    result = {
        **summarise(counts, keywords, present & eligible, eligible, arguments.draws, arguments.seed),
        "skipped": [f"{keywords[keyword]}: {reason}" for keyword, reason in skipped],
        "pairs": {"fit": int(is_fit.sum()), "scored": int(is_scored.sum())},
        "same_split": same,
        "queries_scored": len(np.unique(query[is_scored])),
        "weights_sha256": {name: weights_sha256(folder) for name, folder in folders.items()},
        "rationales_sha256": sha256(arguments.rationales),
        "arguments": to_dict(arguments),
    }
    from recipes.evaluate.probe_report import format_probe, plot_probe

    try:
        (output / "probe.md").write_text(format_probe(result, markdown=True), encoding="utf-8")
        plot_probe(result, output / "probe.png")
        write_json(output / "probe.json", result)
    except OSError as error:
        raise UserError(f"{output}: could not be written ({error}). Free space or choose another --output.") from None
    return result


def _named(models: list[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for text in models:
        name, equals, folder = text.rpartition("=")
        name = name if equals else Path(folder).name
        if not folder or name in folders:
            raise UserError(f"--models {text}: expected NAME=FOLDER, each name once.")
        folders[name] = folder
    return folders


def _check_student(name: str, folder: str) -> None:
    """Refuse what has no r_qp beside h_cls, before any weights are read."""
    from transformers import AutoConfig

    import modeling_lrkd  # noqa: F401  registers the lrkd classes

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a loadable student: {' '.join(str(error).split())}") from None
    if config.model_type != "lrkd":
        raise UserError(f"{folder}: a {config.model_type!r} model; expected a student of recipes.student.distill.")
    if config.extractor_type in ("none", "cls"):
        raise UserError(
            f"{folder}: {name!r} has extractor_type {config.extractor_type!r}, so no latent reasoning beside h_cls. "
            "Probe a student with an extractor."
        )


def _pairs_with_rationales(arguments: ProbeArguments, split: str) -> pd.DataFrame:
    """Return the pairs of a split that have a rationale, with the columns `rationale` and `surface`."""
    pairs = read_pairs(arguments.pairs, [split])[split]
    if arguments.locale is not None:
        pairs = pairs[pairs["locale"] == arguments.locale]
    texts = read(arguments.rationales, RATIONALES).groupby("pair_id")["rationale"].agg("\n".join)
    pairs = pairs.assign(
        rationale=pairs["pair_id"].map(texts), surface=pairs["query"] + "\n" + pairs["product_title"]
    ).dropna(subset=["rationale"])
    if pairs.empty:
        of_locale = "" if arguments.locale is None else f" of locale {arguments.locale!r}"
        raise UserError(
            f"{arguments.rationales}: no rationale of a pair{of_locale} of {arguments.pairs}/{split}.parquet. Make "
            f"them with recipes.rationales.build --splits {arguments.fit_split} {arguments.split} --keep all."
        )
    return pairs.reset_index(drop=True)


def _ignored(further: list[str]) -> set[str]:
    """Return English function words, what `recipes.rationales.strip` writes in place of a verdict, and `further`."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    from recipes.rationales.strip import NEUTRAL

    return {*ENGLISH_STOP_WORDS, "does", "did", NEUTRAL, *further}


def _features(folder: str, frame: pd.DataFrame, arguments: ProbeArguments) -> dict[str, NDArray[np.float32]]:
    """Return the vectors of all pairs, `(pairs, size)` each, from one pass through a student."""
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding
    from transformers.utils import logging

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the classifier is left behind is what we want
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    logging.set_verbosity(verbosity)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    encoded = tokenizer(
        frame["query"].tolist(),
        frame["product_title"].tolist(),
        truncation=True,
        max_length=arguments.max_length or min(tokenizer.model_max_length, 512),
    )
    outputs = {PLAIN: "pooler_output", LATENT: "latent_reasoning"}
    outputs |= {PROJECTED: "projected_reasoning"} if arguments.projected else {}
    order = np.argsort([-len(tokens) for tokens in encoded["input_ids"]], kind="stable")
    pad = DataCollatorWithPadding(tokenizer)
    vectors: dict[str, NDArray[np.float32]] = {}
    with torch.inference_mode(), tqdm(total=len(frame), unit="pair", desc=Path(folder).name) as bar:
        for start in range(0, len(frame), arguments.batch_size):
            rows = order[start : start + arguments.batch_size]
            batch = pad([{name: values[row] for name, values in encoded.items()} for row in rows])
            output = model(**batch.to(device))
            for name, key in outputs.items():
                values = output[key].float().cpu().numpy()
                vectors.setdefault(name, np.empty((len(frame), values.shape[1]), dtype=np.float32))[rows] = values
            bar.update(len(rows))
    return vectors


def main() -> None:
    """Probe from the command line."""
    arguments = parse(ProbeArguments, __doc__)
    from recipes.evaluate.probe_report import format_probe

    print(format_probe(probe(arguments), markdown=False))
    print(f"Wrote {arguments.output}/probe.json, probe.md and probe.png.")
    print("Next: probe an unguided student beside it, and write down what was learnt in recipes/NOTES.md.")


if __name__ == "__main__":
    run(main)
