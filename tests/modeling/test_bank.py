"""The rationale bank: its search against the formula, what it refuses, and what the pipeline says with it."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import pipeline

from modeling_lrkd.bank_lrkd import BANK_FILE, TEXTS_FILE, RationaleBank, quantize
from recipes.rationales.bank import make_bank
from tests.modeling.test_pipeline import QUERY, TITLES, save, tiny_model

SIZE = 8
NAMES = ("user_intent", "business_rule")


def rationales(count=300, seed=0):
    """Rationales whose text is their number, in some writing that takes several bytes a letter."""
    pd = pytest.importorskip("pandas")  # banks are made with what trains a student, and read without
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, SIZE, generator=generator)
    vectors[::2] += 3.0  # one perspective's embeddings share a lot
    return pd.DataFrame(
        {
            "perspective": [NAMES[number % 2] for number in range(count)],
            "rationale": [f"理由 {number} ✓" for number in range(count)],
            "predicted_label": [("Exact", "Irrelevant", "Substitute")[number % 3] for number in range(count)],
            "cot_embedding": list(F.normalize(vectors, dim=1).numpy()),
            "encoder": "an/encoder",
            "encoder_revision": "1",
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save(tiny_model(), tmp_path_factory.mktemp("bank") / "student")
    make_bank(rationales(), folder / "lines", 0).save(folder, folder / "model.safetensors")
    (folder / "lines").unlink()
    return folder


def load(folder, **changed):
    paths = {"path": folder / BANK_FILE, "texts": folder / TEXTS_FILE, "weights": folder / "model.safetensors"}
    return RationaleBank.load(**{**paths, "reasoning_dim": SIZE, **changed})


def literal(latent):
    """cos(r - m, e - m_p) of every rationale, by perspective: text -> similarity."""
    frame = rationales()
    vectors = {
        name: torch.stack([torch.from_numpy(row) for row in part["cot_embedding"]])
        for name, part in frame.groupby("perspective")
    }
    centre = sum(rows.mean(dim=0) for rows in vectors.values()) / len(vectors)
    return {
        name: dict(
            zip(
                frame["rationale"][frame["perspective"] == name],
                F.cosine_similarity(latent - centre, rows - rows.mean(dim=0), dim=1).tolist(),
            )
        )
        for name, rows in vectors.items()
    }


def test_the_exact_search_is_the_formula(folder):
    bank = load(folder)
    for seed in range(5):
        latent = torch.randn(SIZE, generator=torch.Generator().manual_seed(100 + seed))
        expected = literal(latent)
        found = bank.nearest(latent, count=400, probes=None)
        assert [one["perspective"] for one in found] == sorted(one["perspective"] for one in found)
        for name in NAMES:
            mine = [one for one in found if one["perspective"] == name]
            assert {one["rationale"] for one in mine} == set(expected[name])  # every entry once, none of the other's
            similarities = [one["similarity"] for one in mine]
            assert similarities == sorted(similarities, reverse=True)
            for one in mine:
                # int8 of 8 numbers: each is off by at most 1/254 of the largest
                assert one["similarity"] == pytest.approx(expected[name][one["rationale"]], abs=0.012)
                number = int(one["rationale"].split()[1])
                assert one["label"] == ("Exact", "Irrelevant", "Substitute")[number % 3]


def test_few_probes_find_less_and_nothing_else(folder):
    bank = load(folder)
    assert len(bank.centroids) == 6  # 150 entries a perspective, 45 a cell
    latent = torch.randn(SIZE, generator=torch.Generator().manual_seed(7))
    exact = {one["rationale"]: one["similarity"] for one in bank.nearest(latent, 400, None)}
    seen = set()
    for probes in (1, 2, 3):
        some = {one["rationale"]: one["similarity"] for one in bank.nearest(latent, 400, probes)}
        assert seen < set(some) <= set(exact)
        assert all(exact[text] == pytest.approx(similarity, abs=1e-6) for text, similarity in some.items())
        seen = set(some)
    assert seen == set(exact)


def test_an_entry_is_its_own_nearest(folder):
    bank = load(folder)
    frame = rationales()
    centre = bank.means.mean(dim=0)
    for row in (0, 1, 17, 298):
        name = frame["perspective"][row]
        own = torch.from_numpy(frame["cot_embedding"][row]) - bank.means[bank.perspectives.index(name)]
        best = next(one for one in bank.nearest(centre + own) if one["perspective"] == name)
        assert best["rationale"] == frame["rationale"][row]
        assert best["similarity"] == pytest.approx(1.0, abs=0.01)


def test_rounding_keeps_the_largest_component_and_half_a_step():
    units = F.normalize(torch.randn(50, SIZE, generator=torch.Generator().manual_seed(1)), dim=1)
    rows, scales = quantize(units)
    assert rows.dtype == torch.int8
    assert (rows.abs().amax(dim=1) == 127).all()
    assert ((rows * scales[:, None] - units).abs() <= scales[:, None] / 2 + 1e-7).all()
    zeros, _ = quantize(torch.zeros(1, SIZE))
    assert not zeros.any()


def test_a_bank_of_another_model_or_encoder_is_refused(folder, tmp_path):
    other = save(tiny_model(classifier_dropout=0.2, num_codes=4, guidance_weight=0.3), tmp_path / "other")
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match="built for other weights"):
        load(folder, weights=other / "model.safetensors")
    with pytest.raises(ValueError, match=r"embeddings of 8 numbers by an/encoder.*reasoning_dim is 9: another encoder"):
        load(folder, reasoning_dim=9)
    for name in (BANK_FILE, TEXTS_FILE):
        (other / name).write_bytes((folder / name).read_bytes())
    rank = pipeline("lrkd-relevance", model=str(other), device="cpu")
    assert len(rank({"query": QUERY, "products": TITLES})) == len(TITLES)  # who asks for none is not stopped
    with pytest.raises(ValueError, match="built for other weights"):
        rank({"query": QUERY, "products": TITLES}, explanations=1)


def test_an_empty_a_damaged_and_a_torn_bank_are_refused(folder, tmp_path):
    bank = load(folder)
    empty = {name: getattr(bank, name)[:0].clone() for name in ("vectors", "scales", "verdicts", "centroids")}
    rest = {n: getattr(bank, n).clone() for n in ("cell_starts", "perspective_cells", "means", "text_starts")}
    about = dict.fromkeys(("weights_sha256", "encoder", "encoder_revision"), "x")
    about |= {"perspectives": bank.perspectives, "labels": bank.labels}
    save_file({**empty, **rest}, tmp_path / BANK_FILE, metadata={"lrkd_rationale_bank": json.dumps(about)})
    with pytest.raises(ValueError, match="the rationale bank is empty"):
        load(folder, path=tmp_path / BANK_FILE)
    (tmp_path / BANK_FILE).write_bytes((folder / BANK_FILE).read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated, damaged or no rationale bank"):
        load(folder, path=tmp_path / BANK_FILE)
    with pytest.raises(ValueError, match="truncated, damaged or no rationale bank"):
        load(folder, path=folder / "model.safetensors")
    (tmp_path / TEXTS_FILE).write_bytes((folder / TEXTS_FILE).read_bytes()[:-3])
    with pytest.raises(ValueError, match="its bank was made with"):
        load(folder, texts=tmp_path / TEXTS_FILE)


def test_the_pipeline_gives_explanations_where_they_are_asked_for(folder):
    rank = pipeline("lrkd-relevance", model=str(folder), device="cpu")
    request = {"query": QUERY, "products": [*TITLES, TITLES[0]]}
    plain = rank(request)
    assert all("explanations" not in product for product in plain)
    bank = load(folder)
    explained = rank(request, explanations=2, batch_size=3)
    for product, without in zip(explained, plain, strict=True):
        found = product.pop("explanations")
        with torch.inference_mode():
            encoded = rank.tokenizer(QUERY, product["title"], return_tensors="pt")
            latent = rank.model(**encoded).projected_reasoning[0]
        assert [one["perspective"] for one in found] == ["business_rule"] * 2 + ["user_intent"] * 2
        for one, expected in zip(found, bank.nearest(latent, 2), strict=True):
            assert one["similarity"] == pytest.approx(expected["similarity"], abs=1e-4)
        json.dumps(found)
        assert product["score"] == pytest.approx(without["score"], abs=1e-5)


@pytest.mark.parametrize("value", [-1, True, 1.5, "2"])
def test_explanations_are_counted(folder, value):
    rank = pipeline("lrkd-relevance", model=str(folder), device="cpu")
    with pytest.raises(ValueError, match="explanations: expected a whole number"):
        rank({"query": QUERY, "products": TITLES}, explanations=value)
    with pytest.raises(ValueError, match="a key 'explanations' of its own"):
        rank({"query": QUERY, "products": [{"title": "a", "explanations": 1}]})


def test_without_a_bank_there_is_nothing_to_ask_for(tmp_path, folder):
    rank = pipeline("lrkd-relevance", model=str(save(tiny_model(), tmp_path / "plain")), device="cpu")
    with pytest.raises(ValueError, match=f"brings no {BANK_FILE}. recipes.rationales.bank writes one"):
        rank({"query": QUERY, "products": TITLES}, explanations=1)
    torn = save(tiny_model(), tmp_path / "torn")
    (torn / BANK_FILE).write_bytes((folder / BANK_FILE).read_bytes())
    with pytest.raises(ValueError, match=f"{TEXTS_FILE} is not beside it"):
        pipeline("lrkd-relevance", model=str(torn))({"query": QUERY, "products": TITLES}, explanations=1)


def test_the_bank_travels_when_the_pipeline_is_saved(folder, tmp_path):
    rank = pipeline("lrkd-relevance", model=str(folder), device="cpu")
    rank.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "bank_lrkd.py").is_file()  # its code too
    again = pipeline("lrkd-relevance", model=str(tmp_path / "again"), device="cpu")
    request = {"query": QUERY, "products": TITLES}
    assert again(request, explanations=1) == rank(request, explanations=1)


# Calibrated probabilities.


def test_vector_scaling_is_its_formula_and_reaches_pipeline_and_view(tmp_path):
    scales, biases = [0.5, 1.5, 1.0], [0.2, -0.1, -0.1]
    options = {"class_scales": scales, "class_biases": biases}
    model = tiny_model(**options)
    rank = pipeline("lrkd-relevance", model=str(save(model, tmp_path / "scaled")), device="cpu")
    (result,) = rank({"query": QUERY, "products": TITLES[:1]})
    encoded = rank.tokenizer(QUERY, TITLES[0], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**encoded).logits[0]
        shown = tiny_model(**options, ranking_view=True)(**encoded).logits
    first = torch.log_softmax(logits / model.config.temperature, dim=0)
    expected = torch.softmax(first * torch.tensor(scales) + torch.tensor(biases), dim=0)
    assert list(result["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert result["score"] == pytest.approx(float(shown.sigmoid()), abs=1e-5)
    # A constant added to all logits is no information.
    torch.testing.assert_close(
        torch.softmax(model.config.calibrated(logits + 5), 0), torch.softmax(model.config.calibrated(logits), 0)
    )


@pytest.mark.parametrize("name", ["class_scales", "class_biases"])
def test_one_number_a_class(name):
    with pytest.raises(ValueError, match=f"{name}: expected 3 numbers, one a label, got 2"):
        tiny_model(**{name: [1.0, 1.0]})
