"""Losses of the rivals by law and by hand: the CRF against every path, InfoNCE by its formula, a causal decoder."""

import itertools
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from recipes.student.dataset import PairDataset
from recipes.student.distill import DistillArguments
from recipes.student.rivals.base import RivalCollator
from recipes.student.rivals.ced_kd import CEDKDStudent, RationaleDecoder
from recipes.student.rivals.crf import LinearChainCRF
from recipes.student.rivals.crsd import CRSDStudent, info_nce
from recipes.student.rivals.mkd import MKDStudent
from recipes.student.rivals.tags import TAG_NAMES, Span, cited_spans, merged, token_tags
from tests.tiny import SIZES, save_tiny_encoder, tiny_tokenizer

IGNORED = -100


# CRF


def random_crf(tags, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    crf = LinearChainCRF(tags).double()
    longest = max(lengths)
    emissions = torch.randn(len(lengths), longest, tags, generator=generator, dtype=torch.float64, requires_grad=True)
    gold = torch.randint(tags, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    return crf, emissions, gold, mask


def path_scores(crf, emissions, length):
    """Score every path of one row by the definition: path -> score."""
    scores = {}
    for path in itertools.product(range(emissions.shape[1]), repeat=length):
        score = crf.start[path[0]] + crf.end[path[-1]] + sum(emissions[t, tag] for t, tag in enumerate(path))
        scores[path] = score + sum(crf.transitions[one, two] for one, two in itertools.pairwise(path))
    return scores


@given(
    tags=st.integers(1, 3), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 2**31 - 1)
)
@settings(max_examples=25, deadline=None)
def test_the_crf_equals_the_enumeration_of_every_path(tags, lengths, seed):
    crf, emissions, gold, mask = random_crf(tags, lengths, seed)
    expected = []
    for row, length in enumerate(lengths):
        scores = path_scores(crf, emissions[row], length)
        partition = torch.logsumexp(torch.stack(list(scores.values())), dim=0)
        torch.testing.assert_close(crf.log_partition(emissions, mask)[row], partition)
        expected.append(partition - scores[tuple(gold[row, :length].tolist())])
        assert crf.decode(emissions, mask)[row] == list(max(scores, key=lambda path: scores[path].item()))
    losses = crf.log_partition(emissions, mask) - crf.score(emissions, gold, mask)
    torch.testing.assert_close(losses, torch.stack(expected))
    torch.testing.assert_close(crf(emissions, gold, mask), losses, rtol=1e-4, atol=1e-5)  # in float32
    inputs = (emissions, *crf.parameters())
    ours = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    enumerated = torch.autograd.grad(sum(expected), inputs, allow_unused=True)
    for one, other in zip(ours, enumerated, strict=True):
        # Without a second tag in any row the enumeration does not meet the transitions at all.
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_padding_does_not_change_the_crf():
    crf, emissions, gold, mask = random_crf(3, [2, 4], seed=1)
    changed = emissions.masked_fill(~mask.unsqueeze(2), 1e4)
    torch.testing.assert_close(crf(changed, gold.masked_fill(~mask, 2), mask), crf(emissions, gold, mask))


# CED-KD

VOCABULARY = torch.tensor([2, 3, 5, 6, 7, 8])


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return RationaleDecoder(VOCABULARY, 16, 2, 2, 12, dropout=0.0)


@pytest.fixture(scope="module")
def decoded():
    """Rationales of 6, 4 and 0 tokens, embeddings, H and its mask."""
    torch.manual_seed(1)
    ids = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 8, 8, 3, IGNORED, IGNORED], [IGNORED] * 6])
    return ids, torch.randn(10, 16), torch.randn(3, 4, 16), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])


def test_a_token_changes_no_loss_before_it(decoder, decoded):
    ids, *others = decoded
    before = decoder(ids, *others)
    for position in range(1, 6):
        changed = ids.clone()
        changed[0, position] = 5 if ids[0, position] != 5 else 8
        after = decoder(changed, *others)
        # Column t - 1 holds the loss of token t.
        torch.testing.assert_close(after[0, : position - 1], before[0, : position - 1])
        assert not torch.allclose(after[0, position - 1 :], before[0, position - 1 :])
        torch.testing.assert_close(after[1:], before[1:])


