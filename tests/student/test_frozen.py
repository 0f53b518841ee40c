"""Frozen layers keep their weights, the others learn, and remembering changes no number."""

import pytest
import torch
from transformers import AutoModel

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from recipes.arguments import UserError
from recipes.student.distill import DistillArguments, distill
from recipes.student.frozen import RememberingForward, freeze, remember
from tests.tiny import FAMILIES, random_batch, save_tiny_encoder, tiny_config


def lower_and_upper(names):
    is_lower = [name for name in names if name.startswith(("encoder.embeddings.", "encoder.encoder.layer.0."))]
    return is_lower, [name for name in names if name not in is_lower]


@pytest.mark.parametrize("rival", ["none", "ced_kd", "mkd", "crsd"])
def test_what_is_frozen_stays_and_the_rest_learns(options, workspace, rival):
    kind = "gat" if rival == "none" else "none"
    distill(DistillArguments(**options, frozen_layers=1, extractor_type=kind, rival=rival, rival_length=32))
    student = LRKDForSequenceClassification.from_pretrained(workspace / "student")
    pretrained = AutoModel.from_pretrained(workspace / "encoder").state_dict()
    before = {f"encoder.{name}": value for name, value in pretrained.items()}
    after = student.state_dict()
    frozen, learnt = lower_and_upper([name for name in after if name in before])
    assert frozen
    assert learnt
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    # A softmax does not see what is added to all keys: their bias learns nothing.
    assert all(not torch.equal(before[name], after[name]) for name in learnt if not name.endswith("key.bias"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_what_is_remembered_is_what_would_be_computed(family, attention):
    torch.manual_seed(0)
    plain = AutoModel.from_config(tiny_config(family), attn_implementation=attention).eval()
    remembering = AutoModel.from_config(tiny_config(family), attn_implementation=attention).eval()
    remembering.load_state_dict(plain.state_dict())
    freeze(remembering, 1)
    remembering.forward = RememberingForward(remembering, 1)
    first, second = random_batch(rows=4, seed=0), random_batch(rows=4, length=12, seed=1)
    # The third batch holds texts of both, in another order and with another padding.
    mixed = {
        name: torch.cat([torch.nn.functional.pad(first[name], (0, 3)), second[name]])[[6, 1, 3, 4]] for name in first
    }
    for batch in (first, second, mixed, {"input_ids": first["input_ids"][:1]}):
        expected, got = plain(**batch), remembering(**batch)
        valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        torch.testing.assert_close(got.last_hidden_state[valid], expected.last_hidden_state[valid])
        if expected.pooler_output is not None:
            torch.testing.assert_close(got.pooler_output, expected.pooler_output)
    assert len(remembering.forward.remembered) == 8


def test_other_token_types_are_another_text():
    encoder = AutoModel.from_config(tiny_config()).eval()
    encoder.forward = RememberingForward(encoder, 1)
    ids = torch.tensor([[2, 7, 3, 8, 3]])
    apart = encoder(input_ids=ids, token_type_ids=torch.tensor([[0, 0, 0, 1, 1]])).last_hidden_state
    alike = encoder(input_ids=ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state
    assert not torch.allclose(apart, alike)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_a_frozen_layer(options, workspace, family):
    save_tiny_encoder(workspace / family, family)
    record = distill(DistillArguments(**{**options, "encoder": str(workspace / family)}, frozen_layers=1))
    assert record["validation"]["nll"] < 5


@pytest.mark.parametrize(
    ("frozen", "apart", "marks", "query_layers"),
    [
        (1, 0, False, 0),
        *((frozen, apart, marks, 0) for frozen, apart in ((1, 1), (1, 2), (2, 1)) for marks in (False, True)),
        *((frozen, 1, marks, 1) for frozen in (1, 2) for marks in (False, True)),
    ],
)
def test_remembering_gives_the_student_that_computing_gives(
    options, workspace, monkeypatch, frozen, apart, marks, query_layers
):
    settings = {"frozen_layers": frozen, "separate_layers": apart, "match_marks": marks, "query_layers": query_layers}
    remembered = distill(DistillArguments(**options, **settings))
    monkeypatch.setattr("recipes.student.frozen.remember", lambda student, layers: None)
    computed = distill(DistillArguments(**{**options, "output": str(workspace / "computed")}, **settings))
    assert remembered["validation"]["nll"] == pytest.approx(computed["validation"]["nll"], abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_texts_read_apart_are_remembered_too(family):
    torch.manual_seed(0)
    config = LRKDConfig(encoder_config=tiny_config(family), separate_layers=1, extractor_type="gat")
    student = LRKDForSequenceClassification(config).eval()
    batch = random_batch(rows=4, seed=0)
    batch["input_ids"][:, 3] = config.encoder_config.eos_token_id or 3
    batch["token_type_ids"] = (torch.arange(9) > 3).long().repeat(4, 1)
    expected = student(**batch).logits
    freeze(student.encoder, 2)
    remember(student, 2)
    first, again = student(**batch).logits, student(**batch).logits
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(again, expected)
    assert len(student._encode_apart.remembered) == 4


def test_more_layers_than_there_are(options):
    with pytest.raises(UserError, match="frozen_layers: expected at most 2, the layers of this encoder; got 3"):
        distill(DistillArguments(**options, frozen_layers=3))
