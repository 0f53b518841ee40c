"""The Space, visited: a browser types, clicks, uploads and reads; a client calls; nothing is fetched from outside."""

import csv
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client
from gradio_client.exceptions import AppError

from tests.space.visiting import SPACE

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1200, "height": 900}
PATIENCE = 240_000  # ms; a loaded machine is slow, not wrong
EVIL = '<img src=x onerror="window.hacked=1"> {{constructor}} ${window.hacked=1} [x](javascript:window.hacked=1)'
IS_DARK = "document.body.classList.contains('dark')"
LABELS = ["Exact", "Substitute", "Complement", "Irrelevant"]


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def opened(browser, address):
    """One page for all tests: loading it is the slow part. And what it complained of, or asked of the outside."""
    page = browser.new_page(viewport=DESKTOP, color_scheme="light", accept_downloads=True)
    page.set_default_timeout(PATIENCE)
    complaints = []

    def is_outside(url):
        return not url.startswith((address, "data:", "blob:"))

    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: is_outside(request.url) and complaints.append(f"asked for {request.url}"))
    page.goto(address)
    page.locator("#score").wait_for()
    return page, complaints


@pytest.fixture
def page(opened):
    """The page on its first tab, on a desktop; at the end of a test it may not have complained."""
    page, complaints = opened
    page.set_viewport_size(DESKTOP)
    page.get_by_role("radio").first.check()
    set_theme(page, "light")
    remove_upload(page)
    page.get_by_role("tab", name="One product").click()
    yield page
    assert complaints == []


def fill(page, name, text):
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def set_theme(page, theme):
    if page.evaluate(IS_DARK) != (theme == "dark"):
        page.locator("#theme").click()
        page.wait_for_function(f"{IS_DARK} === {'true' if theme == 'dark' else 'false'}")


def upload(page, path):
    page.get_by_role("tab", name="Many products").click()
    remove_upload(page)
    page.locator("#upload input[type=file]").set_input_files(path)
    page.locator("#upload").get_by_text(path.stem).first.wait_for()


def remove_upload(page):
    if (remove := page.locator("#upload [aria-label^='Remove'], #upload [aria-label^='Clear']")).count():
        page.get_by_role("tab", name="Many products").click()
        remove.first.click()
        page.locator("#upload input[type=file]").wait_for(state="attached")


def open_code(page):
    if not page.locator(".lr-code").is_visible():
        page.get_by_text("Use it from code").click()
    page.locator(".lr-code").wait_for()


def forget(page):
    """Take away what the page shows, so that it is not taken for the next answer."""
    page.locator(".lr-result, .lr-ranking, .lr-error").evaluate_all("parts => parts.forEach(part => part.remove())")


def score(page, query, product):
    forget(page)
    fill(page, "query", query)
    fill(page, "product", product)
    page.locator("#score").click()


def rank(page, query, products):
    forget(page)
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


def test_a_pair_shows_what_the_model_says(page, client):
    forget(page)
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


def test_every_example_fills_and_runs_with_one_click(page):
    for number in range(6):
        forget(page)
        page.locator("#pair-examples button").nth(number).click()
        page.locator(".lr-facts").wait_for()
        assert page.locator("#query textarea, #query input").first.input_value()
    forget(page)
    page.get_by_role("tab", name="Many products").click()
    page.locator("#list-examples button").nth(3).click()
    assert "静音 ワイヤレスマウス 2.4GHz 単三電池 ブラック" in titles(page)


def test_a_pasted_list_is_ranked_charted_and_downloaded(page, client, tmp_path):
    products = ["red shoe", "=1+1", "garden hose 20 m", "سماعات لاسلكية", "👩‍💻 shoe"]
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


def test_an_uploaded_file_wins_over_the_text(page, tmp_path):
    path = tmp_path / "products.csv"
    path.write_bytes("\ufeffproduct_id;Title;price\nB1;red shoe;9\nB2;Crème;8\n".encode())
    upload(page, path)
    rank(page, "red shoe", "from the text")
    assert sorted(titles(page)) == ["Crème", "red shoe"]
    assert sorted(page.locator(".lr-title small").all_inner_texts()) == ["B1", "B2"]
    path.write_text("sku,price\n1,2\n")
    upload(page, path)
    page.locator("#rank").click()
    assert "no title column" in error(page)
    assert not page.locator("#download").is_visible()


