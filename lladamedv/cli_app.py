"""`lladamedv app`: the browser app, on this machine only unless asked otherwise."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from .cli_common import LOOPBACK, Device, Dtype, Host, Model, Revision, listen, quiet
from .loading import DEMO, find_device, load_model


def app_command(
    model: Model = DEMO,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Make a public link, through Gradio's servers.")] = False,
) -> None:
    """Ask a model about images in the browser, and watch it denoise its answers.

    The page is at http://127.0.0.1:7860 unless told otherwise. Ctrl-C ends it, and all conversations with it.

    \b
    Examples:
      lladamedv app
      lladamedv app --model path/or/hub-id
    """
    if ":" in host:
        raise ValueError(f"`host` is {host!r}; allowed are names and IPv4 addresses, because Gradio serves no others.")
    listen(host, port).close()
    quiet()
    from lladamedv.app import build_app, import_gradio

    with _own_temporary_files():
        # All that can be wrong is tried before a large model is loaded.
        import_gradio()
        find_device(device)
        loaded, processor = load_model(model, dtype, device, revision)
        app = build_app(loaded, processor)
        if share:
            typer.echo(
                "Warning: everybody who has the link can use the app, and uploads pass through Gradio.", err=True
            )
        if host not in LOOPBACK:
            typer.echo(f"Warning: everybody who reaches {host} can use the app, with no password.", err=True)
        try:
            # Both addresses are given, so that no environment variable can open the app. Gradio's own lines advise to
            # share.
            _, local, _ = app.launch(
                server_name=host, server_port=port, share=share, inbrowser=False, quiet=True, prevent_thread_lock=True
            )
            typer.echo(f"The app is at {local}")
            app.block_thread()  # until Ctrl-C, which it keeps to itself
        finally:
            app.close(verbose=False)
    raise typer.Exit(130)


@contextmanager
def _own_temporary_files() -> Iterator[None]:
    """A folder for the temporary files of this process, which is deleted at its end, also by SIGTERM or SIGHUP.

    Uploads are among them, also those that were cut off or never asked about.
    """

    def end(number, frame):
        raise SystemExit(128 + number)

    variable = "GRADIO_TEMP_DIR"
    parent, tempdir = os.environ.get(variable), tempfile.tempdir
    if parent is not None:
        os.makedirs(parent, exist_ok=True)
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.signal(number, end) for number in signals}
    try:
        with tempfile.TemporaryDirectory(prefix="lladamedv-", dir=parent) as folder:
            os.environ[variable] = tempfile.tempdir = folder
            yield
    finally:
        tempfile.tempdir = tempdir
        os.environ.pop(variable) if parent is None else os.environ.update({variable: parent})
        for number, handler in handlers.items():
            signal.signal(number, handler)
