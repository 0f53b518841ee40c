import json
import re
import sys

import pandas as pd
import pytest

from recipes.arguments import UserError
from recipes.data.bazaar import make_bazaar
from recipes.data.bazaar_rules import Ask, Offer, label
from recipes.schemas import COMPLETIONS, PAIRS, PERSPECTIVES, SPLITS, load_labels, read, write
from recipes.teacher.scripted import WORDS, complete, figures, main, prompt_hash
from recipes.teacher.scripted_views import business_rule, obscured, structured_analysis, user_intent

PHONE = Offer("smartphone", brand="Norvani", family="Aro", model="Aro 12", attributes={"colour": ("navy", "blue")})
CASE = Offer("phone case", host="smartphone", brand="Kabelin", fits_brand="Norvani", fits_models=("Aro 12",))


def never(probability):
    """See nothing that takes attention."""
    return False


def always(probability):
    return True


@pytest.fixture(scope="module")
def bazaar():
    frames = make_bazaar(2000, seed=3)
    return pd.concat([frames[split] for split in SPLITS], ignore_index=True), frames["structures"]


@pytest.fixture(scope="module")
def completions(bazaar):
    return complete(*bazaar)


def test_each_perspective_overlooks_its_own_things():
    wrong_model = Ask(("smartphone",), brand="Norvani", model="Aro 11")
    assert label(*user_intent(wrong_model, PHONE, "plain", False, never)) == "Strongly Relevant"
    assert label(*structured_analysis(wrong_model, PHONE, "plain", False, always)) == "Model Mismatch"
    assert label(*business_rule(wrong_model, PHONE, "plain", False, always)) == "Model Mismatch"
    a_phone = Ask(("smartphone",), brand="Norvani", model="Aro 12")
    assert label(*structured_analysis(a_phone, CASE, "plain", False, never)) == "Strongly Relevant"  # names the phone
    assert label(*business_rule(a_phone, CASE, "plain", False, always)) == "Accessory Mismatch"
    red = Ask(("smartphone",), attributes={"colour": "red"})
    assert label(*business_rule(red, PHONE, "plain", False, never)) == "Strongly Relevant"
    assert label(*structured_analysis(red, PHONE, "plain", False, always)) == "Attribute Mismatch"
    blue = Ask(("smartphone",), attributes={"colour": "blue"})
    assert label(*structured_analysis(blue, PHONE, "plain", False, never)) == "Attribute Mismatch"  # navy is not "blue"


@pytest.mark.parametrize("ask", [Ask(("smartphone",)), Ask(("tablet",)), Ask(("smartphone",), brand="Lumoro"),
                                 Ask(("smartphone",), brand="Norvani", model="Aro 11"),
                                 Ask(("smartphone",), attributes={"colour": "red"})])  # fmt: skip
@pytest.mark.parametrize("offer", [PHONE, CASE])
def test_an_obscured_pair_gets_another_label(ask, offer):
    if label(ask, offer) != "Strongly Relevant" or ask.attributes:
        assert label(*obscured(ask, offer)) != label(ask, offer)


def test_contract_order_and_fields(bazaar, completions, tmp_path):
    pairs, _ = bazaar
    stored = read(write(completions, tmp_path / "completions.parquet", COMPLETIONS), COMPLETIONS)
    assert len(stored) == 3 * len(pairs)
    assert tuple(stored["perspective"].head(3)) == PERSPECTIVES
    assert set(stored["predicted_label"]) == set(load_labels("aliexpress6").names)
    assert set(stored["model"]) == {"scripted-teacher"}
    assert json.loads(stored["sampling"][0])["seed"] == 0
    assert stored["parse_error"].isna().all()
    assert stored.groupby("perspective")["prompt_hash"].nunique().eq(1).all()
    assert len({prompt_hash(perspective) for perspective in PERSPECTIVES}) == 3


def test_text_is_a_raw_completion_whose_parts_are_the_columns(completions):
    for row in completions.head(300).itertuples():
        thought, answer = re.fullmatch(r"<think>(.*)</think>\n(.*)", row.text, flags=re.DOTALL).groups()
        assert thought == row.rationale
        assert json.loads(answer) == {"label": row.predicted_label}


def test_rationales_end_with_their_own_verdict_and_name_no_other(completions):
    names = load_labels("aliexpress6").names
    for row in completions.itertuples():
        assert row.rationale.endswith(f"{row.predicted_label}.")
        assert [name for name in names if name in row.rationale] == [row.predicted_label]


def test_wording(completions):
    lengths = completions["rationale"].str.split().str.len()
    assert lengths.between(*WORDS).all()
    assert completions["rationale"].nunique() / len(completions) > 0.95
    assert not completions["rationale"].str.contains(r"[{}]|\bNone\b", regex=True).any()


def test_perspectives_are_wrong_at_realistic_rates_and_together_better(bazaar, completions):
    rates = figures(completions, bazaar[0])
    for perspective in PERSPECTIVES:
        assert 0.65 < rates[perspective] < 0.85
    assert max(rates[perspective] for perspective in PERSPECTIVES) + 0.05 < rates["any of the three"] < 0.95


def test_the_teacher_never_reads_the_label(bazaar, completions):
    pairs, structures = bazaar
    other = pairs.assign(label="Strongly Relevant")
    pd.testing.assert_frame_equal(complete(other, structures), completions)


def test_samples_vary_in_wording_and_sometimes_in_verdict(bazaar):
    pairs, structures = bazaar
    several = complete(pairs.head(200), structures, samples=3)
    groups = several.groupby(["pair_id", "perspective"])
    assert (groups["rationale"].nunique() > 1).mean() > 0.95
    assert 0.02 < (groups["predicted_label"].nunique() > 1).mean() < 0.5
    first = several[several["sample_index"] == 0]["predicted_label"]
    assert list(first) == list(complete(pairs.head(200), structures)["predicted_label"])


def test_deterministic_by_seed(bazaar, completions):
    pairs, structures = bazaar
    pd.testing.assert_frame_equal(complete(pairs.head(50), structures), completions.head(150))
    assert not complete(pairs.head(50), structures, seed=1)["rationale"].equals(completions["rationale"].head(150))


def test_main_writes_completions_of_every_split(tmp_path, monkeypatch, capsys):
    frames = make_bazaar(100)
    for split in SPLITS:
        write(frames[split], tmp_path / f"{split}.parquet", PAIRS)
    monkeypatch.setattr(sys, "argv", ["scripted", "--pairs", str(tmp_path), "--output", str(tmp_path / "c.parquet")])
    with pytest.raises(UserError, match=r"structures\.parquet: no such file.*recipes\.teacher\.generate"):
        main()
    frames["structures"].to_parquet(tmp_path / "structures.parquet")
    main()
    assert len(read(tmp_path / "c.parquet", COMPLETIONS)) == 300
    assert "any of the three" in capsys.readouterr().out


def test_a_pair_without_structures_is_named(bazaar):
    pairs, structures = bazaar
    with pytest.raises(UserError, match="has no row in structures"):
        complete(pairs, structures.iloc[1:])


def test_bad_options(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripted", "--pairs", "x", "--output", "y", "--samples", "0"])
    with pytest.raises(UserError, match="samples: 0"):
        main()
