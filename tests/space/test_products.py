"""What a visitor may give, and what the CSV holds."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from products import (
    MAX_FILE,
    MAX_PRODUCTS,
    MAX_QUERY,
    MAX_TEXT,
    MAX_TITLE,
    InputError,
    check_query,
    check_title,
    check_titles,
    clean,
    read_csv,
    read_paste,
    write_csv,
)


def titles(products):
    return [product["title"] for product in products]


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_clean_text_is_one_line_that_any_encoder_takes(text):
    cleaned = clean(text)
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned == cleaned.strip()
    assert all(c.isprintable() or c in "\u200c\u200d" for c in cleaned)
    assert clean(cleaned) == cleaned


@pytest.mark.parametrize("text", ["무선 청소기 👩‍💻", "سماعات لاسلكية", "café à la crème", "価格 ￥1,000"])
def test_scripts_and_emoji_stay_as_they_are(text):
    assert clean(text) == text


def test_what_is_taken_away_leaves_no_second_space():
    assert clean("a \u200b b\xa0 c") == "a b c"


def test_characters_that_reorder_or_hide_text_are_gone():
    assert clean("safe\u202ecod.exe\u200b\ufeff\x1b[31m") == "safecod.exe[31m"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check_query("  \n"), "Type a query"),
        (lambda: check_query(None), "Type a query"),
        (lambda: check_query("q" * (MAX_QUERY + 1)), "301 characters; at most 300"),
        (lambda: check_title("\u200b"), "The product title is empty"),
        (lambda: check_title("t" * (MAX_TITLE + 1)), "2,001 characters; at most 2,000"),
        (lambda: check_titles([]), "No products"),
        (lambda: check_titles(["a", ""]), "Product 2 is empty"),
        (lambda: check_titles(["a"] * (MAX_PRODUCTS + 1)), "501 products were given; at most 500"),
        (lambda: read_paste("\n \n"), "Paste product titles"),
        (lambda: read_paste("a" * (MAX_TEXT + 1)), "500,001 characters were pasted; at most 500,000"),
        (lambda: read_paste("a\n" * (MAX_PRODUCTS + 1)), "501 products"),
        (lambda: read_paste("a\n\n" + "b" * (MAX_TITLE + 1)), "Line 3 has 2,001 characters"),
    ],
)
def test_what_is_refused_says_why(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_the_bounds_themselves_are_allowed():
    assert len(check_query("q" * MAX_QUERY)) == MAX_QUERY
    assert len(read_paste("\n".join(["a"] * MAX_PRODUCTS))) == MAX_PRODUCTS


def test_pasted_lines():
    assert titles(read_paste("one\r\n\n  two\twords \n\u200b\nthree")) == ["one", "two words", "three"]


CSV = 'product_id,Product Title,price\nB1,"Red shoe, ""wide""",9\n\nB2,"Two\nlines",\nB3,Crème'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_files_of_every_spreadsheet(tmp_path, encoding, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(row for row in csv.reader(io.StringIO(CSV)) if row)
    path = tmp_path / "products.csv"
    path.write_bytes(out.getvalue().encode(encoding))
    products = read_csv(path)
    assert titles(products) == ['Red shoe, "wide"', "Two lines", "Crème"]
    assert [product["product_id"] for product in products] == ["B1", "B2", "B3"]
    assert products[0]["columns"] == {"product_id": "B1", "Product Title": 'Red shoe, "wide"', "price": "9"}


def test_a_single_column_and_rows_that_are_short_or_long(tmp_path):
    path = tmp_path / "products.csv"
    path.write_text("title\nred shoe\nblue shoe,extra\n")
    assert titles(read_csv(path)) == ["red shoe", "blue shoe"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"sku,prix\n1,2\n", "no title column.*found sku, prix"),
        (b"", "no title column.*found nothing"),
        (b"title,price\n", "a header but no rows"),
        (b"title,price\nshoe,1\n,2\n", "The title in line 3 is empty"),
        (b"title\n" + b"x" * (MAX_TITLE + 1), "The title in line 2 has 2,001"),
        ("title\ncafé".encode("cp1252"), "not in UTF-8"),
        ("title\n価格".encode("shift_jis"), "not in UTF-8"),
        (b"PK\x03\x04\x00\x00title", "not text"),
        (b'title\n"' + b"x" * 140_000, "not a readable CSV"),
        (b"title\n" + b"shoe\n" * 100_000, "100,000 products were given; at most 500"),
        (b"title\n" + b"a shoe of some length\n" * 100_000, "2.2 MB; at most 2 MB"),
        (b"\xff\xfet", "not in UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_csv_that_is_refused_says_why(tmp_path, content, words):
    path = tmp_path / "products.csv"
    path.write_bytes(content)
    assert len(content) < MAX_FILE or "2.2 MB" in words
    with pytest.raises(InputError, match=words):
        read_csv(path)


def result(index, title, **more):
    scores = {"label": "Exact", "score": 0.5, "probabilities": {"Exact": 0.5, "Irrelevant": 0.5}, "tier": None}
    return {"rank": index + 1, "index": index, "title": title, "perspectives": None, **scores, **more}


def read_back(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_every_column(tmp_path):
    products = [
        {"title": "a", "product_id": "B1", "columns": {"title": "a", "product_id": "B1", "price": "9", "rank": "7"}},
        {"title": "b"},
    ]
    first = result(1, "b", rank=1, tier=3, perspectives={"user_intent": -0.25})
    second = result(0, "a", rank=2, tier=0, perspectives={"user_intent": 0.5}, product_id="B1")
    rows = read_back(write_csv(tmp_path / "out.csv", "shoe", [first, second], products))
    assert [row["title"] for row in rows] == ["b", "a"]
    assert rows[1] == {
        "query": "shoe",
        "rank": "2",
        "title": "a",
        "label": "Exact",
        "expected_gain": "0.5",
        "tier": "0",
        "p_Exact": "0.5",
        "p_Irrelevant": "0.5",
        "closeness_user_intent": "0.5",
        "price": "9",
        "product_id": "B1",
    }
    assert rows[0]["price"] == ""
    assert rows[0]["closeness_user_intent"] == "-0.25"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "＝", "＠"])
def test_no_cell_is_a_formula(tmp_path, start):
    evil = start + 'HYPERLINK("http://x","y")'
    products = [{"title": evil, "columns": {evil: evil}}]
    rows = read_back(write_csv(tmp_path / "out.csv", evil, [result(0, evil, product_id=evil)], products))
    for cell in (rows[0]["query"], rows[0]["title"], rows[0]["product_id"], rows[0]["'" + evil]):
        assert cell == "'" + evil


def test_a_downloaded_csv_can_be_uploaded_again(tmp_path):
    path = write_csv(tmp_path / "out.csv", "shoe", [result(0, "Schuh; groß, „rot“")], [{"title": "x"}])
    assert titles(read_csv(path)) == ["Schuh; groß, „rot“"]
