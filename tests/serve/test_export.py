"""What is exported gives the plain forward's values; what loses too much is refused, and nothing stands broken."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from modeling_lrkd import LRKDForSequenceClassification
from recipes.arguments import UserError
from recipes.serve import export as exporting
from recipes.serve.export import ExportArguments, check_drops, export
from recipes.serve.graphs import products_of_activations, quantise_openvino, save_float32
from recipes.serve.plan import FILES, choose, exported_forms
from recipes.serve.scorer import Scorer
from recipes.student.saving import save_tokenizer
from tests.serve.conftest import save_student
from tests.tiny import tiny_config, tiny_tokenizer


@pytest.mark.parametrize(
    ("kind", "family", "perspectives"),
    [
        ("mlp", "bert", None),
        ("poly", "xlm-roberta", None),
        ("none", "modernbert", None),
        ("gat", "bert", ["buyer", "seller"]),
    ],
)
def test_any_batch_and_length_gives_the_plain_forward(kind, family, perspectives, tmp_path):
    student = save_student(tmp_path / "student", extractor_type=kind, family=family, perspectives=perspectives)
    assert save_float32(str(student), tmp_path / "out") <= 1e-4
    model = LRKDForSequenceClassification.from_pretrained(student).eval()
    session = onnxruntime.InferenceSession(tmp_path / "out" / FILES["onnx-float32"])
    names = [node.name for node in session.get_outputs()]
    gate = [] if perspectives is None else ["perspective_weights"]
    assert names == (["logits"] if kind == "none" else ["logits", "latent_reasoning", *gate])
    for rows, length in ((1, 1), (4, 23), (2, 128)):
        ids = torch.randint(5, 90, (rows, length))
        mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1))).long()
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        batch = {node.name: batch[node.name] for node in session.get_inputs()}
        with torch.inference_mode():
            expected = model(**batch)
        found = session.run(None, {name: values.numpy() for name, values in batch.items()})
        for name, values in zip(names, found):
            np.testing.assert_allclose(values, expected[name].numpy(), atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("query_layers", [0, 1])
def test_a_student_that_reads_apart_and_marks_shared_words(family, query_layers, tmp_path):
    options = {"separate_layers": 1, "match_marks": True, "query_layers": query_layers, "pooling": "mean"}
    student = save_student(tmp_path / "student", family, **options)
    weights = load_file(student / "model.safetensors")
    weights["match_marks.weight"] = torch.randn_like(weights["match_marks.weight"])
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    assert save_float32(str(student), tmp_path / "out") <= 1e-4
    model = LRKDForSequenceClassification.from_pretrained(student).eval()
    session = onnxruntime.InferenceSession(tmp_path / "out" / FILES["onnx-float32"])
    ids = torch.tensor([[2, 10, 11, 3, 12, 11, 3, 0], [2, 10, 3, 20, 21, 22, 23, 3]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": types}
    batch = {node.name: batch[node.name] for node in session.get_inputs()}
    with torch.inference_mode():
        expected = model(**batch).logits.numpy()
        model.match_marks.weight.zero_()
        unmarked = model(**batch).logits.numpy()
    found = session.run(["logits"], {name: values.numpy() for name, values in batch.items()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - unmarked)[0].max() > 0.01
    np.testing.assert_allclose(found[1], unmarked[1], atol=1e-4)  # its texts share no word


def test_the_record_and_the_files(exported):
    record = json.loads((exported / "export.json").read_text())
    assert {"onnx-float32", "openvino-float32"} <= set(exported_forms(exported))
    assert all(path.is_file() for path in exported_forms(exported).values())
    for form in ("onnx-int8", "openvino-int8"):  # nothing lies there that was not held against the plain model
        assert (exported / FILES[form]).exists() == (form in record["forms"]) == (form not in record["left_out"])
    assert record["forms"]["torch-float32"]["macro_f1"] == 1.0  # the labels are the plain model's own
    assert record["forms"]["onnx-float32"]["drop_points"] == 0.0
    assert record["largest_difference"] <= 1e-4


def test_products_with_weights_are_in_int8_and_attention_is_not(exported, tmp_path):
    shutil.copytree(exported / "onnx", tmp_path / "onnx")
    with Scorer(exported, "torch") as scorer:
        quantise_openvino(tmp_path, [dict(batch.inputs) for batch in scorer.prepare([("red shoe", "blue lamp")] * 4)])

    def products(form):
        graph = openvino.Core().read_model(tmp_path / FILES[form])
        return graph, [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]

    attention = set(products_of_activations(products("openvino-float32")[0]))
    quantised = {
        node.get_friendly_name(): any(
            value.get_node().get_type_name() == "FakeQuantize" for value in node.input_values()
        )
        for node in products("openvino-int8")[1]
    }
    assert attention
    assert attention < quantised.keys()
    assert not any(quantised[name] for name in attention)
    assert sum(quantised.values()) >= 6  # query, key, value, output and the two of the feed-forward, a layer


def test_a_form_that_loses_too_much_is_refused_and_the_old_export_stays(student, pairs, exported, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*") if path.is_file()}

    def damage(folder):
        graph = onnx.load(folder / FILES["onnx-float32"])
        for tensor in graph.graph.initializer:
            if tensor.name.endswith("classifier.weight"):
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        onnx.save(graph, folder / FILES["onnx-int8"])

    monkeypatch.setattr(exporting, "quantise_onnx", damage)
    monkeypatch.setattr(exporting, "cpu_flags", lambda: frozenset({"avx512_vnni"}))
    monkeypatch.setattr("recipes.serve.plan.cpu_flags", lambda: frozenset({"avx512_vnni"}))
    arguments = ExportArguments(model=str(student), output=str(exported), pairs=str(pairs), guard_split="test")
    with pytest.raises(UserError, match=r"onnx-int8: macro-F1 falls from 100\.00 to .* by [\d.]+ points"):
        export(arguments)
    assert before == {path: path.stat().st_mtime_ns for path in exported.rglob("*") if path.is_file()}
    assert not list(exported.parent.glob(".*.partial"))
    arguments.output, arguments.leave_out = f"{exported}-without", True
    record = export(arguments)
    assert "onnx-int8" not in record["forms"]
    assert "onnx-float32" in record["forms"]
    assert re.fullmatch(r"loses [\d.]+ points of macro-F1; 0.3 are allowed", record["left_out"]["onnx-int8"])
    assert not Path(arguments.output, FILES["onnx-int8"]).exists()


def test_the_guard_counts_in_points():
    values = {"torch-float32": {"macro_f1": 0.5, "drop_points": 0.0}, "onnx-int8": {"macro_f1": 0.4971}}
    values["onnx-int8"]["drop_points"] = 0.29
    check_drops(values, 0.3, rows=9)
    values["onnx-int8"]["drop_points"] = 0.31
    with pytest.raises(UserError, match=r"by 0\.31 points; 0\.3 are allowed"):
        check_drops(values, 0.3, rows=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "nowhere"}, "nowhere: no such folder"),
        ({"labels": "aliexpress6"}, "is not in the schema"),
        ({"calibration_size": 0}, "calibration_size 0"),
        ({"model": "nowhere", "pairs": None}, "nowhere: no config.json"),
    ],
)
def test_bad_input_is_refused_before_the_work(changes, message, student, pairs, tmp_path):
    options = {"model": str(student), "output": str(tmp_path / "out"), "pairs": str(pairs), **changes}
    with pytest.raises(UserError, match=message):
        export(ExportArguments(**options))
    assert not (tmp_path / "out").exists()


def test_nothing_of_another_kind_is_replaced(student, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        export(ExportArguments(model=str(student), output=str(tmp_path)))
    with pytest.raises(UserError, match="is the student itself"):
        export(ExportArguments(model=str(student), output=str(student)))


ALL = {"onnx-float32", "onnx-int8", "openvino-float32", "openvino-bfloat16", "openvino-int8"}


@pytest.mark.parametrize(
    ("backend", "precision", "exported", "flags", "form"),
    [
        ("auto", "auto", ALL, {"avx512_vnni", "avx512_bf16"}, "openvino-int8"),
        ("auto", "auto", {"onnx-float32", "openvino-float32"}, {"avx2"}, "openvino-float32"),
        ("auto", "auto", ALL - {"openvino-int8"}, {"amx_bf16"}, "openvino-bfloat16"),
        ("onnx", "auto", {"onnx-float32", "openvino-int8"}, {"avx2"}, "onnx-float32"),
        ("onnx", "auto", ALL, {"avx_vnni"}, "onnx-int8"),
        ("torch", "auto", ALL, {"avx512_vnni"}, "torch-float32"),
        ("auto", "auto", set(), {"avx512_vnni", "amx_bf16"}, "torch-float32"),
        ("openvino", "float32", ALL, {"amx_int8"}, "openvino-float32"),
    ],
)
def test_the_fastest_form_that_the_machine_multiplies(backend, precision, exported, flags, form):
    plan = choose(backend, precision, exported, {"onnx", "openvino", "torch"}, flags)
    assert (plan.form, plan.reason) == (form, "")


def test_a_form_exported_elsewhere_that_this_cpu_does_not_multiply_is_passed_over_and_named():
    plan = choose("auto", "auto", ALL, {"onnx", "openvino", "torch"}, {"amx_bf16"})
    assert plan.form == "openvino-bfloat16"
    assert plan.reason == "this CPU has no instructions for int8: scoring with openvino-bfloat16 instead"


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("there", [ALL, {"onnx-float32", "openvino-float32"}])  # exported elsewhere, or on such a CPU
def test_int8_without_its_instructions_falls_back_and_says_so(backend, there, exported, monkeypatch):
    plan = choose(backend, "int8", there, {"onnx", "openvino", "torch"}, {"avx2"})
    assert plan.form == f"{backend}-float32"
    assert "no instructions for int8" in plan.reason
    monkeypatch.setattr("recipes.serve.plan.cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.warns(UserWarning, match=f"scoring with {backend}-float32"):
        scorer = Scorer(exported, backend, precision="int8")
    with scorer:
        assert scorer.form == f"{backend}-float32"
        assert np.isfinite(np.stack(list(scorer.score([("red shoe", "blue lamp")])))).all()


def test_an_export_with_a_file_too_few_or_a_torn_record(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "exported")
    (folder / FILES["onnx-float32"]).unlink()
    with pytest.raises(UserError, match=r"model\.onnx: no such file, though export\.json names it"):
        Scorer(folder, "onnx", precision="float32")
    (folder / "export.json").write_text('{"forms": ')
    with pytest.raises(UserError, match=r"export\.json: not the record of an export"):
        Scorer(folder)


def test_a_plain_classifier_is_not_exported_as_a_random_student(tmp_path):
    BertForSequenceClassification(tiny_config(num_labels=4)).save_pretrained(tmp_path / "plain")
    save_tokenizer(tiny_tokenizer(), tmp_path / "plain")
    with pytest.raises(UserError, match="a plain bert, no LRKD student"):
        export(ExportArguments(model=str(tmp_path / "plain"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named():
    with pytest.raises(UserError, match="openvino: its library is not installed"):
        choose("openvino", "auto", ALL, {"torch"}, set())
    with pytest.raises(UserError, match="onnx: nothing was exported"):
        choose("onnx", "auto", set(), {"onnx", "torch"}, set())
    with pytest.raises(UserError, match="precision int8: there is no such form"):
        choose("auto", "int8", {"onnx-float32"}, {"onnx", "torch"}, {"avx_vnni"})
