"""Take the pictures of the Space that README shows: a visit with Debian's Chromium (apt-get install chromium).

python -m tests.space.screenshots --model runs/demo/students/lrkd-gat-0 --output recipes/figures
"""

import argparse
import os
import tempfile
from pathlib import Path

from tests.space.visiting import chromium, serve

PATIENCE = 600_000  # ms


def main() -> None:
    """Start the Space and photograph one pair, a ranking, and a phone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of a student.")
    parser.add_argument("--output", default="recipes/figures", help="Folder of the pictures.")
    parser.add_argument("--example", type=int, default=0, help="Which of the examples is clicked.")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    if (program := chromium()) is None:
        parser.error("no Chromium: apt-get install chromium, or name one in LRKD_CHROMIUM")
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = Path(arguments.model).absolute()
    with tempfile.TemporaryDirectory() as folder:
        # The page names the model by its path: a short one says no more of this machine than it has to.
        short = Path(folder, "space", model.name)
        short.parent.mkdir()
        short.symlink_to(model)
        with serve([model.name], short.parent) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program)
            for name, theme, size in (
                ("space_light", "light", {"width": 1120, "height": 700}),
                ("space_phone", "dark", {"width": 390, "height": 844}),
            ):
                page = browser.new_page(viewport=size, color_scheme=theme)
                page.set_default_timeout(PATIENCE)
                page.goto(address)
                page.locator("#pair-examples button").nth(arguments.example).click()
                page.locator(".lr-facts").wait_for()
                page.locator("#score").click()  # again: the first pair of a process takes several times as long
                shoot(page, output / f"{name}_pair.png")
                page.get_by_role("tab", name="Many products").click()
                page.locator("#list-examples button").nth(arguments.example).click()
                page.locator(".lr-table").wait_for()
                shoot(page, output / f"{name}_ranking.png")
            browser.close()


def shoot(page: object, path: Path) -> None:
    """Save the whole page once its bars stand still."""
    page.locator("h1").hover()
    page.wait_for_timeout(1500)
    page.screenshot(path=path, full_page=True, animations="disabled")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
