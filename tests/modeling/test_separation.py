"""Lower layers that read query and product apart: what they must not see, and that products can be encoded alone."""

import copy

import pytest
import torch
from transformers import AutoModel

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from tests.tiny import tiny_config

LAYERS = 3
SEPARABLE = ("bert", "xlm-roberta")
CLS, SEP = 2, 3
QUERIES = [[10, 11], [12, 13, 14, 15], [16]]
TITLES = [[20, 21, 22, 23, 24], [25], [26, 27, 28]]


def build(k, family="bert", seed=0, attn_implementation="sdpa", encoder=None, **options):
    torch.manual_seed(seed)
    options = {"extractor_type": "gat", "pooling": "mean", "reasoning_dim": 6, "num_labels": 4, **options}
    config = LRKDConfig(
        encoder_config=tiny_config(
            family,
            **{"num_hidden_layers": LAYERS, "initializer_range": 0.5, "eos_token_id": SEP, **(encoder or {})},
        ),
        separate_layers=k,
        **options,
    )
    return LRKDForSequenceClassification._from_config(config, attn_implementation=attn_implementation).eval()


def rows(queries=QUERIES, titles=TITLES):
    """Token ids and segments of each pair: [CLS] query [SEP] | title [SEP]."""
    return [
        ([CLS, *query, SEP, *title, SEP], [0] * (len(query) + 2) + [1] * (len(title) + 1))
        for query, title in zip(queries, titles)
    ]


def pad(sequences, where="right", length=14, token_types=True):
    """A batch; `middle` puts padding between the two texts, where no tokenizer does."""
    batch = {name: torch.zeros(len(sequences), length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    types = torch.zeros_like(batch["input_ids"])
    for row, (ids, segments) in enumerate(sequences):
        free = list(range(length))
        cut = segments.index(1) if 1 in segments else len(ids)
        places = {
            "right": free[: len(ids)],
            "left": free[-len(ids) :],
            "middle": free[:cut] + free[length - (len(ids) - cut) :],
        }[where]
        batch["input_ids"][row, places] = torch.tensor(ids)
        batch["attention_mask"][row, places] = 1
        types[row, places] = torch.tensor(segments)
    return {**batch, "token_type_ids": types} if token_types else batch


def encode_alone(model, sequences, segment):
    batch = pad([(ids, [segment] * len(ids)) for ids in sequences], length=8)
    states = model.encode_segment(batch["input_ids"], batch["attention_mask"], segment)
    return [vectors[mask.bool()] for vectors, mask in zip(states, batch["attention_mask"])]


def score_cached(model, queries=QUERIES, titles=TITLES):
    """Encode queries and products each by themselves, and put them together afterwards."""
    texts = [[CLS, *query, SEP] for query in queries], [[*title, SEP] for title in titles]
    hidden, ids, segments = [], [], []
    for segment, part in enumerate(texts):
        hidden.append(torch.nn.utils.rnn.pad_sequence(encode_alone(model, part, segment), batch_first=True))
        ids.append(torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, part)), batch_first=True))
        segments.append(torch.full_like(ids[-1], segment))
    mask, count = torch.cat(ids, dim=1) != 0, ids[0].shape[1]
    met = model.mark_matches(torch.cat(hidden, dim=1), torch.cat(ids, dim=1), torch.cat(segments, dim=1), mask)
    return model.classify_together(met[:, :count], met[:, count:], mask.long())


@pytest.mark.parametrize("family", SEPARABLE)
@pytest.mark.parametrize("k", range(LAYERS + 1))
def test_it_adds_no_parameter(family, k):
    names = {name: weight.shape for name, weight in build(k, family).state_dict().items()}
    assert names == {name: weight.shape for name, weight in build(0, family).state_dict().items()}


