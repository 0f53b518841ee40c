"""The benches run from end to end on tiny models, and their arithmetic is right; how fast things are is not tested."""

import json
import os
import re

import pandas as pd
import pytest
import torch
from transformers import BertConfig

from recipes.arguments import UserError
from recipes.bench.efficiency import SIZES, EfficiencyArguments, efficiency, forward_flops, read_setting
from recipes.bench.efficiency import format_tables as format_efficiency
from recipes.bench.item_cache import ItemCacheArguments, item_cache
from recipes.bench.item_cache import format_table as format_item_cache
from recipes.bench.latency import LatencyArguments, latency, plot
from recipes.bench.latency import format_table as format_latency
from recipes.bench.literal import LITERAL, LiteralExtractor
from recipes.bench.measure import interleave, paired_ratio, peak_memory, write_results
from recipes.bench.scaling import ScalingArguments, rate, scaling
from recipes.bench.student import prepare, timed_pairs
from recipes.bench.throughput import DEFAULT, ThroughputArguments, format_table, throughput
from recipes.record import weights_sha256
from recipes.schemas import PAIRS, write
from recipes.serve.export import ExportArguments, export
from tests.modeling.test_extractors import HIDDEN, make
from tests.serve.conftest import save_student
from tests.tiny import tiny_config


@pytest.mark.parametrize("latent_dim", [HIDDEN, 5])
@pytest.mark.parametrize("kind", ["mlp", "poly", "gat"])
def test_the_literal_form_of_the_bench_is_the_equations(kind, latent_dim):
    extractor, equations = make(kind, latent_dim)
    hidden_states = torch.randn(3, 7, HIDDEN)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    with torch.no_grad():
        literal = LiteralExtractor(extractor, kind)(hidden_states, mask)
        torch.testing.assert_close(literal, equations(extractor, hidden_states, mask), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(literal, extractor(hidden_states, mask), atol=1e-5, rtol=1e-4)
    assert set(LITERAL) == {"mlp", "poly", "gat"}


def test_every_variant_runs_once_a_round_and_another_one_begins():
    order = []
    seconds = interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3, "rounds")
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the first round warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_no_round_begins_once_patience_is_over_but_three_are_run():
    def nothing():
        pass

    assert len(interleave({"a": nothing}, 9, "rounds", patience=0)["a"]) == 3
    assert len(interleave({"a": nothing}, 2, "rounds", patience=0)["a"]) == 2


def test_a_drift_that_hits_both_leaves_the_ratio():
    drift = [1.0, 3.0, 9.0, 2.0]
    assert paired_ratio([2 * value for value in drift], drift) == {"median": 2.0, "low": 2.0, "high": 2.0}
    spread = paired_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert spread["low"] < spread["median"] == 2.0 < spread["high"]


