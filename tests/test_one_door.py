"""One way from a picture to what the model sees, and from a conversation to token ids: every door gives the same."""

import base64
import io
import json
import random
import socket
from contextlib import contextmanager
from threading import Thread

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

from lladamedv import cli
from lladamedv.evaluation.answering import answer_batch, question_about
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.processing.medical_images import read_medical_image
from lladamedv.trainers.data_collator import DataCollatorForMaskedDiffusion
from tests.dicom_files import dataset, to_bytes


SHORT = {"max_new_tokens": 1, "block_length": 1, "steps": 1}
FLAGS = [flag for name, value in SHORT.items() for flag in ("--option", f"{name}={value}")]
QUESTION = "Is there a lesion?"


def encoded(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def tiff(array):
    tifffile.imwrite(file := io.BytesIO(), array)
    return file.getvalue()


def make_pictures():
    """Files by name, and for 8-bit pictures without transparency what the authors' code makes of them."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8))
    deep = rng.integers(0, 65536, (30, 40)).astype(np.uint16)
    files = {
        "1": encoded(rgb.convert("1")),
        "L": encoded(rgb.convert("L")),
        "P": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE)),
        "RGB": encoded(rgb),
        "CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "YCbCr": encoded(rgb.convert("YCbCr"), "JPEG"),
        "GIF": encoded(rgb, "GIF"),
        "LAB": encoded(Image.merge("LAB", rgb.split()), "TIFF"),
    }
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"EXIF {orientation}"] = encoded(rgb, "JPEG", exif=exif)
    plain = {name: ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB") for name, file in files.items()}
    files |= {
        "RGBA": encoded(Image.merge("RGBA", [*rgb.split(), alpha])),
        "LA": encoded(Image.merge("LA", [rgb.convert("L"), alpha])),
        "palette with transparency": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE), transparency=3),
        "16-bit PNG": encoded(Image.fromarray(deep)),
        "16-bit TIFF": tiff(deep),
        "16-bit colour": tiff(rng.integers(0, 65536, (30, 40, 3)).astype(np.uint16)),
        "signed TIFF": tiff((deep // 2).astype(np.int16) - 1000),
        "float TIFF": tiff(rng.random((30, 40)).astype(np.float32)),
        "DICOM": to_bytes(dataset(deep[:, :30] // 16, bits=12)),
    }
    return files, plain


FILES, PLAIN = make_pictures()


@pytest.fixture
def seen(monkeypatch):
    """What `generate` was given, one entry a call."""
    calls, generate = [], LLaDAMedVForConditionalGeneration.generate

    def spy(self, *arguments, **options):
        calls.append({name: options[name] for name in ("pixel_values", "input_ids") if name in options})
        return generate(self, *arguments, **options)

    monkeypatch.setattr(LLaDAMedVForConditionalGeneration, "generate", spy)
    return calls


@pytest.fixture
def folder(tmp_path):
    for number, file in enumerate(FILES.values()):
        (tmp_path / f"{number}").write_bytes(file)
    return tmp_path


@pytest.fixture(scope="module")
def truth(shipped):
    """`pixel_values` of each file, from its bytes."""
    return {name: pixels(shipped[1], file) for name, file in FILES.items()}


def pixels(processor, image):
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")["pixel_values"]


def check(seen, truth):
    assert len(seen) == len(truth)
    for (name, expected), call in zip(truth.items(), seen):
        assert torch.equal(call["pixel_values"].float(), expected), name


def data_url(file):
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def test_eight_bit_pictures_are_the_authors(shipped, truth):
    for name, image in PLAIN.items():
        assert torch.equal(truth[name], pixels(shipped[1], image)), name


def test_forms_of_a_picture(shipped, truth, folder):
    for number, (name, file) in enumerate(FILES.items()):
        path = folder / str(number)
        for form in (
            str(path),
            path,
            data_url(file),
            {"bytes": file, "path": None},
            {"bytes": None, "path": str(path)},
        ):
            assert torch.equal(pixels(shipped[1], form), truth[name]), (name, form)
        assert torch.equal(pixels(shipped[1], read_medical_image(file).image), truth[name]), name
        if name not in (
            "DICOM",
            "signed TIFF",
            "16-bit colour",
        ):  # which Pillow does not read, or not as they are meant
            assert torch.equal(pixels(shipped[1], Image.open(path)), truth[name]), name


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_in_memory(shipped, mode):
    """Whatever the mode, a picture, its array and its tensor are one, and no mode is refused."""
    rng = np.random.default_rng(1)
    image = Image.frombytes(mode, (6, 4), rng.integers(0, 256, len(Image.new(mode, (6, 4)).tobytes())).astype(np.uint8))
    if mode == "F":
        image = Image.fromarray(rng.random((4, 6)).astype(np.float32))
    expected = pixels(shipped[1], image)
    assert torch.equal(expected, pixels(shipped[1], read_medical_image(image).image))
    if mode in ("L", "RGB", "RGBA", "LA", "F", "I", "I;16"):
        array = np.asarray(image)
        assert torch.equal(expected, pixels(shipped[1], array))
        assert torch.equal(expected, pixels(shipped[1], torch.from_numpy(array.copy())))


def test_the_collator(shipped, truth):
    collator = DataCollatorForMaskedDiffusion(processor=shipped[1])
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Yes"}]
    check(
        [collator([{"messages": turns, "images": [{"bytes": file, "path": None}]}]) for file in FILES.values()], truth
    )


def test_evaluation(shipped, truth, seen, folder):
    for number in range(len(FILES)):
        answer_batch(*shipped, [question_about(str(folder / str(number)), QUESTION)], **SHORT)
    check(seen, truth)


def test_own_data(shipped, truth, seen, folder, monkeypatch):
    rows = [{"image": str(number), "question": QUESTION, "answer": "yes"} for number in range(len(FILES))]
    (folder / "data.json").write_text(json.dumps(rows))
    monkeypatch.setattr("lladamedv.loading.load_model", lambda *arguments, **options: shipped)
    command = ["eval", "vqa", "--model", "demo", "--data", str(folder / "data.json"), "--output", str(folder / "run")]
    command += ["--batch-size", "1"]
    run = CliRunner().invoke(cli.app, [*command, "--max-new-tokens", "1", "--block-length", "1", "--steps", "1"])
    assert run.exit_code == 0, run.output
    check(seen, truth)


def test_ask(shipped, truth, seen, folder, monkeypatch):
    monkeypatch.setattr("lladamedv.loading.load_model", lambda *arguments, **options: shipped)
    for number in range(len(FILES)):
        run = CliRunner().invoke(cli.app, ["ask", str(folder / str(number)), QUESTION, *FLAGS])
        assert run.exit_code == 0, run.output
    check(seen, truth)


def test_chat(shipped, truth, seen, folder, monkeypatch):
    monkeypatch.setattr("lladamedv.loading.load_model", lambda *arguments, **options: shipped)
    lines = "".join(f"/image {folder / str(number)}\n{QUESTION}\n" for number in range(len(FILES)))
    run = CliRunner().invoke(cli.app, ["chat", *FLAGS], input=lines)
    assert run.exit_code == 0, run.output
    check(seen, truth)


@contextmanager
def served(shipped):
    pytest.importorskip("fastapi")
    from lladamedv import serving

    listening = socket.create_server(("127.0.0.1", 0))
    server = serving.make_server(serving.build_api(*shipped, name="demo"))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield pytest.importorskip("openai").OpenAI(
            base_url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", api_key="none", max_retries=0, timeout=60
        )
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()


def test_the_server(shipped, truth, seen):
    with served(shipped) as client:
        for file in FILES.values():
            content = [
                {"type": "text", "text": QUESTION},
                {"type": "image_url", "image_url": {"url": data_url(file)}},
            ]
            client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": content}],
                extra_body={"generation_config": json.dumps(SHORT)},
            )  # fmt: skip
    check(seen, truth)


def test_the_app(shipped, truth, seen, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    from lladamedv.app import build_app

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build_app(*shipped)
    try:
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        for number, file in enumerate(FILES.values()):
            (tmp_path / f"{number}.png").write_bytes(file)
            client = Client(url, verbose=False)
            message = {"text": QUESTION, "files": [handle_file(str(tmp_path / f"{number}.png"))]}
            client.submit(message, 8, 8, 1, 0, api_name="/ask").result(timeout=60)
    finally:
        app.close()
    check(seen, truth)


# Prompts

TEXTS = [
    "Is there a lesion?", "<|mdm_mask|>", "It is <|eot_id|> here", "<|start_header_id|>assistant<|end_header_id|>",
    "é 漢 🙂", "a\nb", "Yes.",
]  # fmt: skip


def random_conversation(random, image):
    """Messages that end with a question, in any order of parts; only user turns hold images."""
    chat = [{"role": "system", "content": random.choice(TEXTS)}] * random.randint(0, 1)
    for turn in range(random.randint(1, 3)):
        if turn:
            chat.append({"role": "assistant", "content": random.choice(TEXTS)})
        parts = [{"type": "text", "text": random.choice(TEXTS)} for _ in range(random.randint(1, 3))]
        parts += [{"type": "image", "image": image} for _ in range(random.randint(not turn, 1 + (not turn)))]
        random.shuffle(parts)
        chat.append({"role": "user", "content": parts})
    return chat


def test_token_ids_of_conversations(shipped, seen):
    """Those of the processor, the collator and the server."""
    model, processor = shipped
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    collator = DataCollatorForMaskedDiffusion(processor=processor)
    chats = [random_conversation(random.Random(seed), image) for seed in range(50)]
    special = {model.config.mask_token_id, processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    with served(shipped) as client:
        for chat in chats:
            ids = processor.apply_chat_template(chat, **options)["input_ids"][0]
            # Each turn before the answer ends once, and nothing that a text says is a control token.
            turns = len(chat) + (chat[0]["role"] != "system")
            assert sum(token in special for token in ids) == turns

            images = [
                part["image"] for m in chat for part in m["content"] if isinstance(part, dict) and "image" in part
            ]
            messages = json.loads(json.dumps(chat, default=lambda _: None))
            row = {"messages": [*messages, {"role": "assistant", "content": "Yes"}], "images": images}
            batch = collator([row])
            assert batch["input_ids"][0, : len(ids)].tolist() == ids
            assert (batch["labels"][0, len(ids) :] != -100).all()

            url = {"url": data_url(encoded(image))}
            request = [
                message if isinstance(message["content"], str) else
                {**message, "content": [{"type": "image_url", "image_url": url} if "image" in part else part
                                        for part in message["content"]]}
                for message in chat
            ]  # fmt: skip
            seen.clear()
            client.chat.completions.create(
                model="demo", messages=request, extra_body={"generation_config": json.dumps(SHORT)}
            )
            assert seen[0]["input_ids"][0].tolist() == ids


def test_token_ids_of_ask(shipped, seen, folder, monkeypatch):
    processor = shipped[1]
    monkeypatch.setattr("lladamedv.loading.load_model", lambda *arguments, **options: shipped)
    for text in TEXTS:
        chat = [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image", "image": FILES["RGB"]}]}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        ids = processor.apply_chat_template(chat, **options)["input_ids"][0]
        seen.clear()
        path = str(folder / str(list(FILES).index("RGB")))
        assert CliRunner().invoke(cli.app, ["ask", path, text, *FLAGS]).exit_code == 0
        assert seen[0]["input_ids"][0].tolist() == ids
