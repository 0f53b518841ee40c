import json
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score
from statsmodels.stats.multitest import multipletests

from recipes.arguments import UserError
from recipes.evaluate.compare import compare, main
from recipes.evaluate.metrics import evaluate_predictions, ranking_by_query
from recipes.evaluate.report import format_slice
from recipes.evaluate.runs import Run, list_runs
from recipes.evaluate.significance import (
    METRICS,
    QueryStatistics,
    bootstrap,
    bootstrap_p_value,
    exact_mcnemar,
    holm,
    metrics_of_draws,
    query_statistics,
)
from recipes.schemas import PREDICTIONS, load_labels, write

ESCI = load_labels("esci")


def make_table(seed, skill, queries=30):
    """Predictions on the same pairs for any `seed` and `skill`: only the probabilities differ."""
    pairs = np.random.default_rng(0)
    query = np.sort(pairs.integers(queries, size=4 * queries))
    gold = pairs.choice(4, p=[0.5, 0.3, 0.05, 0.15], size=len(query))
    noise = np.random.default_rng(seed).normal(size=(len(query), 4))
    logits = noise + skill * np.eye(4)[gold]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return pd.DataFrame(
        {
            "pair_id": [f"p{index}" for index in range(len(query))],
            "query": [f"q{index}" for index in query],
            "locale": np.where(query < queries // 3, "jp", "us"),
            "label": [ESCI.names[index] for index in gold],
            "predicted_label": [ESCI.names[index] for index in probabilities.argmax(axis=1)],
            "probabilities": list(probabilities),
        }
    )


def statistics_of(tables):
    query = tables[0].groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    gold = tables[0]["label"].map(ESCI.label2id).to_numpy()
    predicted = np.stack([table["predicted_label"].map(ESCI.label2id).to_numpy() for table in tables])
    ndcg = np.stack([ranking_by_query(table, ESCI)["ndcg"] for table in tables])
    return query_statistics(query, gold, predicted, ndcg, 4)


@pytest.fixture
def save(tmp_path):
    """Save predictions as one run's folder and return it."""

    def call(name, table):
        write(table, tmp_path / name / "predictions.parquet", PREDICTIONS)
        return tmp_path / name

    return call


@pytest.fixture
def systems(save):
    """A baseline and a better system, three seeds each, the rows of some runs in another order."""
    runs = []
    for system, skill in (("none", 0.8), ("gat", 1.6)):
        for seed in range(3):
            table = make_table(10 * seed + len(system), skill)
            folder = save(f"{system}-{seed}", table.sample(frac=1, random_state=seed) if seed else table)
            runs.append(Run(system, seed, folder / "predictions.parquet"))
    return runs


def test_the_metrics_of_the_whole_are_those_of_evaluate_run():
    tables = [make_table(seed, 1.0) for seed in range(3)]
    statistics = statistics_of(tables)
    observed = metrics_of_draws(np.ones((1, len(statistics.gold))), statistics)[0]
    for run, table in enumerate(tables):
        overall = evaluate_predictions(table, ESCI)["overall"]
        assert observed[:, run] == pytest.approx([overall[metric] for metric in METRICS])


def test_a_draw_is_the_metrics_of_its_rows():
    """Against a literal bootstrap: the rows of the drawn queries are copied out and scored by scikit-learn."""
    table = make_table(1, 1.0, queries=8)
    table.loc[0, "label"] = "Complement"  # the only one, so that some draws lack the class
    statistics = statistics_of([table])
    rows_of = list(table.groupby(["locale", "query"], sort=False).indices.values())
    by_query = ranking_by_query(table, ESCI)["ndcg"]
    gold, predicted = table["label"].to_numpy(), table["predicted_label"].to_numpy()
    generator = np.random.default_rng(5)
    some_draw_lacks_a_class = False
    for _ in range(30):
        drawn = generator.integers(len(rows_of), size=len(rows_of))
        rows = np.concatenate([rows_of[query] for query in drawn])
        present = sorted(set(gold[rows]))
        some_draw_lacks_a_class |= len(present) < len(set(gold))
        expected = [
            accuracy_score(gold[rows], predicted[rows]),
            f1_score(gold[rows], predicted[rows], labels=present, average="macro", zero_division=0),
            np.nanmean(by_query[drawn]),
        ]
        times_taken = np.bincount(drawn, minlength=len(rows_of)).astype(float)
        assert metrics_of_draws(times_taken[None], statistics)[0, :, 0] == pytest.approx(expected)
    assert some_draw_lacks_a_class


def test_bootstrap_intervals_agree_with_a_slow_literal_bootstrap():
    statistics = statistics_of([make_table(1, 1.0), make_table(2, 1.3)])
    fast = np.concatenate(list(bootstrap(statistics, 4000, seed=0)))
    generator = np.random.default_rng(99)
    queries = len(statistics.gold)
    slow = np.stack(
        [
            metrics_of_draws(
                np.bincount(generator.integers(queries, size=queries), minlength=queries)[None] * 1.0, statistics
            )[0]
            for _ in range(2000)
        ]
    )
    for quantile in (0.025, 0.5, 0.975):
        np.testing.assert_allclose(np.quantile(fast, quantile, axis=0), np.quantile(slow, quantile, axis=0), atol=0.012)


def test_bootstrap_is_seeded_and_draws_queries_with_all_their_rows():
    statistics = statistics_of([make_table(1, 1.0)])
    first, again, other = (np.concatenate(list(bootstrap(statistics, 700, seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (700, len(METRICS), 1)
    assert not np.array_equal(first, other)
    # One query: every draw is the whole, so there is nothing to be uncertain about.
    alone = statistics.select(np.arange(len(statistics.gold)) == 0)
    assert np.ptp(np.concatenate(list(bootstrap(alone, 100, 0))), axis=0).max() == 0


def test_rows_of_one_query_widen_the_interval():
    """Ten copies of each row, kept in the query, are no new evidence: the interval stays as wide."""
    table = make_table(1, 1.0)
    copies = pd.concat([table] * 10, ignore_index=True)
    widths = []
    for rows in (table, copies.assign(pair_id=[f"c{index}" for index in range(len(copies))])):
        draws = np.concatenate(list(bootstrap(statistics_of([rows]), 1000, seed=0)))[:, 0, 0]
        widths.append(np.ptp(np.quantile(draws, [0.025, 0.975])))
    assert widths[1] == pytest.approx(widths[0])


def test_bootstrap_intervals_cover_the_truth():
    """95 % intervals of 200 samples hold the true accuracy in 90 to 99 % of them."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        skill_of_query = generator.beta(3, 2, size=60)  # true accuracy 0.6, rows of a query correlated
        correct = generator.binomial(5, skill_of_query)
        gold = np.full((60, 1), 5.0)
        counts = correct[:, None, None].astype(float)
        statistics = QueryStatistics(gold, counts, counts, np.ones((60, 1)))
        low, high = np.quantile(np.concatenate(list(bootstrap(statistics, 500, 0)))[:, 0, 0], [0.025, 0.975])
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 198


def test_p_values_of_the_bootstrap():
    assert bootstrap_p_value(np.zeros(100)) == 1
    assert bootstrap_p_value(np.full(99, 1e-15)) == 1  # a rounding error is no difference
    assert bootstrap_p_value(np.full(99, 0.1)) == 2 / 100
    assert bootstrap_p_value(np.array([0.1] * 97 + [-0.1] * 2)) == pytest.approx(2 * 3 / 100)
    assert bootstrap_p_value(np.array([-0.1] * 97 + [0.1, np.nan, 0.1])) == pytest.approx(2 * 3 / 100)


def test_mcnemar_is_the_binomial_test_on_the_discordant_pairs():
    right = np.array([True] * 9 + [False] * 2 + [True] * 40 + [False] * 30)
    baseline = np.array([False] * 9 + [True] * 2 + [True] * 40 + [False] * 30)
    assert exact_mcnemar(right, baseline) == pytest.approx(binomtest(2, 11, 0.5).pvalue)
    assert exact_mcnemar(right, baseline) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert exact_mcnemar(right, right) == 1


def test_holm_never_reorders_and_never_lowers():
    p_values = np.random.default_rng(0).uniform(0, 0.2, size=8)
    adjusted = np.array(holm(p_values))
    assert (adjusted >= p_values).all()
    assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()
    assert adjusted == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_a_better_system_is_found_and_differences_are_paired(systems):
    result = compare(systems, "none", ESCI, 1000, 0)
    assert set(result["slices"]) == {"overall", "jp", "us"}
    overall = result["slices"]["overall"]
    assert overall["pairs"] == sum(result["slices"][locale]["pairs"] for locale in ("jp", "us"))
    for metric in METRICS:
        means = [overall["systems"][system]["metrics"][metric] for system in ("gat", "none")]
        difference = overall["differences"]["gat"][metric]
        assert difference["difference"] == pytest.approx(means[0]["mean"] - means[1]["mean"])
        low, high = difference["interval"]
        assert low < difference["difference"] < high
        assert means[0]["sd"] == pytest.approx(np.std(means[0]["by_seed"], ddof=1))
        assert means[0]["interval"][0] < means[0]["mean"] < means[0]["interval"][1]
    assert overall["differences"]["gat"]["accuracy"]["p_holm"] < 0.01
    # Each seed against the same seed, then twice the median.
    mcnemar = overall["differences"]["gat"]["mcnemar"]
    assert set(mcnemar["by_seed"]) == {0, 1, 2}
    assert mcnemar["p"] == pytest.approx(2 * sorted(mcnemar["by_seed"].values())[1])


def test_identical_systems_do_not_differ(systems):
    twin = [Run("twin", run.seed, run.predictions) for run in systems if run.system == "gat"]
    for values in compare([*systems, *twin], "gat", ESCI, 300, 0)["slices"].values():
        for metric in METRICS:
            result = values["differences"]["twin"][metric]
            assert (result["difference"], result["p"]) == (0, 1)
            assert result["interval"] == pytest.approx((0, 0), abs=1e-12)
        assert values["differences"]["twin"]["mcnemar"]["p"] == 1


def test_the_order_of_rows_and_of_runs_changes_nothing(systems, save):
    runs = [run for run in systems if run.seed == 0]
    shuffled = [
        Run(
            run.system,
            0,
            save(f"shuffled-{run.system}", pd.read_parquet(run.predictions).sample(frac=1)) / "predictions.parquet",
        )
        for run in reversed(runs)
    ]
    first, second = (compare(given, "none", ESCI, 4000, 0)["slices"]["overall"] for given in (runs, shuffled))
    for metric in METRICS:
        a, b = (values["systems"]["gat"]["metrics"][metric] for values in (first, second))
        assert a["mean"] == pytest.approx(b["mean"])
        # The queries are numbered in another order, so the draws differ, and with them the interval, a little.
        assert a["interval"] == pytest.approx(b["interval"], abs=0.01)
    assert first["differences"]["gat"]["mcnemar"] == second["differences"]["gat"]["mcnemar"]


def test_seeds_without_a_partner_are_left_out_of_mcnemar(systems):
    overall = compare(systems[1:4], "none", ESCI, 100, 0)["slices"]["overall"]  # none: 1 and 2; gat: 0
    assert "mcnemar" not in overall["differences"]["gat"]
    assert overall["systems"]["gat"]["metrics"]["accuracy"]["sd"] is None


def test_no_gain_anywhere_leaves_ndcg_out(save):
    runs = [
        Run(name, 0, save(name, make_table(seed, 1.0).assign(label="Irrelevant")) / "predictions.parquet")
        for seed, name in enumerate(("a", "b"))
    ]
    result = compare(runs, "a", ESCI, 100, 0)
    assert set(result["slices"]["overall"]["systems"]["a"]["metrics"]) == {"accuracy", "macro_f1"}
    assert "nDCG" not in format_slice("overall", result, markdown=False)


def test_the_verb_writes_a_table_a_picture_and_json(systems, tmp_path, monkeypatch, capsys):
    lines = [
        {
            "system": run.system if run.system == "none" else "a-system-with-a-very-long-name-indeed",
            "seed": run.seed,
            "predictions": run.predictions.parent.name,
            "minutes": 3,
        }
        for run in systems
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    argv = f"compare --runs_file {tmp_path}/runs.jsonl --baseline none --draws 200 --output {out}"
    monkeypatch.setattr(sys, "argv", argv.split())
    main()
    result = json.loads((out / "compare.json").read_text())
    assert result["slices"]["overall"]["systems"]["none"]["seeds"] == [0, 1, 2]
    assert "family" in result["holm_family"]
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "table.md").read_text()
    assert "| a-system-with-a-very-long-name-indeed | 3 " in markdown
    assert [line for line in markdown.splitlines() if line.startswith("## ")][1].startswith("## jp")
    table = capsys.readouterr().out.split("\nWrote")[0]
    assert "a-system-" in table
    assert max(map(len, table.splitlines())) <= 100


def test_runs_by_wildcard_take_their_recorded_seed(systems, tmp_path):
    for seed in (0, 1, 2):
        (tmp_path / f"gat-{seed}" / "metrics.json").write_text(json.dumps({"facts": {"seed": 41 + seed}}))
    runs = list_runs([f"gat={tmp_path}/gat-*", f"none={tmp_path}/none-2/predictions.parquet"], None)
    assert [(run.system, run.seed) for run in runs] == [("gat", 41), ("gat", 42), ("gat", 43), ("none", 0)]
    assert runs[0].predictions == tmp_path / "gat-0" / "predictions.parquet"


def test_predictions_of_other_pairs_are_refused(systems, save):
    table = make_table(1, 1.0)
    fewer = Run("fewer", 0, save("fewer", table.drop(index=17)) / "predictions.parquet")
    with pytest.raises(UserError, match=r"fewer/predictions.parquet: pair 'p17' is missing, which .*none-0.*1 such"):
        compare([*systems, fewer], "none", ESCI, 100, 0)
    with pytest.raises(UserError, match=r"fewer/predictions.parquet: pair 'p17' is missing, which .*none-0"):
        compare([fewer, *systems], "fewer", ESCI, 100, 0)


@pytest.mark.parametrize(("column", "value"), [("label", "Complement"), ("query", "other"), ("locale", "fr")])
def test_predictions_of_other_labels_or_queries_are_refused(systems, save, column, value):
    table = make_table(1, 1.0)
    table.loc[4, "label"] = "Exact" if column == "label" else table.loc[4, "label"]
    table.loc[5, column] = value
    other = Run("other", 0, save("other", table) / "predictions.parquet")
    with pytest.raises(UserError, match=rf"other/predictions.parquet: pair 'p\d': {column} is .*none-0.* has"):
        compare([*systems, other], "none", ESCI, 100, 0)


def test_probabilities_that_do_not_sum_to_one_are_refused(systems, save):
    table = make_table(1, 1.0)
    table["probabilities"] = [row * 2 for row in table["probabilities"]]
    other = Run("other", 0, save("other", table) / "predictions.parquet")
    with pytest.raises(UserError, match=r"other/predictions.parquet: row 0 .*sums to 2"):
        compare([*systems, other], "none", ESCI, 100, 0)


def test_runs_that_cannot_be_compared(systems, tmp_path):
    with pytest.raises(UserError, match=r"--baseline typo: .*none, gat"):
        compare(systems, "typo", ESCI, 100, 0)
    with pytest.raises(UserError, match="at least two systems"):
        compare(systems[:3], "none", ESCI, 100, 0)
    with pytest.raises(UserError, match="--draws 5"):
        compare(systems, "none", ESCI, 5, 0)
    with pytest.raises(UserError, match="expected NAME=DIR"):
        list_runs(["runs/gat"], None)
    with pytest.raises(UserError, match=r"nothing: no such file\. Expected predictions"):
        compare([*systems, *list_runs([f"x={tmp_path}/nothing"], None)], "none", ESCI, 100, 0)
    (tmp_path / "runs.jsonl").write_text('{"system": "gat", "seed": 1, "predictions": "gat-1"}\n{"system": "gat"}\n')
    with pytest.raises(UserError, match=r"line 2: not a run .*predictions"):
        list_runs([], str(tmp_path / "runs.jsonl"))
    (tmp_path / "runs.jsonl").write_text('{"system": "gat", "seed": 1, "predictions": "gat-1"}\n' * 2)
    with pytest.raises(UserError, match=r"system 'gat' with seed 1 is already given"):
        list_runs([], str(tmp_path / "runs.jsonl"))
