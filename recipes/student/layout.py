"""Lay out what recipes.student.tables collects: for the terminal in 100 columns, as markdown, and as plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.evaluate.report import difference_cell, format_table, mean_cell

METRICS = {"accuracy": "ACC", "macro_f1": "F1"}
NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
SLICES_AT_ONCE = 3  # what 100 columns hold
BASELINE_COLOR, COLOR = "#6b7280", "#1d4ed8"


def format_terminal(tables: Mapping[str, Any]) -> str:
    """Return every table in at most 100 columns."""
    parts = []
    for dataset, content in tables["datasets"].items():
        slices = list(content["systems"])
        for start in range(0, len(slices), SLICES_AT_ONCE):
            columns = [(dataset, name) for name in slices[start : start + SLICES_AT_ONCE]]
            parts.append(f"{dataset} {tables['split']}, × 100, mean ± sd over seeds".strip())
            parts.append(_accuracies(tables, columns, markdown=False))
    parts += [f"{title}\n\n{table}" for title, table in _further_tables(tables, markdown=False)]
    return "\n\n".join([*parts, _not_finished(tables)]) + "\n"


def format_markdown(tables: Mapping[str, Any]) -> str:
    """Return the tables as markdown: all datasets side by side in the first, with intervals."""
    columns = [(dataset, name) for dataset, content in tables["datasets"].items() for name in content["systems"]]
    parts = [
        f"# {tables['split'].capitalize()} split",
        "All × 100: mean ± sd over seeds; in brackets 95 % intervals over queries (bootstrap). p-values are the "
        "bootstrap's, after Holm. Metrics by locale with their differences: comparison*/table.md.",
        _accuracies(tables, columns, markdown=True),
        *(f"## {title}\n\n{table}" for title, table in _further_tables(tables, markdown=True)),
    ]
    return "\n\n".join([*parts, _not_finished(tables)]) + "\n"


def _accuracies(tables: Mapping[str, Any], columns: Sequence[tuple[str, str]], markdown: bool) -> str:
    several = len({dataset for dataset, _ in columns}) > 1
    header = ["system", "seeds"]
    for dataset, name in columns:
        label = "all" if name == "overall" else name
        header += [f"{f'{dataset} ' if several else ''}{label} {metric}" for metric in METRICS.values()]
    rows = []
    for title, systems in tables["blocks"].items():
        if title:
            rows.append([f"**{title}**" if markdown else f"{title}:", *[""] * (len(header) - 1)])
        for system in systems:
            costs = [tables["datasets"][dataset]["costs"][system] for dataset in dict.fromkeys(d for d, _ in columns)]
            if not any(cost["runs_planned"] for cost in costs):
                continue
            cells = [
                _cell(tables["datasets"][dataset]["systems"][name].get(system, {}).get(metric), markdown)
                for dataset, name in columns
                for metric in METRICS
            ]
            if all(cell == "-" for cell in cells):
                cells[0] = "failed" if _runs_of(system, tables["failed"]) else "not yet"
            seeds = [f"{cost['runs']}/{cost['runs_planned']}" for cost in costs]
            rows.append([system, ", ".join(dict.fromkeys(seeds)), *cells])
    return format_table(header, rows, markdown)


def _runs_of(system: str, names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    return [name for name in names if name.rpartition("/")[2].rpartition("-")[0] == system]


def _cell(result: Mapping[str, Any] | None, markdown: bool) -> str:
    if result is None:
        return "-"
    if markdown:
        return mean_cell(result).replace(" [", "<br>[")
    return mean_cell(result).partition(" [")[0]


def _further_tables(tables: Mapping[str, Any], markdown: bool) -> Iterator[tuple[str, str]]:
    """Yield title and text of each."""
    titles = [NAMES[metric] for metric in METRICS]
    for dataset, content in tables["datasets"].items():
        prefix = f"{dataset}: " if dataset else ""
        for baseline, comparison in content["comparisons"].items():
            results = comparison["slices"]["overall"]["differences"]
            rows = [[system, *(difference_cell(result[metric]) for metric in METRICS)]
                    for system, result in results.items()]  # fmt: skip
            if rows:
                yield (
                    f"{prefix}difference to {baseline} [95 % interval] p after Holm over {len(rows)}",
                    format_table(["system", *titles], rows, markdown),
                )
        rows = []
        for full, comparison in content["ablations"].items():
            overall = comparison["slices"]["overall"]
            rows.append([f"**{full}**" if markdown else full]
                        + [mean_cell(overall["systems"][full]["metrics"][metric]) for metric in METRICS])  # fmt: skip
            rows += [
                [f"{'' if markdown else '  '}{system}", *(difference_cell(result[metric]) for metric in METRICS)]
                for system in tables["arguments"]["ablations"][full]
                if (result := overall["differences"].get(system))
            ]
        if rows:
            title = f"{prefix}ablations: difference to the full system above them, p after Holm over its ablations"
            yield title, format_table(["system", *titles], rows, markdown)
        rows = [
            [
                system,
                f"{cost['runs']}/{cost['runs_planned']}",
                f"{cost['parameters'] / 1e6:.2f} M",
                f"{sum(cost['train_seconds']) / cost['runs'] / 60:.1f} min",
                f"{sum(cost['train_seconds']) / 3600:.2f} h",
            ]
            for system, cost in content["costs"].items()
            if cost["runs"]
        ]
        yield f"{prefix}what each costs", format_table(["system", "runs", "parameters", "a run", "all"], rows, markdown)


def _not_finished(tables: Mapping[str, Any]) -> str:
    lines = []
    if tables["failed"]:
        lines += ["Failed (tried again at the next start):", ""]
        lines += [f"- {name}: {_short(failure)}" for name, failure in tables["failed"].items()]
    if tables["unfinished"]:
        lines += [*([""] if lines else []), f"Not finished: {', '.join(tables['unfinished'])}."]
    return "\n".join(lines) or "Every run of the recipe is finished."


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plot_tables(tables: Mapping[str, Any], folder: Path) -> None:
    """Write differences-<baseline>.png, accuracy_f1.png and training_time.png into `folder`."""
    finished = {dataset: content for dataset, content in tables["datasets"].items() if content["systems"]}
    for baseline in dict.fromkeys(name for content in finished.values() for name in content["comparisons"]):
        _plot_differences(finished, baseline, folder / f"differences-{baseline}.png")
    _plot_accuracy_f1(finished, folder / "accuracy_f1.png")
    _plot_times(finished, folder / "training_time.png")


def _plot_differences(finished: Mapping[str, Any], baseline: str, path: Path) -> None:
    """Draw a forest plot: a panel a dataset and metric, a line a system."""
    from matplotlib.figure import Figure

    results = {
        dataset: content["comparisons"][baseline]["slices"]["overall"]["differences"]
        for dataset, content in finished.items()
        if baseline in content["comparisons"]
    }
    systems = list(dict.fromkeys(system for result in results.values() for system in result))
    if not systems:
        return
    panels = [(dataset, metric) for dataset in results for metric in METRICS]
    figure = Figure(figsize=(3.2 * len(panels) + 1.6, 0.36 * len(systems) + 1.5), layout="constrained")
    for axes, (dataset, metric) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for height, system in enumerate(systems):
            if system not in results[dataset]:
                continue
            result = results[dataset][system][metric]
            low, high = (100 * end for end in result["interval"])
            axes.hlines(height, low, high, color=COLOR, linewidth=2, alpha=0.55)
            filled = COLOR if result["p_holm"] < 0.05 else "white"
            axes.plot(100 * result["difference"], height, "o", color=COLOR, markerfacecolor=filled)
        axes.axvline(0, color=BASELINE_COLOR, linestyle=":", linewidth=1)
        _tidy(axes, f"{dataset} {NAMES[metric]}".strip())
        axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.5, -0.5)
    figure.supxlabel(
        f"Difference to {baseline} × 100, 95 % interval over queries. Filled: p < 0.05 after Holm.", fontsize=8
    )
    figure.savefig(path, dpi=150)


def _plot_accuracy_f1(finished: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(finished), 4.4), layout="constrained")
    for axes, (dataset, content) in zip(
        figure.subplots(1, len(finished), squeeze=False)[0], finished.items(), strict=True
    ):
        for system, metrics in content["systems"]["overall"].items():
            x, y = (100 * metrics[metric]["mean"] for metric in METRICS)
            seeds = [[100 * value for value in metrics[metric]["by_seed"]] for metric in METRICS]
            (line,) = axes.plot(x, y, "o")
            if len(seeds[0]) > 1:
                axes.plot(*seeds, ".", color=line.get_color(), alpha=0.5)
            axes.annotate(system, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
        _tidy(axes, dataset)
        axes.grid(axis="y", color="#e5e7eb")
        axes.margins(0.15)
        axes.set_xlabel("accuracy × 100")
        axes.set_ylabel("macro-F1 × 100 (small dots: seeds)")
    figure.savefig(path, dpi=150)


def _plot_times(finished: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    systems = list(
        dict.fromkeys(s for content in finished.values() for s in content["costs"] if content["costs"][s]["runs"])
    )
    figure = Figure(figsize=(4.2 * len(finished) + 1.6, 0.3 * len(systems) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(finished), sharey=True, squeeze=False)[0]
    for axes, (dataset, content) in zip(panels, finished.items(), strict=True):
        for height, system in enumerate(systems):
            seconds = content["costs"][system]["train_seconds"]
            if seconds:
                axes.barh(height, sum(seconds) / len(seconds) / 60, color=COLOR, alpha=0.7)
                axes.plot([value / 60 for value in seconds], [height] * len(seconds), ".", color="black", markersize=3)
        _tidy(axes, dataset)
        axes.set_yticks(range(len(systems)), systems)
        axes.set_xlabel("minutes a run (dots: seeds; an average: its members')")
    axes.set_ylim(len(systems) - 0.5, -0.5)
    figure.savefig(path, dpi=150)


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
