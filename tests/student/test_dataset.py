import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel

from recipes.student.dataset import (
    LengthBucketSampler,
    PairCollator,
    PairDataset,
    mean_embeddings,
    perspective_embeddings,
    positions_of,
)
from tests.tiny import random_batch, tiny_config, tiny_tokenizer

LABEL2ID = {"Exact": 0, "Irrelevant": 1}


def pairs():
    return pd.DataFrame(
        {
            "pair_id": ["a", "b", "c"],
            "query": ["ab", "a", "🎧 ｆｕｌｌ auriculares"],
            "product_title": ["c", "c", "イヤホン " + "x" * 300],
            "label": ["Exact", "Irrelevant", "Exact"],
        }
    )


def test_rationales_of_a_pair_are_averaged():
    frame = pd.DataFrame(
        {
            "pair_id": ["b", "a", "b"],
            "cot_embedding": [np.array([0.0, 2.0]), np.array([1.0, 1.0]), np.array([4.0, 0.0])],
        }
    )
    means = mean_embeddings(frame)
    assert {name: vector.tolist() for name, vector in means.items()} == {"b": [2.0, 1.0], "a": [1.0, 1.0]}
    assert means["a"].dtype == np.float32


def test_a_batch():
    dataset = PairDataset(pairs(), tiny_tokenizer(), LABEL2ID, max_length=128, embeddings={"b": np.ones(2, "float32")})
    batch = PairCollator(tiny_tokenizer())([dataset[0], dataset[1]])
    vocabulary = tiny_tokenizer().get_vocab()
    a, b, c = vocabulary["a"], vocabulary["##b"], vocabulary["c"]
    assert batch["input_ids"].tolist() == [[2, a, b, 3, c, 3], [2, a, 3, c, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["cot_embeddings"].tolist() == [[0, 0], [1, 1]]
    assert batch["cot_mask"].tolist() == [0, 1]


def test_without_rationales_there_are_no_embeddings():
    batch = PairCollator(tiny_tokenizer())([PairDataset(pairs(), tiny_tokenizer(), LABEL2ID, max_length=128)[0]])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_a_long_title_is_cut_and_any_script_is_taken():
    dataset = PairDataset(pairs(), tiny_tokenizer(), LABEL2ID, max_length=16)
    assert dataset.lengths.max() == 16
    assert dataset[2]["input_ids"][-1] == 3  # the closing [SEP] survives the cut


def test_longest_first():
    dataset = PairDataset(pairs(), tiny_tokenizer(), LABEL2ID, max_length=64, sort_by_length=True)
    assert [len(dataset[i]["input_ids"]) for i in range(3)] == sorted(dataset.lengths, reverse=True)


lengths = st.lists(st.integers(3, 128), min_size=1, max_size=200).map(np.array)


@given(lengths=lengths, batch_size=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_no_row_twice_and_only_whole_batches(lengths, batch_size, seed, epoch):
    sampler = LengthBucketSampler(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler) == len(set(rows))
    assert len(lengths) - len(rows) < min(batch_size, len(lengths))
    assert rows == list(sampler)  # decided by seed and epoch alone


def test_epochs_differ_and_leave_out_other_rows():
    sampler = LengthBucketSampler(np.full(10, 5), 4, seed=0)
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert len({tuple(order) for order in orders}) == 6
    assert len({frozenset(order) for order in orders}) > 1


def test_batches_are_of_one_length():
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 120, size=2000)
    batches = lengths[list(LengthBucketSampler(lengths, 20, seed=0))].reshape(-1, 20)
    assert np.ptp(batches, axis=1).mean() < 5
    # ... and do not come in the order of their lengths.
    assert abs(np.corrcoef(np.arange(len(batches)), batches.mean(axis=1))[0, 1]) < 0.3


@pytest.mark.parametrize("rows", [16, 19])
def test_two_processes_see_what_one_sees_with_twice_the_batch(rows):
    lengths = np.arange(rows)
    whole = np.array(list(LengthBucketSampler(lengths, 8, seed=3))).reshape(-1, 8)
    # accelerate deals batches of 4 in turn
    shards = torch.tensor(list(LengthBucketSampler(lengths, 8, seed=3))).reshape(-1, 2, 4)
    assert [sorted(step.ravel().tolist()) for step in shards] == [sorted(step.tolist()) for step in whole]


def by_perspective():
    rows = [
        ("b", "user_intent", 1.0),
        ("b", "business_rule", 2.0),
        ("b", "business_rule", 4.0),
        ("a", "user_intent", 5),
    ]
    frame = pd.DataFrame(rows, columns=["pair_id", "perspective", "value"])
    return frame.assign(cot_embedding=[np.full(2, value, "float32") for value in frame["value"]])


def test_embeddings_by_perspective_keep_their_order():
    stacked = perspective_embeddings(by_perspective(), ["business_rule", "user_intent"])
    np.testing.assert_array_equal(stacked["b"], [[3, 3], [1, 1]])
    np.testing.assert_array_equal(stacked["a"], [[np.nan, np.nan], [5, 5]])
    assert stacked["a"].dtype == np.float32


def test_a_batch_of_perspectives():
    stacked = perspective_embeddings(by_perspective(), ["business_rule", "user_intent"])
    dataset = PairDataset(pairs(), tiny_tokenizer(), LABEL2ID, max_length=128, embeddings=stacked)
    batch = PairCollator(tiny_tokenizer())([dataset[row] for row in range(3)])  # the pairs a, b, c
    assert batch["cot_mask"].tolist() == [[0, 1], [1, 1], [0, 0]]
    assert batch["cot_embeddings"].dtype == torch.float32
    assert batch["cot_embeddings"].tolist() == [[[0, 0], [5, 5]], [[3, 3], [1, 1]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize(("family", "longest"), [("bert", 20), ("xlm-roberta", 18), ("deberta-v2", None)])
def test_an_encoder_takes_what_it_has_positions_for(family, longest):
    padding = {"pad_token_id": 1} if family == "xlm-roberta" else {}
    relative = {"position_biased_input": False} if longest is None else {}
    encoder = AutoModel.from_config(tiny_config(family, max_position_embeddings=20, **padding, **relative)).eval()
    assert positions_of(encoder) == longest
    encoder(**random_batch(1, longest or 40))
    if longest is not None:
        with pytest.raises((IndexError, RuntimeError)):
            encoder(**random_batch(1, longest + 1))
