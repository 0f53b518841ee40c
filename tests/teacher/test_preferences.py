"""Preference pairs: the conflict set of eq. 4, which side comes from where, lengths, and the reward."""

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.arguments import UserError
from recipes.schemas import PREFERENCES, load_labels, read
from recipes.teacher.parse import parse_completion
from recipes.teacher.preferences import PreferencesArguments, length_report, prefer
from recipes.teacher.reward import brevity, count_words, faithfulness, reward, rule_adherence
from tests.teacher.test_sft_data import VERDICTS, completions_of, save

ESCI = load_labels("esci")


@pytest.fixture
def options(tmp_path):
    save(tmp_path, completions_of())
    return {
        "pairs": str(tmp_path / "pairs"),
        "completions": [str(tmp_path / "completions.parquet")],
        "output": str(tmp_path / "preferences.parquet"),
        "labels": "esci",
    }


def sides(row):
    return [parse_completion(turns[0]["content"], ESCI) for turns in (row.chosen, row.rejected)]


def test_each_failing_perspective_of_the_conflict_set_gives_one_pair(options):
    """`a` is right throughout and `d` wrong throughout: neither can be in a pair."""
    frame = prefer(PreferencesArguments(**options))
    assert list(zip(frame["pair_id"], frame["rejected_perspective"])) == [
        ("b", "user_intent"),
        ("b", "structured_analysis"),
        ("c", "user_intent"),
        ("c", "structured_analysis"),
        ("c", "business_rule"),
    ]
    for row in read(options["output"], PREFERENCES).itertuples():
        chosen, rejected = sides(row)
        assert chosen.predicted_label == VERDICTS[row.pair_id][0] != rejected.predicted_label
        assert chosen.rationale.startswith(f"{row.chosen_perspective} of {row.pair_id}")
        assert rejected.rationale.startswith(f"{row.rejected_perspective} of {row.pair_id}")


def test_a_pass_beyond_the_first_n_is_not_looked_at(options):
    frame = prefer(PreferencesArguments(**options, passes=1))
    assert set(frame["pair_id"]) == {"b", "c"}
    assert len(frame) == 3  # b: structured analysis; c: the other two


def test_single_stays_within_its_perspective(options):
    frame = prefer(PreferencesArguments(**options, select="single", perspective="user_intent"))
    assert list(frame["pair_id"]) == ["b"]
    assert set(frame["chosen_perspective"]) == set(frame["rejected_perspective"]) == {"user_intent"}


def test_the_draw_depends_on_the_seed_alone(options, tmp_path):
    first = prefer(PreferencesArguments(**options)).to_json()
    save(tmp_path, completions_of().sample(frac=1, random_state=3))
    assert prefer(PreferencesArguments(**options)).to_json() == first
    others = [prefer(PreferencesArguments(**options, seed=seed)).to_json() for seed in range(1, 6)]
    assert any(other != first for other in others)


def test_an_empty_conflict_set_is_one_clear_error(options, tmp_path):
    agreed = {pair: VERDICTS[pair] for pair in ("a", "d")}
    save(tmp_path, completions_of(agreed), agreed)
    with pytest.raises(
        UserError, match="conflict set is empty: of 2 pairs with 12 completions, 1 are right throughout"
    ):
        prefer(PreferencesArguments(**options))
    assert not (tmp_path / "preferences.parquet").exists()


def test_sizes_match(options, tmp_path):
    single = {**options, "output": str(tmp_path / "single.parquet")}
    prefer(PreferencesArguments(**single, select="single", perspective="user_intent"))
    assert len(prefer(PreferencesArguments(**options, same_size_as=single["output"]))) == 1
    with pytest.raises(UserError, match="6 preference pairs are wanted and 5 are there"):
        prefer(PreferencesArguments(**options, size=6))


