"""`lladamedv app`: the browser app, on this machine only unless asked otherwise."""

from __future__ import annotations

from typing import Annotated

import typer


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def app_command(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a model; by default the tiny demo model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps…")] = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen on; others than 127.0.0.1 let others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Make a public link, through Gradio's servers.")] = False,
) -> None:
    """Ask a model about images in the browser, and watch it denoise its answers."""
    import torch

    from lladamedv.app import build_app
    from lladamedv.demo import DEMO_MODEL, load_model

    from .cli import fail, quiet

    quiet()
    try:
        loaded, processor = load_model(model or DEMO_MODEL, dtype, revision)
        try:
            loaded = loaded.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` is {device!r}, which cannot be used: {error}") from error
        app = build_app(loaded, processor)
    except (ValueError, ImportError) as error:
        fail(error)
    if share:
        typer.echo("Warning: everybody who has the link can use the app, and uploads pass through Gradio.", err=True)
    if host not in _LOOPBACK:
        typer.echo(f"Warning: everybody who reaches {host} can use the app, with no password.", err=True)
    try:
        # Both are given, so that no environment variable can open the app.
        app.launch(server_name=host, server_port=port, share=share, inbrowser=False)
    except OSError as error:
        fail(error)
