"""Try a student as an Inference Endpoint would serve it, on this machine.

    python -m recipes.serve.endpoint --model runs/demo/students/lrkd-gat-0
    curl localhost:8080 -d '{"inputs": {"query": "usb c cable", "products": ["USB-C cable, 2 m", "Desk lamp"]}}'

The folder's own `handler.py` answers, or recipes/serve/handler.py where it has none. Routes and answers are those of
Hugging Face's inference toolkit: POST / with JSON, errors as {"error": "..."}, GET /health. A body above 4 MiB is
refused with 413; on a real endpoint the proxy before it sets the limit.
"""

from __future__ import annotations

import importlib.util
import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, parse, run

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MAX_BODY = 4 * 2**20


@dataclass
class EndpointArguments:
    """Options of the server."""

    model: str = field(metadata={"help": "Folder of a student (recipes.student.distill makes one)."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 for every interface."})
    port: int = field(default=8080, metadata={"help": "Port to listen at; 0 takes a free one."})


def load_handler(model: str) -> Any:
    """Make the `EndpointHandler` of a model folder, as the toolkit does: from the file, whatever is installed.

    Raises:
        UserError: There is no such folder, or it holds no student that can be loaded and ranks.
    """
    if not Path(model, "config.json").is_file():
        raise UserError(f"--model {model}: no config.json there. Pass the folder of a student.")
    path = Path(model, "handler.py")
    if not path.is_file():
        path = Path(__file__).with_name("handler.py")
    spec = importlib.util.spec_from_file_location("handler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.EndpointHandler(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {model}: cannot be served: {' '.join(str(error).split())}") from None


def build_app(handler: Any) -> Starlette:
    """Put `handler` behind the toolkit's routes."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    async def health(request: Request) -> Response:
        return PlainTextResponse("Ok")

    async def predict(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                return JSONResponse({"error": f"The body is larger than {MAX_BODY} bytes."}, status_code=413)
        try:
            return JSONResponse(await run_in_threadpool(handler, json.loads(body)))
        except json.JSONDecodeError as error:
            return JSONResponse({"error": f"The body is not JSON: {error}."}, status_code=400)
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status_code=500)

    routes = [Route(path, health, methods=["GET"]) for path in ("/", "/health")]
    routes += [Route(path, predict, methods=["POST"]) for path in ("/", "/predict")]
    return Starlette(routes=routes, exception_handlers={Exception: failed})


def main() -> None:
    """Serve from the command line until interrupted."""
    arguments = parse(EndpointArguments, __doc__)
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise UserError("The server needs the extra `serve`: pip install -e '.[serve]'.") from None
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((arguments.host, arguments.port))
    except (OSError, OverflowError) as error:
        raise UserError(f"{arguments.host}:{arguments.port}: {error}. Choose another --port (0: a free one).") from None
    app = build_app(load_handler(arguments.model))
    listener.listen()  # from here on nobody is turned away: what comes too early waits
    url = f"http://{arguments.host}:{listener.getsockname()[1]}"
    print(f"{arguments.model} answers at {url} (Ctrl-C ends it)")
    example = json.dumps({"inputs": {"query": "usb c cable", "products": ["USB-C cable, 2 m", "Desk lamp"]}})
    print(f"Next: curl {url} -d '{example}'", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    run(main)
