"""Pairs a second on this CPU: the scorer against its peers, each at its best batch size, in rounds.

    python -m recipes.bench.throughput
    python -m recipes.bench.throughput --model runs/esci/bench/gat-0 --pairs runs/esci/pairs --labels esci

Without `--model`, a quick student is trained on the bazaar and exported (`--work` keeps it). All systems score the same
pairs with the same weights. Ratios are the median over rounds with its 95 % interval. Peers whose library is not
installed are left out; so are, by name, those in bfloat16 where this CPU does not multiply it. Writes throughput.json
and throughput.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.bench.measure import (
    RESULTS,
    emulated,
    facts,
    interleave,
    paired_ratio,
    show_left_out,
    show_ratio,
    table,
    write_results,
)
from recipes.schemas import load_labels, make_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recipes.bench.peers import Peer

DEFAULT = "CrossEncoder float32, as it comes"


@dataclass
class ThroughputArguments:
    """Options of the throughput bench."""

    output: str = field(default=RESULTS, metadata={"help": "Folder of throughput.json and throughput.md."})
    work: str = field(default="runs/bench", metadata={"help": "Folder of the quick student and of exports."})
    model: str | None = field(default=None, metadata={"help": "Folder of a student (None: a quick one)."})
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs of its marketplace."})
    labels: str = field(default="aliexpress6", metadata={"help": "Label schema of the pairs."})
    timed: str | None = field(default=None, metadata={"help": "Time other pairs: a parquet or csv file."})
    rows: int = field(default=500, metadata={"help": "Pairs a round."})
    rounds: int = field(default=5, metadata={"help": "Rounds."})
    patience: float = field(default=45.0, metadata={"help": "Seconds after which no 4th or later round begins."})
    threads: int | None = field(default=None, metadata={"help": "Cores (None: all that the process may use)."})


def throughput(arguments: ThroughputArguments) -> dict[str, Any]:
    """Measure; return what throughput.json holds.

    Raises:
        UserError: An option or a file is not usable (see `recipes.bench.student.prepare`).
    """
    import torch

    from recipes.bench.peers import cross_encoder, fastest_batch_size, onnx_peer, openvino_peer
    from recipes.bench.student import exported_drop, prepare, timed_pairs
    from recipes.serve.plan import cpu_flags, multiplied
    from recipes.serve.scorer import Scorer, usable_cores

    for name in ("rows", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected at least 1.")
    make_folder(arguments.output)
    folder, source = prepare(arguments.model, arguments.pairs, arguments.labels, arguments.work)
    frame = timed_pairs(Path(arguments.timed) if arguments.timed else source, arguments.rows)
    pairs = list(zip(frame["query"], frame["product_title"], strict=True))
    gold, order = gold_labels(frame, folder, arguments.labels) if "label" in frame else (None, [])
    threads = arguments.threads or usable_cores()
    torch.set_num_threads(threads)

    makers: dict[str, Callable[[], Peer]] = {
        "CrossEncoder float32": lambda: cross_encoder(folder, "float32"),
        "CrossEncoder bfloat16": lambda: cross_encoder(folder, "bfloat16"),
    }
    if importlib.util.find_spec("onnxruntime"):
        makers["ONNX Runtime float32"] = lambda: onnx_peer(folder, threads, int8=False)
        makers["ONNX Runtime dynamic int8"] = lambda: onnx_peer(folder, threads, int8=True)
    if importlib.util.find_spec("openvino"):
        makers["OpenVINO float32"] = lambda: openvino_peer(folder, threads, "f32")
        makers["OpenVINO bfloat16"] = lambda: openvino_peer(folder, threads, "bf16")
    flags = cpu_flags()
    # int8 is never left out: without its instructions the scorer does not serve it, but a peer may well gain by it.
    left_out = emulated({name: "bfloat16" for name in makers if "bfloat16" in name}, flags)
    peers = {name: make() for name, make in makers.items() if name not in left_out}
    print("Looking for each peer's best batch size", flush=True)
    sizes = {name: fastest_batch_size(peer, pairs[:128]) for name, peer in peers.items()}
    found: dict[str, NDArray[np.float32]] = {}
    systems: dict[str, Callable[[], None]] = {}

    def add(name: str, score: Callable[[], NDArray[np.float32]]) -> None:
        def keep() -> None:
            found[name] = score()

        systems[name] = keep

    add(DEFAULT, lambda: peers["CrossEncoder float32"](pairs, 32))
    for name, peer in peers.items():
        add(name, lambda peer=peer, size=sizes[name]: peer(pairs, size))
    with Scorer(folder, threads=threads) as scorer:
        ours = f"this scorer, {scorer.form}"
        add(ours, lambda: stack(scorer.score(pairs)))
        seconds = interleave(systems, arguments.rounds, "throughput", arguments.patience)
        drop = exported_drop(folder).get(scorer.form)  # None: exported without pairs
        tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in scorer.prepare(pairs)) / len(pairs)
    medians = {name: paired_ratio([len(pairs)] * len(values), values) for name, values in seconds.items()}
    best = max(peers, key=lambda name: medians[name]["median"])
    limit = int8_limit(folder, tokens) if "int8" in multiplied(flags) else None
    return {
        "command": command_line("recipes.bench.throughput", arguments),
        "facts": facts(to_dict(arguments)),
        "rows": len(pairs),
        "tokens_a_pair": tokens,
        "threads": threads,
        "batch_sizes": sizes,
        "pairs_per_second": medians,
        "over_default": {name: paired_ratio(seconds[DEFAULT], values) for name, values in seconds.items()},
        "best_peer": best,
        "ours": ours,
        "over_best_peer": paired_ratio(seconds[best], seconds[ours]),
        "drop_of_macro_f1_points": drop,
        "macro_f1": None if gold is None else accuracy(gold, found, order),
        "int8_limit_pairs_per_second": limit,
        "share_of_int8_limit": medians[ours]["median"] / limit if limit else None,
        "left_out": left_out,
    }


def stack(probabilities: Any) -> NDArray[np.float32]:
    """Return all rows of a scorer's answer."""
    import numpy as np

    return np.stack(list(probabilities))


