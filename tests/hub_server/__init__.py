"""A Hub on loopback: repositories over the HTTP that huggingface_hub, datasets, transformers, peft and evaluate speak.

    with serve() as hub:
        token = hub.token("maria", organisations=["shop"])  # role="read": a token that may not write
        environment = hub.environment(tmp_path / "hf", token)  # of a client: a subprocess, which reads HF_ENDPOINT
        hub.fault("PUT /storage/.*", status=503, times=2)  # then healthy again; also delay, lost, cut, corrupt
        ...
        hub.commits("models", "shop/student"), hub.files("models", "shop/student"), hub.requests

`serve({("datasets", "shop/pairs"): Repository({"README.md": b"..."})})` starts with public repositories. As on the Hub,
a large file is uploaded to, and redirected to, another origin, by links that no token may be sent to.
"""

from tests.hub_server.repository import Blob, Commit, Repository
from tests.hub_server.server import Hub, serve

__all__ = ["Blob", "Commit", "Hub", "Repository", "serve"]