def test_none_apart_is_the_encoder_as_it_is():
    model, batch = build(0), pad(rows())
    expected = model.encoder(**batch).last_hidden_state
    assert torch.equal(super(type(model), model).forward(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("family", SEPARABLE)
@pytest.mark.parametrize("k", [1, 2, LAYERS])
def test_the_lower_layers_are_those_of_two_plain_encoders(family, k):
    """Independent of our layer loop: transformers' own encoder, cut to k layers, over each text alone."""
    model = build(k, family)
    config = copy.deepcopy(model.config.encoder_config)
    config.num_hidden_layers = k
    plain = AutoModel.from_config(config).eval()
    plain.load_state_dict(model.encoder.state_dict(), strict=False)
    for row in rows():
        ids, segments = (torch.tensor([values]) for values in row)
        states = model(ids, token_type_ids=segments, output_hidden_states=True).hidden_states
        assert len(states) == LAYERS + 1
        for segment in (0, 1):
            own = ids[segments == segment].unsqueeze(0)
            alone = plain(own, token_type_ids=torch.full_like(own, segment)).last_hidden_state
            torch.testing.assert_close(states[k][segments == segment].unsqueeze(0), alone)
        for lower, upper, layer in zip(states[k:], states[k + 1 :], model.encoder.encoder.layer[k:]):
            output = layer(lower)
            torch.testing.assert_close(upper, output if isinstance(output, torch.Tensor) else output[0])


@pytest.mark.parametrize("k", [1, 2, LAYERS])
def test_no_token_sees_the_other_text_before_layer_k(k):
    model = build(k)
    one, other = pad(rows()), pad(rows([[30, 31], [32, 33, 34, 35], [36]]))
    before, after = (model(**batch, output_hidden_states=True).hidden_states for batch in (one, other))
    product = one["token_type_ids"].bool()
    for layer in range(LAYERS + 1):
        same = torch.allclose(before[layer][product], after[layer][product])
        assert same == (layer <= k), layer


@pytest.mark.parametrize("family", SEPARABLE)
@pytest.mark.parametrize("extractor_type", ["mlp", "poly", "gat", "none", "cls"])
@pytest.mark.parametrize("k", [1, LAYERS])
def test_products_encoded_before_there_is_a_query_score_the_same(family, extractor_type, k):
    model = build(k, family, extractor_type=extractor_type, pooling="pooler")
    torch.testing.assert_close(score_cached(model), model(**pad(rows())).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SEPARABLE)
@pytest.mark.parametrize(("k", "q"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("where", ["right", "left", "middle"])
def test_the_querys_tokens_are_updated_as_by_the_plain_layers_and_no_others(family, k, q, where):
    """Against transformers' own layers over all tokens, of which the products' are put back."""
    model, batch = build(k, family, match_marks=True, query_layers=q), pad(rows(**SHARED), where)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    mask, of_query = batch["attention_mask"].bool(), batch["token_type_ids"] == 0
    for number in range(k, LAYERS):
        lower, upper, layer = *states[number : number + 2], model.encoder.encoder.layer[number]
        output = layer(lower, mask[:, None, None, :])
        output = output if isinstance(output, torch.Tensor) else output[0]
        torch.testing.assert_close(upper[of_query & mask], output[of_query & mask])
        product = lower if number >= LAYERS - q else output
        torch.testing.assert_close(upper[~of_query & mask], product[~of_query & mask])
        assert not torch.allclose(upper[of_query & mask], lower[of_query & mask])


@pytest.mark.parametrize("family", SEPARABLE)
@pytest.mark.parametrize("extractor_type", ["mlp", "gat", "none"])
@pytest.mark.parametrize(("q", "pooling"), [(1, "pooler"), (1, "mean"), (2, "mean")])
def test_stored_products_that_are_not_updated_score_the_same(family, extractor_type, q, pooling):
    model = build(1, family, extractor_type=extractor_type, pooling=pooling, match_marks=True, query_layers=q)
    expected = model(**pad(rows(**SHARED))).logits
    torch.testing.assert_close(score_cached(model, **SHARED), expected, atol=1e-5, rtol=1e-5)
    model.config.query_layers = 0
    reads_the_query_only = (
        extractor_type == "none" and pooling == "pooler" and q == 1
    )  # of the last layer, the first token
    updated = model(**pad(rows(**SHARED))).logits
    assert torch.allclose(updated, expected, atol=1e-3) == reads_the_query_only


def test_the_query_alone_learns_with_dropout_and_in_bfloat16():
    model, batch = build(1, query_layers=2), pad(rows())
    expected = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(**batch).logits.float(), expected, atol=0.1, rtol=0.1)
    model.encoder.train()
    assert not torch.allclose(model(**batch).logits, model(**batch).logits)
    model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    parts = [part for layer in model.encoder.encoder.layer for part in layer.parameters()]
    assert all(part.grad is not None and bool(part.grad.isfinite().all()) for part in parts)


@pytest.mark.parametrize("family", SEPARABLE)
@pytest.mark.parametrize("where", ["left", "middle"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("q", [0, 1])
def test_padding_changes_nothing_wherever_it_stands(family, where, implementation, q):
    model = build(2, family, attn_implementation=implementation, query_layers=q)
    expected = build(2, family, query_layers=q)(**pad(rows(), "right")).logits
    torch.testing.assert_close(model(**pad(rows(), where)).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(**pad(rows(), where, length=20)).logits, expected, atol=1e-5, rtol=1e-5)


SHARED = {"queries": [[10, 11], [12, 13, 12, 15], [16]], "titles": [[20, 11, 22, 11, 10], [12], [26, 27, 28]]}
MARKED = [[0, 1, 1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0, 1, 0], [0] * 7]  # [CLS], [SEP] and 15 are not


@pytest.mark.parametrize("where", ["right", "left", "middle"])
def test_tokens_that_both_texts_have_are_marked_and_no_others(where):
    model, batch = build(1, match_marks=True), pad(rows(**SHARED), where)
    mask = batch["attention_mask"].bool()
    hidden = torch.randn(*mask.shape, 16)
    added = model.mark_matches(hidden, batch["input_ids"], batch["token_type_ids"], mask) - hidden
    for row, expected in enumerate(MARKED):
        for token, is_marked, segment in zip(added[row][mask[row]], expected, rows(**SHARED)[row][1]):
            torch.testing.assert_close(token, model.match_marks.weight[segment] * is_marked)
    assert bool((added[~mask] == 0).all())


@pytest.mark.parametrize("family", SEPARABLE)
@pytest.mark.parametrize("k", [1, LAYERS])
def test_marks_are_added_after_layer_k_and_products_still_need_no_query(family, k):
    plain, marked = build(k, family), build(k, family, match_marks=True)
    marked.load_state_dict(plain.state_dict(), strict=False)
    batch = pad(rows(**SHARED))
    one, other = (model(**batch, output_hidden_states=True) for model in (plain, marked))
    for layer in range(k):
        torch.testing.assert_close(one.hidden_states[layer], other.hidden_states[layer])
    added = other.hidden_states[k] - one.hidden_states[k]
    assert [(row != 0).any(1).long().tolist()[: len(expected)] for row, expected in zip(added, MARKED)] == MARKED
    assert not torch.allclose(one.logits[:2], other.logits[:2])
    torch.testing.assert_close(one.logits[2], other.logits[2])  # its texts share nothing
    torch.testing.assert_close(score_cached(marked, **SHARED), other.logits, atol=1e-5, rtol=1e-5)


def test_a_separator_before_the_product_is_no_shared_word():
    """XLM-R puts two between the texts; the product's begins with one."""
    model = build(1, "xlm-roberta", match_marks=True, encoder={"type_vocab_size": 1})
    ids = torch.tensor([[0, 10, SEP, SEP, 10, 11, SEP]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    hidden = torch.zeros(1, 7, 16)
    marked = model.mark_matches(hidden, ids, segments, torch.ones(1, 7, dtype=torch.bool)).any(2)
    assert marked.tolist() == [[False, True, False, False, True, False, False]]


def test_marks_learn_and_are_saved(tmp_path):
    model = build(1, match_marks=True)
    model(**pad(rows(**SHARED)), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert bool((model.match_marks.weight.grad != 0).any(dim=1).all())
    model.save_pretrained(tmp_path)
    loaded = LRKDForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**pad(rows(**SHARED))).logits, model(**pad(rows(**SHARED))).logits)


def test_without_token_types_the_first_separator_ends_the_query():
    model = build(2, "xlm-roberta", encoder={"type_vocab_size": 1})
    batch = pad(rows(), token_types=False)
    expected = torch.cat([model(torch.tensor([ids])).logits for ids, _ in rows()])
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score_cached(model), expected, atol=1e-5, rtol=1e-5)
    two_types = build(2, "xlm-roberta")
    torch.testing.assert_close(two_types(**batch).logits, two_types(**pad(rows())).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_text_without_a_product_is_finite(implementation):
    model = build(2, "xlm-roberta", attn_implementation=implementation)
    alone = [([CLS, 10, 11, SEP], [0] * 4), rows()[0]]
    assert model(**pad(alone, token_types=False)).logits.isfinite().all()


@pytest.mark.parametrize("q", [0, 1])
def test_gradient_checkpointing_gives_the_same_gradients(q):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gradients = []
    for checkpointing in (False, True):
        model = build(2, encoder=still, classifier_dropout=0.0, query_layers=q).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**pad(rows()), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 40
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bfloat16_and_autocast_are_finite_and_near(implementation):
    model = build(2, attn_implementation=implementation, encoder={"initializer_range": 0.1})
    expected = model(**pad(rows())).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(**pad(rows())).logits
    for logits in (cast, model.to(torch.bfloat16)(**pad(rows())).logits):
        torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


def test_a_view_for_ranking_is_cached_too():
    model = build(2, label_gains=[1.0, 0.5, 0.1, 0.0], ranking_view=True)
    torch.testing.assert_close(score_cached(model), model(**pad(rows())).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1, "family": "modernbert"}, "separate_layers: expected 0 for .* 'modernbert', got 1; .* bert, roberta"),
        ({"k": 1, "family": "deberta-v2"}, "separate_layers: expected 0 for .* 'deberta-v2'"),
        ({"k": 4}, "separate_layers: the encoder has 3 layers, got 4"),
        ({"k": -1}, "separate_layers: expected a whole number, 0 or more, got -1"),
        ({"k": True}, "separate_layers: expected a whole number"),
        ({"k": 0, "match_marks": True}, "match_marks: are for texts that are read apart; set separate_layers"),
        ({"k": 0, "query_layers": 1}, "query_layers: are for texts that are read apart; set separate_layers to 1"),
        ({"k": 2, "query_layers": 2}, "query_layers: the encoder has 3 layers, of which 2 read .* apart; got 2"),
        ({"k": 1, "query_layers": -1}, "query_layers: expected a whole number, 0 or more, got -1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_inputs_that_cannot_be_told_apart_are_refused():
    batch = pad(rows(), token_types=False)
    with pytest.raises(ValueError, match="told apart by token_type_ids"):
        build(1, encoder={"eos_token_id": None})(**batch)
    embedded = {"inputs_embeds": torch.zeros(1, 4, 16)}
    with pytest.raises(ValueError, match="told apart by token_type_ids"):
        build(1, "xlm-roberta")(**embedded)
    with pytest.raises(ValueError, match="match_marks: compare token ids; pass input_ids"):
        build(1, match_marks=True)(inputs_embeds=torch.zeros(1, 4, 16), token_type_ids=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="output_attentions"):
        build(1)(**pad(rows()), output_attentions=True)
    model = build(1)
    model.config.encoder_config._attn_implementation = model.encoder.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="expected attn_implementation 'sdpa' or 'eager', got 'flex_attention'"):
        model(**pad(rows()))