def gold_labels(frame: Any, folder: Path, labels: str) -> tuple[NDArray[np.int64], list[int]]:
    """Return the class of each timed pair `(pairs,)`, and the student's logit of each class of the schema.

    Raises:
        UserError: The student or the pairs have other labels than the schema.
    """
    from transformers import AutoConfig

    import modeling_lrkd  # noqa: F401  registers the lrkd configuration
    from recipes.evaluate.predict import schema_order

    schema = load_labels(labels)
    order = schema_order(AutoConfig.from_pretrained(folder).id2label, schema, "the student")
    return schema.canonical_column(frame["label"], "the timed pairs").map(schema.label2id).to_numpy(), order


def accuracy(gold: NDArray[np.int64], found: dict[str, Any], order: list[int]) -> dict[str, float]:
    """Return macro-F1 (0 to 1) of each system on the timed pairs."""
    import numpy as np
    from sklearn.metrics import f1_score

    present = np.unique(gold)
    return {
        name: float(f1_score(gold, values[:, order].argmax(1), labels=present, average="macro", zero_division=0))
        for name, values in found.items()
    }


def int8_limit(folder: Path, tokens: float) -> float:
    """Return the pairs a second if nothing but the encoder's products were computed, at the int8 rate measured here."""
    import torch
    from transformers import AutoConfig

    from recipes.bench.efficiency import forward_flops

    config = AutoConfig.from_pretrained(folder).encoder_config
    rows, inner, outer = 2048, config.hidden_size, config.intermediate_size
    left, right = (torch.randint(-99, 99, shape, dtype=torch.int8) for shape in ((rows, inner), (inner, outer)))
    times = interleave({"product": lambda: torch._int_mm(left, right)}, 50, "int8 limit")["product"]
    return 2 * rows * inner * outer / min(times) / forward_flops(config, 1, 1) / tokens


def format_table(content: dict[str, Any]) -> str:
    """Return the table and its conclusions as Markdown."""
    rows = []
    for name, rate in sorted(content["pairs_per_second"].items(), key=lambda item: item[1]["median"]):
        size = content["batch_sizes"].get(name, 32 if name == DEFAULT else None)
        row = {
            "system": name,
            "batch": str(size) if size else "by tokens",
            "pairs/s": f"{rate['median']:.0f}",
            "over the default": show_ratio(content["over_default"][name]),
        }
        if content["macro_f1"] is not None:
            row["macro-F1"] = f"{100 * content['macro_f1'][name]:.2f}"
        rows.append(row)
    drop = content["drop_of_macro_f1_points"]
    limit, share = content["int8_limit_pairs_per_second"], content["share_of_int8_limit"]
    reached = (
        " This CPU has no instructions for int8 (VNNI, AMX or Arm's dot products), so the scorer does not serve it."
    )
    if limit:
        reached = f" Matrix products alone, in int8, would allow {limit:.0f} pairs/s here: "
        reached += f"{100 * share:.0f} % of that is reached."
    return (
        f"{content['rows']} pairs of {content['tokens_a_pair']:.0f} tokens on {content['threads']} cores.\n\n"
        f"{table(rows)}\n\n"
        f"Over the best peer ({content['best_peer']}): {show_ratio(content['over_best_peer'])}. "
        f"Loss of macro-F1 on the export's guard: {'not measured' if drop is None else f'{drop:.2f} points'}."
        f"{reached}{show_left_out(content['left_out'])}"
    )


def main() -> None:
    """Measure from the command line."""
    arguments = parse(ThroughputArguments, __doc__)
    content = throughput(arguments)
    write_results(arguments.output, "throughput", content, format_table(content))
    print("Next: python -m recipes.bench.latency")


if __name__ == "__main__":
    run(main)
