"""A Space that scores products for a query with an LRKD student, one at a time or as a ranked list.

python space/app.py --model runs/demo/students/lrkd-gat-0          (make space)
python space/app.py --model owner/name owner/other-name            several: the page lets the visitor choose
LRKD_MODELS=owner/name@revision python space/app.py                as on the Hub, where space.json may name them too

It needs the Hub or a folder with a model, and what requirements.txt names. GRADIO_MCP_SERVER=True offers `score` and
`rank` as tools over MCP (needs gradio[mcp]).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 16
WAITING = 20  # visitors in the queue; the next one is told to come back
KEPT = 3600  # seconds that uploads and downloads stay
# Gradio follows the system's theme; the button and what it remembers win over it.
TOGGLE_THEME = """() => {
  const dark = document.body.classList.toggle("dark");
  try { localStorage.setItem("lrkd-theme", dark ? "dark" : "light"); } catch (error) { /* private window */ }
}"""
REMEMBER_THEME = """() => {
  let theme = null;
  try { theme = localStorage.getItem("lrkd-theme"); } catch (error) { /* private window */ }
  if (theme) document.body.classList.toggle("dark", theme === "dark");
}"""


def score_pair(
    relevance: Callable[..., Any], query: str, product: str, explains: bool = False
) -> tuple[dict[str, Any], float]:
    """Score one pair.

    Args:
        relevance: An `lrkd-relevance` pipeline.
        query: What the shopper searched for.
        product: The title.
        explains: The model has a rationale bank: look up the nearest rationale of each perspective.

    Returns:
        What the `lrkd-relevance` pipeline says of the product, and the milliseconds it took.

    Raises:
        products.InputError: The query or the title is empty or too long.
    """
    from products import check_query, check_title

    options = {"explanations": 1} if explains else {}
    ranking, milliseconds = _timed(relevance, check_query(query), [{"title": check_title(product)}], **options)
    return ranking[0], milliseconds


def rank_products(
    relevance: Callable[..., Any], query: str, products: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], float]:
    """Rank the products of a query, best first.

    Returns:
        What the `lrkd-relevance` pipeline says of each product, and the milliseconds it took.

    Raises:
        products.InputError: The query is empty or too long.
    """
    from products import check_query

    asked = [{name: value for name, value in product.items() if name != "columns"} for product in products]
    return _timed(relevance, check_query(query), asked)


def _timed(
    relevance: Callable[..., Any], query: str, products: list[dict[str, Any]], **options: int
) -> tuple[list[dict[str, Any]], float]:
    from products import InputError

    started = time.perf_counter()
    try:
        ranking = relevance({"query": query, "products": products}, batch_size=BATCH_SIZE, **options)
    except (ValueError, RuntimeError) as error:  # what the pipeline refuses, and what the model cannot compute
        raise InputError(str(error)) from None
    return ranking, 1000 * (time.perf_counter() - started)


def build_demo(models: Any, source: str = "http://127.0.0.1:7860") -> Any:
    """Build the page.

    Args:
        models: A `models.Models`; the first is loaded now, the others when they are chosen.
        source: Where a client finds this page: an address, or the name of the Space.

    Returns:
        A `gradio.Blocks`; start it with `.launch(**appearance())`.
    """
    import gradio as gr

    import views
    from models import ModelError, is_local
    from products import MAX_PRODUCTS, InputError, check_query, check_titles, read_csv, read_paste, write_csv

    examples = json.loads((HERE / "examples.json").read_text(encoding="utf-8"))
    first = models[None]
    folder = Path(tempfile.mkdtemp(prefix="lrkd-space-"))

    def tiers(relevance: Any) -> int | None:
        thresholds = relevance.model.config.tier_thresholds
        return None if thresholds is None else len(thresholds) + 1

    def describe(name: str) -> tuple[str, str, str, Any]:
        try:
            chosen = models[name]
        except ModelError as error:
            return views.error(error), views.empty_pair([]), views.empty_ranking(), gr.DownloadButton(visible="hidden")
        line = views.model_line(name, chosen.labels, chosen.parameters, chosen.extractor, is_local(name))
        return line, views.empty_pair(chosen.labels), views.empty_ranking(), gr.DownloadButton(visible="hidden")

    def show_pair(name: str, query: str, product: str) -> str:
        try:
            chosen = models[name]
            result, milliseconds = score_pair(chosen.relevance, query, product, chosen.explains)
        except (InputError, ModelError) as error:
            return views.error(error)
        return views.pair(result, chosen.labels, milliseconds, tiers(chosen.relevance), chosen.is_calibrated)

    def show_ranking(name: str, query: str, pasted: str, path: str | None) -> tuple[str, Any]:
        try:
            chosen = models[name]
            query = check_query(query)
            given = read_csv(path) if path else read_paste(pasted)
            ranking, milliseconds = rank_products(chosen.relevance, query, given)
        except (InputError, ModelError) as error:
            return views.error(error), gr.DownloadButton(visible="hidden")
        table = write_csv(_new_folder(folder) / "ranking.csv", query, ranking, given)
        return views.ranking(query, ranking, chosen.labels, milliseconds), gr.DownloadButton(
            value=table, visible=True, interactive=True
        )

    def score(query: str, product: str, model: str | None = None) -> dict[str, Any]:
        """Say how relevant one product is to a shopping query.

        Args:
            query: What the shopper searched for.
            product: The title of the product.
            model: One of the models that the page offers; the first one if left out.
        """
        try:
            chosen = models[model]
            result, milliseconds = score_pair(chosen.relevance, query, product, chosen.explains)
        except (InputError, ModelError) as error:
            raise gr.Error(views.escape(error), print_exception=False) from None
        return {**result, "latency_ms": milliseconds, "model": model or models.names[0]}

    def rank(query: str, products: list[str], model: str | None = None) -> list[dict[str, Any]]:
        """Rank products by how relevant they are to a shopping query, best first.

        Args:
            query: What the shopper searched for.
            products: The titles of the products.
            model: One of the models that the page offers; the first one if left out.
        """
        try:
            return rank_products(models[model].relevance, query, check_titles(products))[0]
        except (InputError, ModelError) as error:
            raise gr.Error(views.escape(error), print_exception=False) from None

    # One at a time: a second thread would only slow the first one on the cores of a Space.
    alone = {"concurrency_id": "model", "concurrency_limit": 1}
    quiet = {**alone, "api_visibility": "private", "show_progress": "minimal"}
    with gr.Blocks(title="LRKD: think broad, act fast", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as demo:
        with gr.Row(elem_classes="lr-top"):
            gr.HTML(views.header(), apply_default_css=False)
            theme = gr.Button("Light / dark", size="sm", elem_id="theme", scale=0)
        model = gr.Radio(
            models.names, value=models.names[0], label="Model", visible=len(models.names) > 1, elem_id="model"
        )
        name = models.names[0]
        model_line = gr.HTML(
            views.model_line(name, first.labels, first.parameters, first.extractor, is_local(name)),
            apply_default_css=False,
        )
        with gr.Tabs():
            with gr.Tab("One product", id="one"), gr.Row(elem_classes="lr-columns-two", equal_height=False):
                with gr.Column(min_width=280):
                    query = gr.Textbox(label="Query", placeholder="wireless earbuds", max_lines=1, elem_id="query")
                    product = gr.Textbox(
                        label="Product title", placeholder="Silicone case for earbuds", max_lines=4, elem_id="product"
                    )
                    run = gr.Button("Score", variant="primary", elem_id="score")
                    with gr.Row(elem_classes="lr-examples", elem_id="pair-examples"):
                        gr.HTML(views.EXAMPLES, apply_default_css=False)
                        pairs = [gr.Button(pair["language"], size="sm", min_width=60) for pair in examples["pairs"]]
                with gr.Column(min_width=280):
                    result = gr.HTML(views.empty_pair(first.labels), apply_default_css=False, elem_id="result")
            with gr.Tab("Many products", id="many"):
                with gr.Row(elem_classes="lr-columns-two", equal_height=False):
                    with gr.Column(min_width=280):
                        many_query = gr.Textbox(
                            label="Query", placeholder="usb c charger 65w", max_lines=1, elem_id="many-query"
                        )
                        with gr.Row(elem_classes="lr-examples", elem_id="list-examples"):
                            gr.HTML(views.EXAMPLES, apply_default_css=False)
                            lists = [gr.Button(many["language"], size="sm", min_width=60) for many in examples["lists"]]
                        upload = gr.File(
                            label="Or a CSV with a title column",
                            file_types=[".csv", ".tsv", ".txt"],
                            height=150,
                            elem_id="upload",
                        )
                    with gr.Column(min_width=280):
                        pasted = gr.Textbox(
                            label=f"Products, one a line (at most {MAX_PRODUCTS})",
                            lines=9,
                            max_lines=9,
                            elem_id="paste",
                        )
                        run_many = gr.Button("Rank", variant="primary", elem_id="rank")
                ranked = gr.HTML(views.empty_ranking(), apply_default_css=False, elem_id="ranked")
                download = gr.DownloadButton("Download CSV", visible="hidden", elem_id="download", size="sm")
        with gr.Accordion("Use it from code", open=False, elem_id="code"):
            gr.HTML(views.snippet(source), apply_default_css=False)

        scoring = {"fn": show_pair, "inputs": [model, query, product], "outputs": result, **quiet}
        ranking = {
            "fn": show_ranking,
            "inputs": [model, many_query, pasted, upload],
            "outputs": [ranked, download],
            **quiet,
        }
        gr.on([run.click, query.submit, product.submit], **scoring)
        gr.on([run_many.click, many_query.submit], **ranking)
        for button, pair in zip(pairs, examples["pairs"], strict=True):
            filled = (pair["query"], pair["product"])
            button.click(lambda filled=filled: filled, None, [query, product], api_visibility="private").then(**scoring)
        for button, many in zip(lists, examples["lists"], strict=True):
            filled = (many["query"], "\n".join(many["products"]), None)
            button.click(
                lambda filled=filled: filled, None, [many_query, pasted, upload], api_visibility="private"
            ).then(**ranking)
        model.change(describe, model, [model_line, result, ranked, download], **quiet)
        theme.click(None, js=TOGGLE_THEME)
        demo.load(None, js=REMEMBER_THEME)
        gr.api(score, api_name="score", **alone)
        gr.api(rank, api_name="rank", **alone)
    return demo.queue(max_size=WAITING, api_open=False)  # nobody passes the queue by


def _new_folder(parent: Path) -> Path:
    """Return a new folder in `parent`, and remove those that are old."""
    for old in parent.iterdir():
        if time.time() - old.stat().st_mtime > KEPT:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=parent))


def appearance() -> dict[str, Any]:
    """Return what `launch` needs to make the page look and behave as it should, here and on the Hub."""
    import gradio as gr

    font = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]  # nothing is fetched
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=font,
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    ).set(
        color_accent_soft_dark="#13302d",
        checkbox_background_color_selected="#0f766e",
        checkbox_background_color_selected_dark="#0d9488",
        checkbox_border_color_selected="#0f766e",
        checkbox_border_color_selected_dark="#2dd4bf",
        body_background_fill="#f7f9fa",
        body_background_fill_dark="#0d1417",
        input_background_fill="#f4f7f9",
        input_background_fill_dark="#1d2930",
        input_placeholder_color="#5b6b7a",
        input_placeholder_color_dark="#93a4af",
        button_secondary_background_fill_dark="#26343c",
        button_secondary_background_fill_hover_dark="#32434c",
        block_background_fill="#ffffff",
        block_background_fill_dark="#151e22",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#2dd4bf",
        button_primary_background_fill_hover_dark="#5eead4",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#042f2e",
    )
    return {
        "theme": theme,
        "css_paths": HERE / "style.css",
        "footer_links": ["api"],
        "ssr_mode": False,
        "max_file_size": "20mb",  # products.MAX_FILE refuses earlier, in plain words
    }


def main() -> None:
    """Load the model and serve the page."""
    import models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[], help="Folders or names on the Hub; several: a choice.")
    parser.add_argument("--port", type=int, default=None, help="Port; the first free one from 7860 by default.")
    arguments = parser.parse_args()
    try:
        chosen = models.Models(models.choose(arguments.model))
        print(f"Loading {chosen.names[0]}", flush=True)
        source = os.environ.get("SPACE_ID") or f"http://127.0.0.1:{arguments.port or 7860}"
        demo = build_demo(chosen, source)
    except models.ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    demo.launch(server_port=arguments.port, **appearance())


if __name__ == "__main__":
    main()
