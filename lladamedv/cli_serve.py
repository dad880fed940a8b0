"""`lladamedv serve`: an OpenAI-compatible server, for this machine only unless asked otherwise."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import LOOPBACK, Device, Dtype, Host, Model, Revision, listen, quiet
from .loading import DEMO, find_device, load_model


def serve(
    model: Model = DEMO,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    max_queue: Annotated[int, typer.Option(min=0, help="How many requests may wait while one is answered.")] = 16,
    max_upload_size: Annotated[int, typer.Option(min=1, help="Largest request, in MB.")] = 20,
) -> None:
    """Serve a model to programs that speak OpenAI's API.

    The API is at http://127.0.0.1:8000/v1 unless told otherwise. Ctrl-C ends it.

    \b
    Examples:
      lladamedv serve
      lladamedv serve --model path/or/hub-id
    """
    # All that can be wrong is tried before a large model is loaded.
    listening = listen(host, port)
    quiet()
    from lladamedv.serving import build_api, make_server

    find_device(device)
    # Inherited by connections; without it each part of a stream would wait for the one before to be acknowledged.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    loaded, processor = load_model(model, dtype, device, revision)
    name = "lladamedv-demo" if model == DEMO else Path(model).resolve().name if Path(model).is_dir() else model
    options = {"name": name, "max_queue": max_queue, "max_upload_size": max_upload_size * 1_000_000}
    if host not in LOOPBACK:
        options["hosts"] = None  # who can tell under which names it is known?
        typer.echo(f"Warning: everybody who reaches {host} can use the server, with no password.", err=True)
    server = make_server(build_api(loaded, processor, **options))
    address = f"[{host}]" if ":" in host else host
    typer.echo(f"{name} is served at http://{address}:{listening.getsockname()[1]}/v1")
    server.run(sockets=[listening])