def test_what_is_too_much_is_refused_with_a_reason(page, tmp_path):
    score(page, " ", "shoe")
    assert "Type a query" in error(page)
    rank(page, "red shoe", "")
    assert "Paste product titles" in error(page)
    forget(page)
    fill(page, "paste", "x" * 10_000_000)
    page.locator("#rank").click()
    page.get_by_text("10,000,000 characters were pasted; at most 500,000").wait_for()
    fill(page, "paste", "")
    path = tmp_path / "products.csv"
    path.write_text("title\n" + "a red running shoe, size 42\n" * 100_000)
    upload(page, path)
    page.locator("#rank").click()
    page.get_by_text("The file has 2.8 MB; at most 2 MB and 500 rows").wait_for()
    assert "Traceback" not in page.content()


def test_a_malicious_title_is_text(page):
    score(page, EVIL, EVIL)
    page.locator(".lr-facts").wait_for()
    rank(page, EVIL, f"{EVIL}\nred shoe")
    assert EVIL in titles(page)
    assert EVIL in page.locator(".lr-summary").inner_text()
    assert page.locator(f".lr-columns i[title*='{EVIL[:20]}']").count() == 1
    assert page.evaluate("window.hacked") is None
    assert page.locator(".lr-ranking img, .lr-ranking script, .lr-ranking a").count() == 0


def test_the_other_model_has_other_labels(page):
    page.get_by_role("radio").nth(1).check()
    page.locator("#result", has_text="Brand Mismatch").wait_for()
    assert page.locator("#result").inner_text().count("–") == 6
    score(page, "red shoe", "Blue shoe")
    page.locator(".lr-facts").wait_for()
    text = page.locator("#result").inner_text()
    assert "Tier" not in text
    assert "saved without its teacher's perspectives" in text


def test_a_phone_scrolls_down_only(page):
    page.set_viewport_size(PHONE)
    long = "x" * 600
    score(page, "red shoe", long)
    page.locator(".lr-facts").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    rank(page, long[:60], f"{long}\nred shoe")
    assert len(titles(page)) == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = page.locator(".lr-table td").evaluate_all("cells => cells.map(c => c.getBoundingClientRect().right)")
    assert max(boxes) <= PHONE["width"]
    for button in ("#rank", "#download"):
        page.locator(button).scroll_into_view_if_needed()
        assert page.locator(button).bounding_box()["height"] >= 24  # WCAG 2.2, target size


def test_the_theme_is_the_systems_until_it_is_chosen_and_then_kept(browser, address):
    page = browser.new_page(color_scheme="dark")
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.locator("#score").wait_for()
    assert page.evaluate(IS_DARK)
    set_theme(page, "light")
    page.reload()
    page.locator("#score").wait_for()
    page.wait_for_function(f"!{IS_DARK}")
    page.close()


def test_a_pair_can_be_scored_with_the_keyboard_alone(page):
    forget(page)
    fill(page, "query", "")
    fill(page, "product", "")
    page.locator("#query textarea, #query input").first.focus()
    page.keyboard.type("red shoe")
    page.keyboard.press("Tab")
    page.keyboard.type("blue shoe")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "score"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator(".lr-facts", has_text="Latency").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_fault(page, theme):
    set_theme(page, theme)
    faults = []

    def check(state):
        # Halfway through a transition the colours are nobody's.
        page.wait_for_function("document.getAnimations().every(one => one.playState !== 'running')")
        for fault in Axe().run(page).response["violations"]:
            if fault["impact"] in ("serious", "critical"):
                faults.extend(f"{state}: {fault['id']} {node['html'][:200]}" for node in fault["nodes"])

    score(page, "red shoe", "")
    error(page)
    check("error")
    score(page, "red shoe", "blue shoe")
    page.locator(".lr-facts").wait_for()
    open_code(page)
    check("pair")
    rank(page, "red shoe", "red shoe\nblue shoe\ngarden hose")
    titles(page)
    check("ranking")
    assert faults == []


def test_the_snippet_of_the_card_runs_and_is_the_pages(page, address, capsys):
    code = re.search(r"```python\n(.*?)```", (SPACE / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    open_code(page)
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