def test_balancing_takes_the_closest_of_all_choices(options, tmp_path):
    completions = completions_of()
    completions["rationale"] += [" word" * (7 * number % 11) for number in range(len(completions))]
    save(tmp_path, completions)
    frame = prefer(PreferencesArguments(**options, balance_lengths=True))
    completions["words"] = completions["rationale"].map(count_words)
    completions["right"] = [VERDICTS[row.pair_id][0][0] == row.predicted_label for row in completions.itertuples()]
    closest = []
    for row in frame.itertuples():
        group = completions[completions["pair_id"] == row.pair_id]
        wrong = group[~group["right"] & (group["perspective"] == row.rejected_perspective)]
        closest.append(min(abs(a - b) for a in group[group["right"]]["words"] for b in wrong["words"]))
        chosen, rejected = sides(row)
        assert abs(count_words(chosen.rationale) - count_words(rejected.rationale)) == closest[-1]
    report = json.loads((tmp_path / "preferences.parquet.report.json").read_text())
    assert report["lengths"]["mean_absolute_difference"] == round(sum(closest) / len(closest), 2)
    assert len(frame) == 5


def test_the_length_report_by_hand():
    chosen, rejected = pd.Series(["a b c", "a", "a b"]), pd.Series(["a", "a b c d", "a b"])
    assert length_report(chosen, rejected, count_words) == {
        "chosen": 2.0,
        "rejected": 2.3,
        "mean_difference": -0.33,
        "mean_absolute_difference": 1.67,
        "chosen_longer": pytest.approx(1 / 3),
        "chosen_shorter": pytest.approx(1 / 3),
    }


def test_by_reward_the_faithful_one_is_chosen_and_a_wrong_one_never(options, tmp_path):
    completions = completions_of()
    faithful = (completions["perspective"] == "user_intent") & (completions["sample_index"] == 0)
    completions["rationale"] = "The Zenit 3000 is " + "quite " * 15 + "fine."
    query = "query " + completions["pair_id"]
    completions.loc[faithful, "rationale"] = query + " and title agree" + " on every point that matters" * 3
    save(tmp_path, completions)
    frame = prefer(PreferencesArguments(**options, select="reward"))
    assert list(frame["pair_id"]) == ["a", "b", "c"]  # d has no right completion
    by_pair = frame.set_index("pair_id")
    assert by_pair["chosen_perspective"]["a"] == by_pair["chosen_perspective"]["b"] == "user_intent"
    a_chosen, a_rejected = sides(by_pair.loc["a"])
    assert a_chosen.predicted_label == a_rejected.predicted_label == "Exact"  # both right; one invents
    with pytest.raises(UserError, match="nothing to prefer"):
        prefer(PreferencesArguments(**options, select="reward", min_margin=2.0))


@pytest.mark.parametrize(
    ("rationale", "query", "title", "expected"),
    [
        ("usb charger for aro 12 phones", "aro 12", "usb charger", 1.0),
        ("usb charger, nothing else", "aro 12", "usb charger", 0.5),
        ("usb charger of 45 watts for aro 12", "aro 12", "usb charger", 0.5),  # of "12" and "45", one is there
        ("the “wireless” usb charger for aro 12", "aro 12", "usb charger", 0.5),
        ("互換性のあるケース", "スマホケース", "ケース 黒", 1.0),
        ("", "aro 12", "usb charger", 0.0),
    ],
)
def test_faithfulness_by_hand(rationale, query, title, expected):
    assert faithfulness(rationale, query, title) == expected


def test_a_label_name_is_no_claim():
    text = "usb charger for aro 12, hence a Brand Mismatch"
    assert faithfulness(text, "aro 12", "usb charger") < 1
    assert faithfulness(text, "aro 12", "usb charger", ["Brand Mismatch"]) == 1


@given(st.text(), st.text(), st.text(), st.sampled_from([*ESCI.names, None]))
def test_every_dimension_is_a_share(rationale, query, title, label):
    from recipes.teacher.books import load_rules

    scores = {
        "faithfulness": faithfulness(rationale, query, title, ESCI.names),
        "rules": rule_adherence(rationale, label, load_rules("esci", ESCI)),
        "brevity": brevity(rationale),
    }
    assert all(0 <= score <= 1 for score in scores.values())
    assert min(scores.values()) <= reward(scores, dict.fromkeys(scores, 2.0)) + 1e-9
    assert reward(scores, dict.fromkeys(scores, 2.0)) <= max(scores.values()) + 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [({"passes": 0}, "passes"), ({"label_weight": -1.0}, "weights"), ({"splits": ["test"]}, "for measuring")],
)
def test_mistakes_are_named(options, change, message):
    with pytest.raises(UserError, match=message):
        prefer(PreferencesArguments(**{**options, **change}))