def test_padding_of_rationale_and_pair_is_ignored(decoder, decoded):
    ids, embeddings, hidden, mask = decoded
    whole = decoder(ids, embeddings, hidden, mask)
    assert (whole == 0).tolist() == (ids[:, 1:] == IGNORED).tolist()
    alone = decoder(ids[1:2, :4], embeddings, hidden[1:2, :3], mask[1:2, :3])
    torch.testing.assert_close(whole[1:2, :3], alone)


def test_the_loss_of_a_token_is_its_negative_log_likelihood(decoder, decoded):
    """By hand: the decoder's last vectors times the embeddings of the tokens that occur, a softmax over those."""
    ids, embeddings, hidden, mask = decoded
    vectors = embeddings[ids[:1, :-1]] + decoder.positions.weight[:5]
    causal = torch.full((5, 5), -torch.inf).triu(1)
    out = decoder.layers(vectors, hidden[:1], tgt_mask=causal, memory_key_padding_mask=mask[:1] == 0)[0]
    losses = decoder(*decoded)[0]
    for step, token in enumerate(ids[0, 1:].tolist()):
        exponentials = {other: math.exp((out[step] @ embeddings[other]).item()) for other in VOCABULARY.tolist()}
        assert losses[step].item() == pytest.approx(
            -math.log(exponentials[token] / sum(exponentials.values())), rel=1e-4
        )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_tiny_encoder(tmp_path_factory.mktemp("rivals") / "encoder", **no_dropout)


PAIRS = pd.DataFrame(
    {
        "pair_id": ["a", "b", "c"],
        "query": ["red shoe", "lamp", "cup"],
        "product_title": ["red nike shoe", "desk lamp", "tea cup"],
        "label": ["x", "y", "x"],
    }
)
RATIONALES = pd.DataFrame(
    {
        "pair_id": ["a", "c", "c"],
        "rationale": ["red is met", "the cup is for tea", "not a lamp"],
        "predicted_label": ["x", "x", "y"],
    }
)


