"""The Space, visited: a browser types, clicks, uploads and reads; a client calls; nothing is fetched from outside."""

import csv
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client
from gradio_client.exceptions import AppError

from tests.space.conftest import SPACE

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1200, "height": 900}
PATIENCE = 60_000  # ms; a loaded machine is slow, not wrong
EVIL = '<img src=x onerror="window.hacked=1"> {{constructor}} ${window.hacked=1} [x](javascript:window.hacked=1)'
LABELS = ["Exact", "Substitute", "Complement", "Irrelevant"]


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


@pytest.fixture
def visit(browser, address):
    """A function that opens the page; at the end, no page may have complained or asked for anything outside."""
    contexts, complaints = [], []

    def open_page(size=DESKTOP, theme="light"):
        context = browser.new_context(viewport=size, color_scheme=theme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: outside(request.url) and complaints.append(f"asked for {request.url}"))
        page.goto(address)
        page.locator("#score").wait_for()
        return page

    def outside(url):
        return not url.startswith((address, "data:", "blob:"))

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def fill(page, name, text):
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def score(page, query, product):
    fill(page, "query", query)
    fill(page, "product", product)
    page.locator("#score").click()


def rank(page, query, products):
    page.get_by_role("tab", name="Many products").click()
    fill(page, "many-query", query)
    fill(page, "paste", products)
    page.locator("#rank").click()


def titles(page):
    page.locator(".lr-table").wait_for()
    return page.locator(".lr-title bdi").all_inner_texts()


def error(page):
    page.locator(".lr-error").wait_for()
    return page.locator(".lr-error").inner_text()


def test_a_pair_shows_what_the_model_says(visit, client):
    page = visit()
    assert page.locator("#result").inner_text().count("–") == len(LABELS)
    fill(page, "query", "red shoe")
    fill(page, "product", "Blue running shoe")
    page.locator("#product textarea, #product input").first.press("Enter")
    page.locator(".lr-facts").wait_for()
    said = client.predict("red shoe", "Blue running shoe", api_name="/score")
    text = " ".join(page.locator("#result").inner_text().split())
    assert f"{said['label']} {said['probabilities'][said['label']]:.1%}" in text
    for label in LABELS:
        assert f"{label} {said['probabilities'][label]:.1%}" in text
    assert f"Expected gain {said['score']:.3f}" in text
    assert f"Tier {said['tier']} of 0 to 4" in text
    assert re.search(r"Latency [\d.,]+ ms", text)
    nearest = max(said["perspectives"], key=said["perspectives"].get).replace("_", " ")
    assert f"lies closest to {nearest}" in text
    widths = page.locator(".lr-fill").evaluate_all("bars => bars.map(b => b.offsetWidth / b.parentElement.offsetWidth)")
    assert widths == pytest.approx([said["probabilities"][label] for label in LABELS], abs=0.03)


def test_every_example_fills_and_runs_with_one_click(visit):
    page = visit()
    for number in range(6):
        page.locator("#result").evaluate("place => place.querySelector('.lr-facts')?.remove()")
        page.locator("#pair-examples button").nth(number).click()
        page.locator(".lr-facts").wait_for()
        assert page.locator("#query textarea, #query input").first.input_value()
    page.get_by_role("tab", name="Many products").click()
    page.locator("#list-examples button").nth(3).click()
    assert "静音 ワイヤレスマウス 2.4GHz 単三電池 ブラック" in titles(page)


def test_a_pasted_list_is_ranked_charted_and_downloaded(visit, client, tmp_path):
    products = ["red shoe", "=1+1", "garden hose 20 m", "سماعات لاسلكية", "👩‍💻 shoe"]
    page = visit()
    rank(page, "red shoe", "\n".join(products))
    said = client.predict("red shoe", products, api_name="/rank")
    assert [product["rank"] for product in said] == [1, 2, 3, 4, 5]
    assert titles(page) == [product["title"] for product in said]
    assert page.locator(".lr-gain").all_inner_texts() == [f"{product['score']:.3f}" for product in said]
    assert page.locator(".lr-columns i").count() == len(products)
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["title"].removeprefix("'") for row in rows] == [product["title"] for product in said]
    assert "'=1+1" in [row["title"] for row in rows]
    expected = {"query", "rank", "title", "label", "expected_gain", "tier"} | {f"p_{label}" for label in LABELS}
    near = {"closeness_user_intent", "closeness_structured_analysis", "closeness_business_rule"}
    assert set(rows[0]) == expected | near


def test_an_uploaded_file_wins_over_the_text(visit, tmp_path):
    path = tmp_path / "products.csv"
    path.write_bytes("﻿product_id;Title;price\nB1;red shoe;9\nB2;Crème;8\n".encode())
    page = visit()
    page.get_by_role("tab", name="Many products").click()
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#upload").get_by_text("products").first.wait_for()
    rank(page, "red shoe", "from the text")
    assert sorted(titles(page)) == ["Crème", "red shoe"]
    assert sorted(page.locator(".lr-title small").all_inner_texts()) == ["B1", "B2"]
    path.write_text("sku,price\n1,2\n")
    page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#upload").get_by_text("products").first.wait_for()
    page.locator("#rank").click()
    assert "no title column" in error(page)
    assert not page.locator("#download").is_visible()


