"""Take the picture of a card that README shows: its markdown, in a plain style, by Debian's Chromium.

python -m tests.hub_cards.screenshot --folder runs/publish/student --output recipes/figures/card.png
"""

import argparse
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

from tests.space.visiting import chromium

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 860px; margin: 32px auto; padding: 0 24px; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: 6px; }
code { font: 13px/1.45 ui-monospace, monospace; background: #f0f2f4; padding: 2px 5px; border-radius: 5px; }
pre { background: #f6f8fa; padding: 14px; border-radius: 8px; overflow: hidden; }
pre code { background: none; padding: 0; }
table { border-collapse: collapse; }
th, td { border: 1px solid #d1d9e0; padding: 5px 12px; text-align: left; }
img { max-width: 60%; }
.tags { display: flex; flex-wrap: wrap; gap: 8px; }
.tags span { background: #e8f3f1; color: #0f5f57; border-radius: 12px; padding: 2px 12px; font-size: 14px; }
"""


def main() -> None:
    """Render README.md of a package and photograph its first screens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="Folder that recipes.publish.package made.")
    parser.add_argument("--output", required=True, help="Picture to write (png).")
    parser.add_argument("--height", type=int, default=1500, help="Pixels to show.")
    arguments = parser.parse_args()
    from huggingface_hub import RepoCard
    from playwright.sync_api import sync_playwright

    if (program := chromium()) is None:
        parser.error("no Chromium: apt-get install chromium, or name one in LRKD_CHROMIUM")
    folder = Path(arguments.folder).absolute()
    card = RepoCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
    data = card.data.to_dict()
    tags = [str(data[name]) for name in ("pipeline_tag", "library_name", "license", "base_model") if name in data]
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    spans = "".join(f"<span>{tag}</span>" for tag in tags)
    page_html = f"<meta charset=utf-8><base href='{folder.as_uri()}/'><style>{STYLE}</style>"
    page_html += f"<div class=tags>{spans}</div>{html}"
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        path = Path(scratch, "card.html")
        path.write_text(page_html, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=program)
        page = browser.new_page(viewport={"width": 960, "height": arguments.height})
        page.goto(path.as_uri())
        page.screenshot(path=arguments.output)
        browser.close()
    print(f"{arguments.output}: {Path(arguments.output).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
