"""What tests of commands, chat, app and server share: what `generate` keeps of an answer, and a model that waits."""

import gc
import socket
import struct
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Semaphore

import nibabel
import numpy as np
import torch
from PIL import Image

from lladamedv.conversation import MASK
from lladamedv.processing.phantoms import PhantomVQA
from tests.dicom_files import dataset, to_bytes


def conversation(image, *texts):
    """A chat of alternating questions and answers about an image."""
    chat = [
        {"role": ("user", "assistant")[index % 2], "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(texts)
    ]
    chat[0]["content"].insert(0, {"type": "image", "image": image})
    return chat


@dataclass
class Generated:
    """What `generate` itself keeps of an answer.

    Attributes:
        output: as `generate` returns it.
        tokens: text, step from 1 and confidence of each place, and of the end; the last two are `None` for a mask.
        canvases: the same for each canvas up to the first end that is in it, first the one before all passes.
    """

    output: object
    tokens: list
    canvases: list


def generated(shipped, image, question, **options):
    """Ask the model in one go, and keep the history; the steps are those of the canvases."""
    model, processor = shipped
    inputs = processor.apply_chat_template(
        conversation(image, question), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(
        **inputs, **options, tokenizer=processor.tokenizer, return_dict_in_generate=True, output_history=True
    )
    history, mask = output.history[:, 0].tolist(), model.config.mask_token_id
    ends = set(model.generation_config.eos_token_id)
    suffix = processor.tokenizer(options.get("generation_suffix", ""), add_special_tokens=False).input_ids
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    length = len(ids) - len(suffix)
    assert ids[length:] == suffix

    def shown(place, canvas):
        if canvas[place] == mask:
            return MASK, None, None
        step = next(number for number, each in enumerate(history, 1) if each[place] != mask)
        text = "end" if place == length else processor.decode([canvas[place]])
        return text, step, float(output.commit_confidence[0, place])

    final = [*ids[:length], *history[-1][length:]]
    tokens = [shown(place, final) for place in range(min(length + 1, len(history[0])))]
    canvases = [[(MASK, None, None)] * len(history[0])]
    for canvas in history:
        end = next((place for place, token in enumerate(canvas) if token in ends), len(canvas))
        canvases.append([shown(place, canvas) for place in range(end)])
    return Generated(output, tokens, canvases)


class Gate:
    """Holds every forward pass until it is let through; counts them, and the canvases that were begun."""

    def __init__(self, monkeypatch, model):
        self.passes, self.begun, self._allowed, kind = 0, 0, Semaphore(0), type(model)
        step, denoise = kind.denoising_step, kind.begin_denoising

        def held(model, state):
            assert self._allowed.acquire(timeout=60)
            self.passes += 1
            return step(model, state)

        def begin(model, state, **images):
            self.begun += 1
            return denoise(model, state, **images)

        monkeypatch.setattr(kind, "denoising_step", held)
        monkeypatch.setattr(kind, "begin_denoising", begin)

    def let(self, count):
        self._allowed.release(count)


@contextmanager
def no_tensors_left(settled=lambda: True):
    """What is done here leaves no tensor behind, without a search for cycles, which a large process seldom makes."""

    def count():
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    gc.collect()
    before = count()
    gc.disable()
    try:
        yield
        until(lambda: settled() and count() <= before)
    finally:
        gc.enable()


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def black_png(width, height):
    """A file of almost no bytes, whatever its size in pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def medical_files(folder):
    """A DICOM file with text in its pixels, a NIfTI file of three volumes, a TIFF of two pages, and a picture."""
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    (folder / "burned.dcm").write_bytes(to_bytes(dataset(pixels, bits=12, BurnedInAnnotation="YES")))
    volumes = np.arange(4 * 4 * 4 * 3, dtype=np.int16).reshape(4, 4, 4, 3)
    nibabel.Nifti1Image(volumes, np.eye(4)).to_filename(folder / "series.nii")
    pages = [Image.new("L", (8, 8), level) for level in (10, 200)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "picture.png")
    return folder


def two_frames(path):
    """Write a DICOM file of 12 bits whose frames are two phantoms, in the window that shows their grey values."""
    grey = np.stack([np.asarray(example.image.convert("L")) for example in PhantomVQA(5, 2)]).astype(np.uint16)
    options = {"WindowCenter": 2040.5, "WindowWidth": 4081, "RescaleSlope": 1, "RescaleIntercept": 0}
    path.write_bytes(to_bytes(dataset(grey * 16, bits=12, **options)))