def test_what_is_too_much_is_refused_with_a_reason(visit, tmp_path):
    page = visit()
    page.locator("#score").click()
    assert "Type a query" in error(page)
    rank(page, "red shoe", "")
    assert "Paste product titles" in error(page)
    fill(page, "paste", "x" * 10_000_000)
    page.locator("#rank").click()
    page.get_by_text("10,000,000 characters were pasted; at most 500,000").wait_for()
    path = tmp_path / "products.csv"
    path.write_text("title\n" + "a red running shoe, size 42\n" * 100_000)
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#upload").get_by_text("products").first.wait_for()
    page.locator("#rank").click()
    page.get_by_text("The file has 2.8 MB; at most 2 MB and 500 rows").wait_for()
    assert "Traceback" not in page.content()


def test_a_malicious_title_is_text(visit):
    page = visit()
    score(page, EVIL, EVIL)
    page.locator(".lr-facts").wait_for()
    rank(page, EVIL, f"{EVIL}\nred shoe")
    assert EVIL in titles(page)
    assert EVIL in page.locator(".lr-summary").inner_text()
    assert page.locator(f".lr-columns i[title*='{EVIL[:20]}']").count() == 1
    score_tab = page.get_by_role("tab", name="One product")
    score_tab.click()
    assert page.evaluate("window.hacked") is None
    assert page.locator(".lr-ranking img, .lr-ranking script, .lr-ranking a").count() == 0


def test_the_other_model_has_other_labels(visit):
    page = visit()
    page.get_by_role("radio").nth(1).click()
    page.locator("#result", has_text="Brand Mismatch").wait_for()
    score(page, "red shoe", "Blue shoe")
    page.locator(".lr-facts").wait_for()
    text = page.locator("#result").inner_text()
    assert "Tier" not in text
    assert "saved without its teacher's perspectives" in text


def test_a_phone_scrolls_down_only(visit):
    page = visit(PHONE, "dark")
    long = "x" * 600
    score(page, "red shoe", long)
    page.locator(".lr-facts").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    rank(page, long[:200], f"{long}\nred shoe")
    assert len(titles(page)) == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = page.locator(".lr-table td").evaluate_all("cells => cells.map(c => c.getBoundingClientRect().right)")
    assert max(boxes) <= PHONE["width"]
    for button in ("#rank", "#download"):
        page.locator(button).scroll_into_view_if_needed()
        assert page.locator(button).bounding_box()["height"] >= 24  # WCAG 2.2, target size


def test_the_theme_is_the_systems_until_it_is_chosen_and_then_kept(visit):
    page = visit(theme="dark")
    is_dark = "document.body.classList.contains('dark')"
    page.wait_for_function(is_dark)
    page.locator("#theme").click()
    page.wait_for_function(f"!{is_dark}")
    page.reload()
    page.locator("#score").wait_for()
    page.wait_for_function(f"!{is_dark}")


def test_a_pair_can_be_scored_with_the_keyboard_alone(visit):
    page = visit()
    page.locator("#query textarea, #query input").first.focus()
    page.keyboard.type("red shoe")
    page.keyboard.press("Tab")
    page.keyboard.type("blue shoe")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "score"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator(".lr-facts").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_fault(visit, theme):
    page = visit(theme=theme)
    faults = []

    def check(state):
        for fault in Axe().run(page).response["violations"]:
            if fault["impact"] in ("serious", "critical"):
                faults.extend(f"{state}: {fault['id']} {node['html'][:200]}" for node in fault["nodes"])

    score(page, "red shoe", "")
    error(page)
    check("error")
    score(page, "red shoe", "blue shoe")
    page.locator(".lr-facts").wait_for()
    page.get_by_text("Use it from code").click()
    page.locator(".lr-code").wait_for()
    check("pair")
    rank(page, "red shoe", "red shoe\nblue shoe\ngarden hose")
    titles(page)
    check("ranking")
    assert faults == []


def test_the_snippet_of_the_card_runs_and_is_the_pages(visit, address, capsys):
    code = re.search(r"```python\n(.*?)```", (SPACE / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    page = visit()
    page.get_by_text("Use it from code").click()
    assert page.locator(".lr-code").inner_text().strip() == code.replace("http://127.0.0.1:7860", address).strip()
    exec(code.replace("http://127.0.0.1:7860", address), {})
    printed = capsys.readouterr().out
    assert "Silicone case for earbuds" in printed
    assert "{'Exact': " in printed


def test_a_client_is_refused_as_a_visitor_is(client, students):
    with pytest.raises(AppError, match="Type a query"):
        client.predict(" ", "shoe", api_name="/score")
    with pytest.raises(AppError, match="501 products were given"):
        client.predict("shoe", ["shoe"] * 501, api_name="/rank")
    with pytest.raises(AppError, match="This Space offers"):
        client.predict("shoe", "shoe", "somebody/else", api_name="/score")
    assert set(client.predict("shoe", "shoe", str(students[1]), api_name="/score")["probabilities"]) != set(LABELS)


def test_only_two_functions_can_be_called(client):
    assert sorted(client.view_api(return_format="dict")["named_endpoints"]) == ["/rank", "/score"]
