"""The Space in a process of its own, and the browser that visits it: for the tests, and for the screenshots."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SPACE = Path(__file__).parents[2] / "space"
# As on the Hub: the app's own folder, and neither the recipes nor the package.
RUN_ALONE = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_lrkd", "recipes", "hub_cards"):
            raise ImportError(f"the Space must do without {name}")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, ".")
sys.argv = ["app.py", *sys.argv[1:]]
runpy.run_path("app.py", run_name="__main__")
"""


@contextmanager
def serve(
    models: Sequence[str | Path], folder: Path, source: Path = SPACE, environment: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Copy the Space to `folder` and run it there; yield its address. Without `models` it offers those of `space.json`.

    Raises:
        RuntimeError: It does not start, or it printed a traceback; the message is what it printed.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **environment,
        "LRKD_MODELS": ",".join(map(str, models)),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    environment.pop("PYTHONPATH", None)
    log = folder / "log.txt"
    with log.open("w") as output:
        command = [sys.executable, "-c", RUN_ALONE, "--port", str(port)]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while "Running on" not in log.read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        if "Traceback" in log.read_text():
            raise RuntimeError(log.read_text())
    finally:
        server.terminate()
        server.wait(60)


def chromium() -> str | None:
    """Return the path of Chromium, or of what LRKD_CHROMIUM names; None if there is none."""
    names = (os.environ["LRKD_CHROMIUM"],) if "LRKD_CHROMIUM" in os.environ else ("chromium-headless-shell", "chromium")
    return next((path for name in names if (path := shutil.which(name))), None)
