"""Time things side by side: in rounds, so that a machine that drifts drifts for all of them alike."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from recipes.record import environment, write_json

RESULTS = "recipes/results"
DRAWS = 2000
LEAST_ROUNDS = 3  # fewer tell nothing of how far a ratio varies


def interleave(
    variants: Mapping[str, Callable[[], Any]], rounds: int, description: str, patience: float = math.inf
) -> dict[str, list[float]]:
    """Time each variant once a round, each round beginning with another one; a round before that warms up.

    Args:
        variants: What is timed, by name.
        rounds: How often.
        description: Of the progress bar.
        patience: Seconds after which no further round begins; `LEAST_ROUNDS` are always run, if `rounds` allows.

    Returns:
        Seconds of each round, by variant.
    """
    from tqdm import tqdm

    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begun = time.perf_counter()
    with tqdm(total=(rounds + 1) * len(names), desc=description, unit="run") as bar:
        for number in range(-1, rounds):
            if number == 0:
                begun = time.perf_counter()
            if number >= LEAST_ROUNDS and time.perf_counter() - begun > patience:
                break
            for position in range(len(names)):
                name = names[(position + max(number, 0)) % len(names)]
                started = time.perf_counter()
                variants[name]()
                elapsed = time.perf_counter() - started
                if number >= 0:
                    seconds[name].append(elapsed)
                bar.update()
    return seconds


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99.

    >>> percentiles([1.0, 2.0, 3.0])["p50"]
    2.0
    """
    import numpy as np

    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, and its 95 % bootstrap interval.

    >>> paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 2.0, 'high': 2.0}
    """
    import numpy as np

    ratios = np.asarray(numerator) / np.asarray(denominator)
    draws = np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def show_ratio(ratio: Mapping[str, float]) -> str:
    """Write a ratio with its interval, which one round does not have.

    >>> show_ratio({"median": 6.21, "low": 6.0, "high": 6.5})
    '6.21 [6.00, 6.50]'
    >>> show_ratio({"median": 6.21, "low": 6.21, "high": 6.21})
    '6.21'
    """
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def show_overhead(ratio: Mapping[str, float]) -> str:
    """Write a ratio as what comes on top, in per cent.

    >>> show_overhead({"median": 1.01, "low": 0.99, "high": 1.02})
    '+1.0 % [-1.0, +2.0]'
    """
    median, low, high = (100 * (ratio[name] - 1) for name in ("median", "low", "high"))
    return f"{median:+.1f} % [{low:+.1f}, {high:+.1f}]"


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Measure what a block takes on top of what was resident before it, looking every millisecond; in bytes.

    On a GPU: the most that torch had allocated, weights included, exactly.
    """
    import torch

    result: dict[str, int] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield result
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        return
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what an earlier block freed would be used again, uncounted
    before, peak, done = resident_bytes(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_bytes())
        peak = max(peak, resident_bytes())  # the block's last moments, for which a busy machine left no time

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
    result["peak_bytes"] = max(0, peak - before)


def facts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result needs to be traced: machine, versions, options, date."""
    packages = ("onnxruntime", "openvino", "nncf", "tokenizers")
    found = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    machine = environment()
    machine["packages"] |= found
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "environment": machine,
        # Of a path only its last name: the rest is this machine's.
        "arguments": {key: Path(v).name if isinstance(v, str) and "/" in v else v for key, v in arguments.items()},
    }


def emulated(precisions: Mapping[str, str], flags: Collection[str]) -> dict[str, str]:
    """Return which of these are not worth timing on a CPU with these flags, and why.

    Args:
        precisions: Precision of each system or setting, by its name.
        flags: Of the CPU (`recipes.serve.plan.cpu_flags`).

    >>> emulated({"sdpa-float32": "float32", "sdpa-bfloat16": "bfloat16"}, {"avx2"})
    {'sdpa-bfloat16': 'this CPU has no instructions for bfloat16'}
    """
    from recipes.serve.plan import multiplied

    able = multiplied(flags)
    return {
        name: f"this CPU has no instructions for {which}" for name, which in precisions.items() if which not in able
    }


def show_left_out(left_out: Mapping[str, str]) -> str:
    r"""Write what was left out and why, as a paragraph behind a table; nothing if nothing was.

    >>> show_left_out({"A": "it takes hours", "B": "it takes hours", "C": "nobody asked"})
    '\n\nLeft out: A, B (it takes hours); C (nobody asked).'
    """
    if not left_out:
        return ""
    reasons = dict.fromkeys(left_out.values())
    parts = [f"{', '.join(name for name in left_out if left_out[name] == why)} ({why})" for why in reasons]
    return f"\n\nLeft out: {'; '.join(parts)}."


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Write rows as a Markdown table, its columns those of the first.

    >>> print(table([{"a": "1", "b": "2"}]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    columns = list(rows[0])
    lines = [columns, *([row[name] for name in columns] for row in rows)]
    written = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([written[0], "|" + "---|" * len(columns), *written[1:]])


def write_results(output: str | Path, name: str, content: dict[str, Any], text: str) -> None:
    """Write `<output>/<name>.json` and `.md`, the table headed by the machine and the command, and print it."""
    machine = content["facts"]["environment"]
    packages = machine["packages"]
    libraries = [item for item in ("torch", "transformers", "onnxruntime", "openvino") if item in packages]
    versions = ", ".join(f"{item} {packages[item]}" for item in libraries)
    head = f"{machine['accelerator'] or machine['cpu']}, {content['facts']['cores']} cores, {versions}"
    page = f"# {name}\n\n`{content['command']}`\n\n{head}. {content['facts']['date']}.\n\n{text}\n"
    write_json(Path(output, f"{name}.json"), content)
    Path(output, f"{name}.md").write_text(page, encoding="utf-8")
    print(f"\n{text}\n\nWrote {output}/{name}.json and {name}.md.")
