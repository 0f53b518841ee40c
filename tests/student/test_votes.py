"""The teacher's votes as soft labels: counted, weighed, and learnt from by any student."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.arguments import UserError
from recipes.schemas import RATIONALES, read, read_pairs, write
from recipes.student.distill import DistillArguments, distill
from recipes.student.votes import count_votes, vote_divergence


def test_votes_by_hand():
    votes, logits = torch.tensor([[2.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(3)], [5.0, -5.0]])
    teacher, student = (2.5 / 4, 1.5 / 4), (0.25, 0.75)
    expected = sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))
    torch.testing.assert_close(vote_divergence(votes, logits), torch.tensor([expected, 0.0]))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(any))
def test_no_student_is_nearer_to_the_votes_than_their_own_shares(counts):
    votes = torch.tensor([counts], dtype=torch.float32)
    shares = (votes + 0.5) / (votes + 0.5).sum()
    logits = shares.log().requires_grad_()
    divergence = vote_divergence(votes, logits).sum()
    divergence.backward()
    assert divergence.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-6, rtol=0)


def test_verdicts_are_counted_by_pair():
    rationales = pd.DataFrame(
        {"pair_id": ["a", "a", "b", "a", "c"], "predicted_label": ["y", "x", None, "y", "x"]},
    )
    votes = count_votes(rationales, {"x": 0, "y": 1})
    assert {name: vote.tolist() for name, vote in votes.items()} == {"a": [1, 2], "c": [1, 0]}


@pytest.fixture
def voted(options, workspace):
    """Options of students that hear a teacher who calls half of the training pairs, of every class, irrelevant."""
    train = read_pairs(workspace / "pairs", ("train",))["train"]
    train = train[train.index // 4 % 2 == 0]
    rationales = train.assign(perspective="unified", rationale="no", predicted_label="I")
    write(rationales, workspace / "votes.parquet", RATIONALES)
    return {**options, "votes": str(workspace / "votes.parquet")}


@pytest.mark.parametrize("system", [{}, {"extractor_type": "none"}, {"extractor_type": "none", "rival": "mkd"}])
def test_every_student_hears_the_votes(voted, workspace, system):
    heard = distill(DistillArguments(**voted, **system, vote_weight=50.0))
    assert heard["voted_rows"] == 32
    assert all("vote_loss" in line for line in heard["log"] if "loss" in line)
    # The vote outweighs three labels of four.
    assert heard["validation"]["accuracy"] == pytest.approx(0.25)
    without = {name: value for name, value in voted.items() if name != "votes"}
    alone = distill(DistillArguments(**{**without, "output": str(workspace / "alone")}, **system))
    assert alone["validation"]["nll"] < heard["validation"]["nll"]  # wrong votes: the labels are worth more
    assert not any("vote_loss" in line for line in alone["log"])


def test_votes_are_part_of_what_a_student_is(voted):
    distill(DistillArguments(**voted, vote_weight=1.0))
    with pytest.raises(UserError, match=r"vote_weight"):
        distill(DistillArguments(**voted, vote_weight=2.0))
    rationales = read(voted["votes"], RATIONALES)
    write(rationales.assign(predicted_label="E"), voted["votes"], RATIONALES)
    with pytest.raises(UserError, match=r"votes"):
        distill(DistillArguments(**voted, vote_weight=1.0))


def test_bad_votes(voted, workspace):
    with pytest.raises(UserError, match=r"vote_weight is 0.0 and votes '.*votes.parquet': give both, or neither"):
        distill(DistillArguments(**voted))
    with pytest.raises(UserError, match=r"vote_weight is 1\.0 and votes None: give both, or neither"):
        distill(DistillArguments(**{**voted, "votes": None}, vote_weight=1.0))
    with pytest.raises(UserError, match="vote_weight: expected 0 or more"):
        distill(DistillArguments(**voted, vote_weight=-1.0))
    rationales = read(voted["votes"], RATIONALES)
    for changes, message in (
        ({"predicted_label": "perfect"}, r"row 0, column 'predicted_label': label 'perfect' is not in the schema"),
        ({"predicted_label": None}, r"no verdict \(column predicted_label\) about a pair"),
        ({"pair_id": [f"other-{n}" for n in range(32)]}, r"no verdict \(column predicted_label\) about a pair"),
    ):
        write(rationales.assign(**changes), workspace / "bad.parquet", RATIONALES)
        with pytest.raises(UserError, match=message):
            distill(DistillArguments(**{**voted, "votes": str(workspace / "bad.parquet")}, vote_weight=1.0))
    assert not (workspace / "student").exists()
