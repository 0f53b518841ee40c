"""How long a query waits: one query and its candidates, plain torch against the scorer, on one core and on several.

    python -m recipes.bench.latency
    python -m recipes.bench.latency --model runs/esci/bench/gat-0 --pairs runs/esci/pairs --labels esci --threads 1 2 4

Each system has a process of its own, which is asked in turn with the others; its memory is its own too. A query that
takes longer than `--seconds` is asked once. Writes latency.json, latency.md and latency.png.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.bench.measure import RESULTS, facts, percentiles, resident_bytes, table, write_results
from recipes.schemas import make_folder

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PLAIN, FAST = "plain torch", "scorer"


@dataclass
class LatencyArguments:
    """Options of the latency bench."""

    output: str = field(default=RESULTS, metadata={"help": "Folder of latency.json, latency.md and latency.png."})
    work: str = field(default="runs/bench", metadata={"help": "Folder of the quick student and of exports."})
    model: str | None = field(default=None, metadata={"help": "Folder of a student (None: a quick one)."})
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs of its marketplace."})
    labels: str = field(default="aliexpress6", metadata={"help": "Label schema of the pairs."})
    candidates: list[int] = field(default_factory=lambda: [100, 1000, 5000], metadata={"help": "Products of a query."})
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Cores that each system may use."})
    plain_up_to: int = field(default=100, metadata={"help": "Most candidates that plain torch is asked for."})
    seconds: float = field(default=5.0, metadata={"help": "Repeat a query for about so long, 3 times at least."})


def serve(link: Connection, system: str, folder: str, threads: int) -> None:
    """Answer in a process of its own: a list of pairs is scored, and how long it took and the memory come back."""
    import torch

    from recipes.serve.scorer import Scorer

    torch.set_num_threads(threads)
    backend = "torch" if system == PLAIN else "auto"
    with Scorer(folder, backend, threads=threads) as scorer:  # type: ignore[arg-type]
        link.send(scorer.form)
        while (pairs := link.recv()) is not None:
            started = time.perf_counter()
            for _ in scorer.score(pairs):
                pass
            link.send((time.perf_counter() - started, resident_bytes()))


def times(first: float, seconds: float) -> int:
    """Return how often a query is repeated that took `first` seconds: for about `seconds`, 3 to 50 times, or just once.

    >>> times(0.01, 6.0), times(0.5, 6.0), times(5.0, 6.0), times(9.0, 6.0)
    (50, 12, 3, 1)
    """
    return 1 if first > seconds else min(50, max(3, round(seconds / first)))


def latency(arguments: LatencyArguments) -> dict[str, Any]:
    """Measure; return what latency.json holds.

    Raises:
        UserError: An option or a file is not usable (see `recipes.bench.student.prepare`).
    """
    from tqdm import tqdm

    from recipes.bench.student import prepare, timed_pairs

    for name in ("candidates", "threads"):
        if not getattr(arguments, name) or min(getattr(arguments, name)) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected numbers of at least 1.")
    make_folder(arguments.output)
    folder, source = prepare(arguments.model, arguments.pairs, arguments.labels, arguments.work)
    frame = timed_pairs(source, max(arguments.candidates))
    query = frame["query"].iloc[0]
    titles = [frame["product_title"].iloc[number % len(frame)] for number in range(max(arguments.candidates))]
    pairs = [(query, title) for title in titles]

    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's threads and memory
    keys = [(system, threads) for threads in arguments.threads for system in (PLAIN, FAST)]
    links, processes, forms = {}, [], {}
    try:
        for key in keys:
            links[key], other = context.Pipe()
            process = context.Process(target=serve, args=(other, key[0], str(folder), key[1]), daemon=True)
            process.start()
            other.close()  # so that a child that dies is noticed
            processes.append(process)
        for key in keys:
            forms[key] = links[key].recv()
        cells = []
        for count in arguments.candidates:
            asked = [key for key in keys if key[0] == FAST or count <= arguments.plain_up_to]
            repeats = dict.fromkeys(asked, 0)
            seconds: dict[Any, list[float]] = {key: [] for key in asked}
            memory: dict[Any, int] = {}
            for key in asked:  # warms up, and tells how often there is time for it
                links[key].send(pairs[:count])
                elapsed, memory[key] = links[key].recv()
                repeats[key] = times(elapsed, arguments.seconds)
                if repeats[key] == 1:  # what warming up costs is little beside it
                    seconds[key].append(elapsed)
            with tqdm(total=sum(repeats.values()), desc=f"{count} candidates") as bar:
                while any(len(seconds[key]) < repeats[key] for key in asked):
                    for key in asked:
                        if len(seconds[key]) < repeats[key]:
                            links[key].send(pairs[:count])
                            elapsed, memory[key] = links[key].recv()
                            seconds[key].append(elapsed)
                            bar.update()
            for key in asked:
                cells.append(
                    {
                        "candidates": count,
                        "system": key[0],
                        "form": forms[key],
                        "threads": key[1],
                        "repeats": repeats[key],
                        "seconds": percentiles(seconds[key]),
                        "queries_per_second": len(seconds[key]) / sum(seconds[key]),
                        "resident_bytes": memory[key],
                    }
                )
    except EOFError:
        raise UserError("a process of the bench ended before its time; what it said stands above.") from None
    finally:
        for process in processes:  # before their links: one that saw its own close would say so in a traceback
            process.terminate()
            process.join()
        for link in links.values():
            link.close()
    command = command_line("recipes.bench.latency", arguments)
    return {"command": command, "facts": facts(to_dict(arguments)), "cells": cells}


def format_table(content: dict[str, Any]) -> str:
    """Return the cells as Markdown."""
    return table(
        [
            {
                "candidates": f"{cell['candidates']:,}",
                "threads": str(cell["threads"]),
                "system": f"{cell['system']} ({cell['form']})",
                **{
                    name: f"{1000 * value:.0f} ms" if name == "p50" or cell["repeats"] > 1 else ""
                    for name, value in cell["seconds"].items()
                },
                "queries/s": f"{cell['queries_per_second']:.2f}",
                "resident": f"{cell['resident_bytes'] / 2**20:.0f} MiB",
                "repeats": str(cell["repeats"]),
            }
            for cell in content["cells"]
        ]
    )


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw the median over the candidates, one line a system and number of threads."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in content["cells"]:
        name = f"{cell['system']}, {cell['threads']} thread{'s' * (cell['threads'] > 1)}"
        lines.setdefault(name, []).append((cell["candidates"], 1000 * cell["seconds"]["p50"]))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name, linestyle="--" if PLAIN in name else "-")
    axes.set(xscale="log", yscale="log", xlabel="candidates of a query", ylabel="median latency in ms")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure from the command line."""
    arguments = parse(LatencyArguments, __doc__)
    content = latency(arguments)
    plot(content, Path(arguments.output, "latency.png"))
    write_results(arguments.output, "latency", content, format_table(content))
    print(f"Next: look at {arguments.output}/latency.png.")


if __name__ == "__main__":
    run(main)