def prepared(student_class, encoder, pairs=PAIRS, **options):
    """Build a student with its training-only parts, and the batch of all pairs."""
    arguments = DistillArguments(
        **{
            "pairs": "", "output": "", "encoder": "tiny", "labels": "", "max_length": 48, "rival_length": 40,
            "classifier_dropout": 0.0, "rival_score_weight": 1.0, **options,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    label2id = {"x": 0, "y": 1}
    student = student_class.from_encoder(
        str(encoder), extractor_type="none", classifier_dropout=0.0, label2id=label2id, id2label={0: "x", 1: "y"}
    )
    tokenizer = tiny_tokenizer()
    dataset = PairDataset(pairs, tokenizer, label2id, 48)
    train, collator = student.prepare(arguments, pairs, RATIONALES, dataset, tokenizer)
    assert isinstance(collator, RivalCollator)
    return student, collator([train[row] for row in range(len(pairs))])


def test_the_decoder_shares_the_encoders_embeddings_in_and_out(encoder):
    student, batch = prepared(CEDKDStudent, encoder)
    assert not any(parameter.shape[0] == SIZES["vocab_size"] for parameter in student.decoder.parameters())
    embeddings = student.get_input_embeddings().weight
    # H aside, the embeddings reach the loss through the decoder's input and output alone.
    hidden = torch.randn(3, 4, 16)
    losses = student.decoder(batch["rationale_ids"], embeddings, hidden, torch.ones(3, 4))
    (gradient,) = torch.autograd.grad(losses.sum(), embeddings)
    moved = gradient.abs().sum(dim=1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(student.decoder.vocabulary.tolist())


def test_reconstruction_is_the_mean_over_tokens_and_then_over_the_batch(encoder):
    student, batch = prepared(CEDKDStudent, encoder, rival_weight=0.7)
    output = student(**batch)
    features = student._encode(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}, inputs_embeds=None
    )
    embeddings = student.get_input_embeddings().weight
    losses = student.decoder(batch["rationale_ids"], embeddings, features.last_hidden_state, batch["attention_mask"])
    rows = [losses[row][batch["rationale_ids"][row, 1:] != IGNORED].mean() for row in (0, 2)]  # b has no rationale
    torch.testing.assert_close(output.reconstruction_loss, sum(rows) / 3)
    torch.testing.assert_close(output.loss, output.classification_loss + 0.7 * output.reconstruction_loss)


@pytest.mark.parametrize("student_class", [CEDKDStudent, MKDStudent, CRSDStudent])
def test_a_batch_without_rationales_is_plain_training(encoder, student_class):
    student, _ = prepared(student_class, encoder)
    collator = RivalCollator(tiny_tokenizer(), {"x": 0})
    dataset = PairDataset(PAIRS, tiny_tokenizer(), {"x": 0, "y": 1}, 48)
    batch = collator([dataset[row] for row in range(3)])
    none = {
        CEDKDStudent: {"rationale_ids": torch.full((3, 1), IGNORED)},
        MKDStudent: {"tags": torch.full((3, 1), IGNORED), "votes": torch.zeros(3, 2)},
        CRSDStudent: {
            name: torch.zeros(3, 1, dtype=torch.long) for name in ("reasoning_input_ids", "reasoning_attention_mask")
        },
    }[student_class]
    output = student(**batch, **none)
    torch.testing.assert_close(output.loss, output.classification_loss)
    output.loss.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in student.parameters())


# MKD


def test_the_tagging_loss_is_the_crfs_over_the_rows_that_cite(encoder):
    student, batch = prepared(MKDStudent, encoder)
    output = student(**batch)
    features = student._encode(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}, inputs_embeds=None
    )
    emissions = student.tagger(features.last_hidden_state)
    expected = 0.0
    for row in (0, 2):
        length = int(batch["attention_mask"][row].sum())
        tags = batch["tags"][row, :length]
        assert (tags > 0).any()
        one = student.crf(emissions[row : row + 1, :length], tags.unsqueeze(0), torch.ones(1, length).bool())
        expected = expected + one[0] / length / 3
    assert (batch["tags"][1] == IGNORED).all()  # no rationale
    torch.testing.assert_close(output.tagging_loss, expected)
    assert batch["votes"].tolist() == [[1, 0], [0, 0], [1, 1]]


def spans_of(query, title, rationale, **known):
    found = cited_spans(query, title, rationale, **known)
    return [((query, title)[s.side][s.start : s.end], s.attribute, "no" if s.mismatch else "yes") for s in found]


@pytest.mark.parametrize(
    ("query", "title", "rationale", "expected"),
    [
        (
            "hydro flask 20 ounce", "Hydro Flask Water Bottle, 32 oz",
            "The Hydro Flask brand agrees; 20 ounce was asked, another size (32 oz) is offered.",
            [("hydro flask", "brand", "yes"), ("20 ounce", "number", "yes"),
             ("Hydro Flask", "brand", "yes"), ("32 oz", "number", "no")],
        ),
        ("red mugs", "Mug in blue", "A mug is offered, but not in red.",
         [("red", "color", "no"), ("mugs", "other", "yes"), ("Mug", "other", "yes")]),
        ("shoes", "Shoe", "The shoe shows no conflict.", [("shoes", "other", "yes"), ("Shoe", "other", "yes")]),
        ("フライパン 取っ手なし", "T-fal フライパン", "フライパン is explicit; the title does not say なし.",
         [("フライパン", "other", "yes"), ("なし", "other", "no"), ("フライパン", "other", "yes")]),
        ("lamp", "Desk", "Nothing in common, and the a of to.", []),
        ("the in of", "a", "in the a of", []),
        ("", "", "x", []),
    ],
)  # fmt: skip
def test_spans_by_hand(query, title, rationale, expected):
    # Within a text in order, the query first.
    assert sorted(spans_of(query, title, rationale)) == sorted(expected)


