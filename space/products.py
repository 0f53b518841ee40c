"""What a visitor gives, checked: a query, and products typed, pasted or in a CSV. And the ranking as a CSV.

Everything is bounded before any work is done: a Space is shared, and a page that waits in silence looks broken.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

MAX_QUERY = 300  # characters
MAX_TITLE = 2_000  # characters; the model reads about the first hundred words
MAX_PRODUCTS = 500
MAX_TEXT = 500_000  # characters pasted
MAX_FILE = 2_000_000  # bytes uploaded

TITLE_COLUMNS = ("title", "product_title", "name", "product_name")
ID_COLUMNS = ("product_id", "id")
DELIMITERS = ",;\t|"
# A spreadsheet runs a cell that begins with one of these as a formula; the wide forms count in Japanese ones.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


class InputError(ValueError):
    """Something that the visitor can correct; the message is shown in the page."""


def clean(text: str) -> str:
    r"""Return `text` on one line, without characters that do not print, that no encoding knows, or that reorder it.

    >>> clean(" a\tred\x00 shoe\n\ufeff")
    'a red shoe'
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    # Joiners stay: emoji and several scripts are written with them.
    kept = (c for c in text if c.isprintable() or c.isspace() or c in "\u200c\u200d")
    return " ".join("".join(kept).split())


def check_query(query: str | None) -> str:
    """Return the query, cleaned.

    Raises:
        InputError: It is empty, or longer than `MAX_QUERY`.
    """
    query = query or ""
    if len(query) > MAX_QUERY:
        raise InputError(f"The query has {len(query):,} characters; at most {MAX_QUERY} are taken.")
    if not (cleaned := clean(query)):
        raise InputError("Type a query first: what a shopper would search for.")
    return cleaned


def check_title(title: str | None, where: str = "The product title") -> str:
    """Return the title, cleaned.

    Raises:
        InputError: It is empty, or longer than `MAX_TITLE`.
    """
    title = title or ""
    if len(title) > MAX_TITLE:
        raise InputError(f"{where} has {len(title):,} characters; at most {MAX_TITLE:,} are taken.")
    if not (cleaned := clean(title)):
        raise InputError(f"{where} is empty: type the title of a product.")
    return cleaned


def check_titles(titles: list[str]) -> list[dict[str, Any]]:
    """Return one product a title.

    Raises:
        InputError: There are none, or more than `MAX_PRODUCTS`, or one is empty or too long.
    """
    _check_count(len(titles))
    return [{"title": check_title(str(title), f"Product {number}")} for number, title in enumerate(titles, 1)]


def read_paste(text: str | None) -> list[dict[str, Any]]:
    """Return one product a line; empty lines are left out.

    Raises:
        InputError: No line, too many lines, or a line that is too long.
    """
    text = text or ""
    if len(text) > MAX_TEXT:
        raise InputError(f"{len(text):,} characters were pasted; at most {MAX_TEXT:,} are taken. {_ELSEWHERE}")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if clean(line)]
    if not lines:
        raise InputError("Paste product titles, one a line, or upload a CSV with a title column.")
    _check_count(len(lines))
    return [{"title": check_title(line, f"Line {number}")} for number, line in lines]


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Return one product a row of a CSV file that has a title column; its other columns come along.

    Commas, semicolons, tabs and bars are told apart by the header; UTF-8 with or without a byte order mark and UTF-16
    with one are read.

    Returns:
        For each row `title`, `product_id` if there is such a column, and `columns`, the row as it was.

    Raises:
        InputError: The file is too large, not text, without a title column, without rows or with too many of them; or
            a title is empty or too long.
    """
    size = Path(path).stat().st_size
    if size > MAX_FILE:
        raise InputError(
            f"The file has {size / 1e6:.1f} MB; at most {MAX_FILE / 1e6:.0f} MB and {MAX_PRODUCTS} rows are taken. "
            f"{_ELSEWHERE}"
        )
    text = _decode(Path(path).read_bytes())
    header, _, _ = text.partition("\n")
    delimiter = max(DELIMITERS, key=header.count)  # the comma where there is none: a single column
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = [clean(name) for name in next(rows, [])]
        # Numbered as the file counts them: a quoted cell may go over several lines.
        numbered = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"The file is not a readable CSV ({error}).") from None
    title_column = _find(names, TITLE_COLUMNS)
    if title_column is None:
        found = ", ".join(name[:40] for name in names[:10] if name) or "nothing"
        raise InputError(
            f"The file has no title column: its first line must name one of {', '.join(TITLE_COLUMNS)}; found {found}."
        )
    if not numbered:
        raise InputError("The file has a header but no rows.")
    _check_count(len(numbered))
    id_column = _find(names, ID_COLUMNS)
    products = []
    for number, row in numbered:
        cells = [*row, *[""] * (len(names) - len(row))]  # a short row has empty cells at its end
        product: dict[str, Any] = {"title": check_title(cells[title_column], f"The title in line {number}")}
        if id_column is not None and (product_id := clean(cells[id_column])):
            product["product_id"] = product_id
        product["columns"] = dict(zip(names, map(clean, cells), strict=False))
        products.append(product)
    return products


def write_csv(path: str | Path, query: str, ranking: list[dict[str, Any]], products: list[dict[str, Any]]) -> Path:
    """Write a ranking as UTF-8 CSV that spreadsheets open: the uploaded columns, then what the model says.

    Text that a spreadsheet would run as a formula is written with an apostrophe before it, which makes it text.

    Args:
        path: File to write.
        query: The query.
        ranking: Products, best first, as the `lrkd-relevance` pipeline returns them.
        products: The products as they were given, in their own order.
    """
    rows: list[dict[str, Any]] = []
    for result in ranking:
        perspectives = result.get("perspectives") or {}
        scored: dict[str, Any] = {"query": query, "rank": result["rank"], "title": result["title"]}
        if result.get("product_id") is not None:
            scored["product_id"] = result["product_id"]
        scored |= {"label": result["label"], "expected_gain": round(result["score"], 6)}
        scored |= {} if result.get("tier") is None else {"tier": result["tier"]}
        scored |= {f"p_{label}": round(value, 6) for label, value in result["probabilities"].items()}
        scored |= {f"closeness_{name}": round(value, 6) for name, value in perspectives.items()}
        uploaded = products[result["index"]].get("columns", {})
        rows.append({name: value for name, value in uploaded.items() if name and name not in scored} | scored)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with Path(path).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([_not_a_formula(name) for name in names])
        writer.writerows([[_not_a_formula(row.get(name, "")) for name in names] for row in rows])
    return Path(path)


_ELSEWHERE = "For more, score on your own machine: the model card shows how."


def _check_count(count: int) -> None:
    if count == 0:
        raise InputError("No products were given.")
    if count > MAX_PRODUCTS:
        raise InputError(f"{count:,} products were given; at most {MAX_PRODUCTS} are ranked at a time. {_ELSEWHERE}")


def _decode(data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise InputError(
            "The file is not in UTF-8. Save it again as UTF-8: in Excel, the file type “CSV UTF-8”."
        ) from None
    if "\0" in text:
        raise InputError("The file is not text: a CSV with a title column is expected.")
    return text


def _find(names: list[str], wanted: tuple[str, ...]) -> int | None:
    lowered = [name.lower().replace(" ", "_") for name in names]
    return next((lowered.index(name) for name in wanted if name in lowered), None)


def _not_a_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(FORMULA_STARTS) else cell
