"""One frame of a DICOM file by gdcm in a process of its own: some broken frames abort the process that gdcm runs in.

This file is both the caller and, run as a script, the program of that process.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib import import_module
from typing import BinaryIO

import numpy as np


_SECONDS = 60


def decode_with_gdcm(file: BinaryIO, frame: int) -> np.ndarray:
    """As `pydicom.pixels.pixel_array`.

    Raises:
        RuntimeError: if the process fails, or takes longer than a minute.
    """
    file.seek(0)
    command, given = [sys.executable, "-P", __file__], b"%d\n" % frame + file.read()
    try:
        done = subprocess.run(command, input=given, capture_output=True, check=True, timeout=_SECONDS)
    except subprocess.SubprocessError as error:
        raise RuntimeError(str(error)) from error
    return np.load(io.BytesIO(done.stdout))


def _main() -> None:
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what gdcm itself prints must not come between
    frame, content = int(sys.stdin.buffer.readline()), io.BytesIO(sys.stdin.buffer.read())
    pixels = import_module("pydicom.pixels").pixel_array(content, index=frame, decoding_plugin="gdcm")
    whole = io.BytesIO()
    np.save(whole, pixels)
    output.write(whole.getvalue())


if __name__ == "__main__":
    _main()