def test_the_pairs_own_brand_and_color_are_known():
    assert spans_of("teak nike shoe", "x", "Nike and teak agree.", brand="Nike", color="Teak") == [
        ("teak", "color", "yes"),
        ("nike", "brand", "yes"),
    ]


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_spans_inside_it_that_do_not_overlap(query, title, rationale):
    spans = cited_spans(query, title, f"{rationale} {query[:10]}")
    for side, text in enumerate((query, title)):
        edges = [(span.start, span.end) for span in spans if span.side == side]
        assert all(0 <= start < end <= len(text) for start, end in edges)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(edges))


def test_tags_follow_the_offsets_of_the_tokens():
    """Tiny tokens are single characters: every character of a span has its tag, the first one B."""
    tokenizer = tiny_tokenizer()
    encoding = tokenizer(["ab cd"], ["ef"], return_offsets_mapping=True)
    tags = token_tags(encoding, 0, [Span(0, 0, 5, "color", True), Span(1, 0, 1, "other", False)])
    named = [TAG_NAMES[tag] for tag in tags]
    color, other = "B-color-mismatch", "B-other-match"
    assert named == ["O", color, *["I-color-mismatch"] * 3, "O", other, "O", "O"]


def test_of_overlapping_spans_the_first_stays_and_a_mismatch_counts():
    first, second, apart = Span(1, 0, 4, "color", False), Span(1, 2, 6, "other", True), Span(0, 0, 4, "other", False)
    assert merged([first, second, apart]) == [Span(1, 0, 4, "color", True), apart]


# CRSD


def test_info_nce_by_hand():
    torch.manual_seed(2)
    s, t, labels = torch.randn(4, 5), torch.randn(4, 5), [0, 1, 0, 2]
    cosine = [[float(F.cosine_similarity(a, b, dim=0)) for b in t] for a in s]
    for masked in (False, True):
        expected = []
        for i in range(4):
            negatives = [j for j in range(4) if j != i and not (masked and labels[j] == labels[i])]
            total = sum(math.exp(cosine[i][j] / 0.05) for j in [i, *negatives])
            expected.append(-math.log(math.exp(cosine[i][i] / 0.05) / total))
        loss = info_nce(s, t, 0.05, torch.tensor(labels) if masked else None)
        torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_the_reasoning_side():
    s, t = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    info_nce(s, t, 0.05).sum().backward()
    assert s.grad.abs().sum() > 0
    assert t.grad is None


def test_the_stop_holds_within_the_student(encoder):
    """The contrastive and the agreement loss leave no gradient where only the reasoning-augmented input goes."""
    student, batch = prepared(CRSDStudent, encoder)
    output = student(**batch)
    embeddings = student.get_input_embeddings().weight
    standard = set(batch["input_ids"].flatten().tolist())
    only_reasoning = sorted(set(batch["reasoning_input_ids"].flatten().tolist()) - standard)
    assert only_reasoning
    for loss, moves in (
        (output.contrastive_loss, False), (output.agreement_loss, False), (output.reasoning_loss, True)
    ):  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
        assert (gradient[only_reasoning].abs().sum() > 0) == moves


def test_a_batch_of_one_class_has_no_negatives_and_no_nan(encoder):
    student, batch = prepared(CRSDStudent, encoder, pairs=PAIRS.assign(label="x"), rival_mask_same_label=True)
    output = student(**batch)
    assert output.contrastive_loss.item() == 0
    output.loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters())
    unmasked, batch = prepared(CRSDStudent, encoder, pairs=PAIRS.assign(label="x"))
    assert unmasked(**batch).contrastive_loss.item() > 0


def test_the_augmented_input_is_the_pair_and_then_the_rationale(encoder):
    _, batch = prepared(CRSDStudent, encoder, rival_length=6)
    tokenizer = tiny_tokenizer()
    pair = tokenizer("red shoe", "red nike shoe")
    row = batch["reasoning_input_ids"][0][batch["reasoning_attention_mask"][0].bool()].tolist()
    rationale = tokenizer("red is met", add_special_tokens=False)["input_ids"][:5]
    assert row == [*pair["input_ids"], *rationale, tokenizer.sep_token_id]
    types = batch["reasoning_token_type_ids"][0][: len(row)].tolist()
    assert types == [*pair["token_type_ids"], *[1] * 6]
    assert not batch["reasoning_attention_mask"][1].any()