def test_peak_memory_sees_what_a_block_takes():
    with peak_memory() as memory:
        kept = torch.ones(64 * 2**20 // 4)
    assert 60 * 2**20 < memory["peak_bytes"] < 400 * 2**20
    assert len(kept)


def test_peak_memory_sees_the_last_moment_of_a_block(monkeypatch):
    resident = [100]
    monkeypatch.setattr("recipes.bench.measure.resident_bytes", lambda: resident[0])
    with peak_memory() as memory:
        resident[0] = 500  # and no millisecond passes before the end
    assert memory["peak_bytes"] == 400


def test_operations_of_a_forward_pass():
    """Two layers, hidden 16, inner 24, 3 tokens: 2·(4·16² + 2·16·24) + 4·3·16 a token and layer."""
    assert forward_flops(tiny_config(), pairs=5, length=3) == 2 * (2 * (1024 + 768) + 192) * 15


@pytest.mark.parametrize("setting", ["flash-float32", "sdpa-int8", "sdpa", "sdpa-float32-fast"])
def test_a_setting_that_is_none(setting):
    with pytest.raises(UserError, match=f"--settings {setting}: expected"):
        read_setting(setting)


def test_efficiency_on_a_tiny_encoder(tmp_path):
    settings = ["eager-float32", "eager-bfloat16"]
    arguments = EfficiencyArguments(
        output=str(tmp_path), size="tiny", pairs=2, length=6, rounds=2, settings=settings, training_pairs=2
    )
    content = efficiency(arguments)
    variants = content["settings"]["eager-float32"]["variants"]
    assert [*content["settings"], *content["left_out"]] == settings  # bfloat16 where this machine multiplies it
    assert list(variants) == ["plain", "mlp", "poly", "gat", "mlp, literal", "poly, literal", "gat, literal"]
    assert variants["plain"]["over_plain"]["median"] == 1.0
    # Two layers over 6 tokens of 16 numbers, and the classifier; GAT adds W and a over the pooled tokens, not each one.
    plain = variants["plain"]["operations"]
    config = BertConfig(**SIZES["tiny"])
    assert forward_flops(config, 2, 6) < plain < 1.05 * forward_flops(config, 2, 6)
    assert 1 < variants["gat"]["operations_over_plain"] < variants["gat, literal"]["operations_over_plain"]
    # 6 labels over [h ; r] instead of h, the projection to 1024, W and a: 16·6 + 16·1024 + 1024 + 16² + 32.
    assert content["parameters"]["gat"] - content["parameters"]["plain"] == 96 + 16384 + 1024 + 256 + 32
    assert set(content["training"]) == {"plain", "gat"}
    write_results(tmp_path, "efficiency", content, format_efficiency(content))
    assert json.loads((tmp_path / "efficiency.json").read_text())["parameters"] == content["parameters"]
    assert "| gat, literal |" in (tmp_path / "efficiency.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bfloat16")
def test_bfloat16_that_a_cpu_only_emulates_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.serve.plan.cpu_flags", lambda: frozenset({"avx2"}))
    options = {"output": str(tmp_path), "size": "tiny", "pairs": 2, "length": 6, "rounds": 2, "training_rounds": 2}
    content = efficiency(EfficiencyArguments(**options, settings=["eager-bfloat16", "eager-float32"], literal=False))
    assert set(content["settings"]) == {"eager-float32"}
    text = format_efficiency(content)
    assert "Left out: eager-bfloat16 (this CPU has no instructions for bfloat16)." in text
    assert "AdamW, float32, guidance" in text
    assert text.count("bfloat16") == 2
    with pytest.raises(
        UserError, match=r"--settings sdpa-bfloat16: this CPU has no instructions for .* Add sdpa-float32"
    ):
        efficiency(EfficiencyArguments(**options, settings=["sdpa-bfloat16"]))


def test_compiled_forms_are_timed_where_torch_can_compile(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.bench.efficiency.KINDS", ("gat",))  # each graph takes torch a while
    options = {"output": str(tmp_path), "size": "tiny", "pairs": 2, "length": 6, "rounds": 2, "training_pairs": 0}
    settings = ["sdpa-float32", "sdpa-float32-compiled"]
    content = efficiency(EfficiencyArguments(**options, settings=settings))
    assert [*content["settings"], *content["left_out"]] == settings
    if not content["left_out"] and not torch.cuda.is_available():
        assert list(content["settings"]["sdpa-float32-compiled"]["variants"]) == ["plain", "gat"]
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/such/compiler"))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch.compiler.reset()
    content = efficiency(EfficiencyArguments(**options, settings=settings))
    assert list(content["settings"]) == ["sdpa-float32"]
    expected = r"Left out: sdpa-float32-compiled \(torch.compile does not work here: .*[Cc]ompiler"
    assert re.search(expected, format_efficiency(content))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student, its pairs, and a work folder that holds its export, float32 alone."""
    folder = tmp_path_factory.mktemp("bench")
    student = save_student(folder / "student")
    frame = pd.DataFrame({"query": ["red shoe"] * 12, "product_title": ["lamp", "red shoe", "shoe lace x"] * 4})
    frame = frame.assign(label=["Exact", "Irrelevant"] * 6, locale="us", pair_id=[str(row) for row in range(12)])
    write(frame, folder / "pairs" / "test.parquet", PAIRS)
    exported = folder / "work" / f"exported-{weights_sha256(student)[:12]}"
    export(ExportArguments(model=str(student), output=str(exported)))
    return {"model": str(student), "pairs": str(folder / "pairs"), "work": str(folder / "work"), "labels": "esci"}


def test_throughput_scores_the_same_with_every_system(world, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.serve.plan.cpu_flags", lambda: frozenset({"amx_bf16", "amx_int8"}))
    content = throughput(ThroughputArguments(**world, output=str(tmp_path), rows=12, rounds=2, threads=1))
    rates = content["pairs_per_second"]
    assert {DEFAULT, "ONNX Runtime dynamic int8", "OpenVINO bfloat16", content["ours"]} < set(rates)
    assert content["over_default"][DEFAULT]["median"] == 1.0
    float32 = [value for name, value in content["macro_f1"].items() if "float32" in name]
    assert len(float32) > 3
    assert set(float32) == {float32[0]}
    write_results(tmp_path, "throughput", content, format_table(content))
    text = (tmp_path / "throughput.md").read_text()
    assert content["best_peer"] in text
    assert "Matrix products alone, in int8" in text
    assert "Left out" not in text
    assert world["work"] not in text + (tmp_path / "throughput.json").read_text()


def test_throughput_without_int8_and_bfloat16_in_hardware(world, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.serve.plan.cpu_flags", lambda: frozenset({"avx2"}))
    content = throughput(ThroughputArguments(**world, output=str(tmp_path), rows=4, rounds=1, threads=1))
    assert set(content["left_out"]) == {"CrossEncoder bfloat16", "OpenVINO bfloat16"}
    assert not content["left_out"].keys() & content["pairs_per_second"].keys()
    assert "ONNX Runtime dynamic int8" in content["pairs_per_second"]  # a peer may gain by it all the same
    text = format_table(content)
    assert "Left out: CrossEncoder bfloat16, OpenVINO bfloat16 (this CPU has no instructions for bfloat16)." in text
    assert "no instructions for int8" in text
    assert "Matrix products" not in text


@pytest.mark.parametrize(("flags", "precision"), [({"avx2"}, "float32"), ({"avx512_bf16"}, "bfloat16")])
def test_stored_products_are_timed_in_what_the_cpu_multiplies(flags, precision, world, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.serve.plan.cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr("recipes.serve.item_cached.cpu_flags", lambda: frozenset(flags))
    options = {"variants": ["k=1,marks", "k=1,q=1"], "candidates": [3, 5], "rounds": 1, "threads": 1, "patience": 0.0}
    content = item_cache(ItemCacheArguments(**world, output=str(tmp_path), **options))
    assert [store["dtype"] for store in content["stores"]] == ["float32", "float16", "int8", "float16"]
    assert content["stores"][0][f"largest_difference_openvino_{precision}"] < 0.05
    text = format_item_cache(content)
    assert f"| 3 | k=1,marks, float16 store, openvino {precision} |" in text
    assert f"| 3 | k=1,q=1, float16 store, openvino {precision} |" in text
    assert ("OpenVINO bfloat16 (this CPU has no instructions for bfloat16)" in text) == (precision == "float32")
    assert "5 candidates (a round would take about" in text  # longer than no time at all


def test_latency_of_one_query(world, tmp_path, capfd):
    content = latency(
        LatencyArguments(**world, output=str(tmp_path), candidates=[2, 5], threads=[1], plain_up_to=2, seconds=0.0)
    )
    cells = [(cell["candidates"], cell["system"]) for cell in content["cells"]]
    assert cells == [(2, "plain torch"), (2, "scorer"), (5, "scorer")]
    assert all(cell["repeats"] == 1 for cell in content["cells"])  # each takes longer than no time at all
    assert all(cell["resident_bytes"] > 2**20 for cell in content["cells"])
    assert re.search(r"\| 5 \| 1 \| scorer \(openvino-float32\) \| \d+ ms \|  \|  \|", format_latency(content))
    plot(content, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 1000
    assert "Traceback" not in capfd.readouterr().err  # of the processes that answered


def test_a_rate_counts_the_rows_that_came_after_the_first_partition(tmp_path):
    for number, (rows, second) in enumerate([(200, 10), (200, 11), (50, 14)]):
        path = tmp_path / f"part-{number:05d}.parquet"
        pd.DataFrame({"query": ["a"] * rows}).to_parquet(path)
        os.utime(path, ns=(second * 10**9, second * 10**9))
    assert rate(tmp_path) == (200 + 50) / (14 - 10)


def test_options_that_cannot_be_measured(tmp_path, world):
    options = {**world, "output": str(tmp_path)}
    with pytest.raises(UserError, match=r"--variants k=3: .* has 2 layers, got 3"):
        item_cache(ItemCacheArguments(**options, variants=["k=1", "k=3"], candidates=[2], threads=1))
    with pytest.raises(UserError, match=r"--variants k=1,q=2: query_layers: .* has 2 layers, of which 1 read"):
        item_cache(ItemCacheArguments(**options, variants=["k=1,q=2"], candidates=[2], threads=1))
    for variant in ("4", "k=0", "k=4,marks,both", "k=4,q=1,marks", "k=4,q="):
        with pytest.raises(UserError, match=f"--variants {variant}: expected k=4, k=4,marks"):
            item_cache(ItemCacheArguments(**options, variants=["k=1", variant]))
    with pytest.raises(UserError, match="--variants: expected at least one"):
        item_cache(ItemCacheArguments(**options, variants=[]))
    for name in ("rounds", "threads"):
        for bench, arguments in ((item_cache, ItemCacheArguments), (throughput, ThroughputArguments)):
            with pytest.raises(UserError, match=f"--{name} 0: expected at least 1"):
                bench(arguments(**options, **{name: 0}))
    with pytest.raises(UserError, match=r"the student: classifies into Exact, .* the label schema 'aliexpress6'"):
        throughput(ThroughputArguments(**{**options, "labels": "aliexpress6"}))
    with pytest.raises(UserError, match="--length 513: the encoder takes at most 512 tokens"):
        efficiency(EfficiencyArguments(output=str(tmp_path), size="tiny", length=513))
    with pytest.raises(UserError, match="rows: expected more than a partition, 200, got 200"):
        scaling(ScalingArguments(**options, rows=200))


def test_pairs_that_cannot_be_timed(tmp_path, world):
    pd.DataFrame({"query": ["a"], "title": ["b"]}).to_parquet(tmp_path / "columns.parquet")
    with pytest.raises(UserError, match="column 'product_title' is missing; found query, title"):
        timed_pairs(tmp_path / "columns.parquet", 9)
    (tmp_path / "empty.csv").write_text("query,product_title\n")
    with pytest.raises(UserError, match=r"empty\.csv: no rows"):
        timed_pairs(tmp_path / "empty.csv", 9)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"torn\.parquet: not readable"):
        timed_pairs(tmp_path / "torn.parquet", 9)
    (tmp_path / "gap.csv").write_text("query,product_title\na,b\nc,\n")
    with pytest.raises(UserError, match=r"gap\.csv: row 1, column 'product_title': is nan; expected text"):
        timed_pairs(tmp_path / "gap.csv", 9)
    assert len(timed_pairs(tmp_path / "gap.csv", 1)) == 1
    with pytest.raises(UserError, match="no such file"):
        timed_pairs(tmp_path / "absent.parquet", 9)
    with pytest.raises(UserError, match="go together"):
        prepare(world["model"], None, "esci", world["work"])
