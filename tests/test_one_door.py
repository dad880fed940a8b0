"""One way from a picture to what the model sees, and from a conversation to token ids: every door gives the same."""

import base64
import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

from lladamedv import cli
from lladamedv.evaluation.answering import answer_batch, question_about
from lladamedv.modeling_lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.modeling_lladamedv.continuous_batching_lladamedv import ContinuousBatch
from lladamedv.trainers.data_collator import DataCollatorForMaskedDiffusion
from tests.dicom_files import dataset, to_bytes
from tests.reading import encoded, read, tiff


SHORT = {"max_new_tokens": 1, "block_length": 1, "steps": 1}
FLAGS = [flag for name, value in SHORT.items() for flag in ("--option", f"{name}={value}")]
QUESTION = "Is there a lesion?"
PROMPT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}


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
MISREAD = ("DICOM", "signed TIFF", "16-bit colour")  # by Pillow, or not read at all


@pytest.fixture
def seen(monkeypatch):
    """What `generate`, or a batch that is shared, was given: one entry a call."""
    calls = []

    def spied(asked):
        def spy(self, *arguments, **options):
            calls.append({name: options[name] for name in ("pixel_values", "input_ids") if name in options})
            return asked(self, *arguments, **options)

        return spy

    for home, name in ((LLaDAMedVForConditionalGeneration, "generate"), (ContinuousBatch, "submit")):
        monkeypatch.setattr(home, name, spied(getattr(home, name)))
    return calls


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / str(number) for number in range(len(FILES))]
    for path, file in zip(found, FILES.values()):
        path.write_bytes(file)
    return found


@pytest.fixture
def command(shipped, monkeypatch):
    """Runs a command line with the demo model, which is loaded already."""
    monkeypatch.setattr("lladamedv.loading.load_model", lambda *arguments, **options: shipped)

    def run(*arguments, **options):
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)
        assert done.exit_code == 0, done.output

    return run


@pytest.fixture(scope="module")
def ask_server(shipped):
    """Sends messages to the server."""
    testclient = pytest.importorskip("fastapi.testclient")
    from lladamedv import serving

    def ask(messages):
        body = {"model": "demo", "messages": messages, "generation_config": json.dumps(SHORT)}
        assert client.post("/v1/chat/completions", json=body).raise_for_status()

    api = serving.build_api(*shipped, name="demo")
    with testclient.TestClient(api, base_url="http://127.0.0.1") as client:
        yield ask


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


def image_part(file):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file).decode()}"}}


# Pictures


def test_eight_bit_pictures_are_the_authors(shipped, truth):
    for name, image in PLAIN.items():
        assert torch.equal(truth[name], pixels(shipped[1], image)), name


def test_forms_of_a_picture(shipped, truth, paths):
    for path, (name, file) in zip(paths, FILES.items()):
        url = image_part(file)["image_url"]["url"]
        forms = [str(path), path, url, {"bytes": file, "path": None}, {"bytes": None, "path": str(path)}]
        for form in (*forms, read(file).image, *([] if name in MISREAD else [Image.open(path)])):
            assert torch.equal(pixels(shipped[1], form), truth[name]), (name, form)


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_in_memory(shipped, mode):
    """Of any mode, a picture, its array and its tensor are one, and no mode is refused."""
    rng = np.random.default_rng(1)
    image = Image.frombytes(mode, (6, 4), rng.integers(0, 256, len(Image.new(mode, (6, 4)).tobytes())).astype(np.uint8))
    if mode == "F":
        image = Image.fromarray(rng.random((4, 6)).astype(np.float32))
    expected, forms = pixels(shipped[1], image), [read(image).image]
    if mode in ("L", "RGB", "RGBA", "LA", "F", "I", "I;16"):
        forms += [np.asarray(image), torch.from_numpy(np.asarray(image).copy())]
    for form in forms:
        assert torch.equal(expected, pixels(shipped[1], form))


def test_the_collator(shipped, truth):
    collator = DataCollatorForMaskedDiffusion(processor=shipped[1])
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Yes"}]
    check([collator([{"messages": turns, "images": [{"bytes": file}]}]) for file in FILES.values()], truth)


def test_evaluation(shipped, truth, seen, paths):
    for path in paths:
        answer_batch(*shipped, [question_about(str(path), QUESTION)], **SHORT)
    check(seen, truth)


def test_own_data(command, truth, seen, paths, tmp_path):
    rows = [{"image": path.name, "question": QUESTION, "answer": "yes"} for path in paths]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    source = ["--data", tmp_path / "data.json", "--output", tmp_path / "run", "--model", "demo", "--batch-size", 1]
    command("eval", "vqa", *source, "--max-new-tokens", 1, "--block-length", 1, "--steps", 1)
    check(seen, truth)


def test_ask(command, truth, seen, paths):
    for path in paths:
        command("ask", path, QUESTION, *FLAGS)
    check(seen, truth)


def test_chat(command, truth, seen, paths):
    command("chat", *FLAGS, input="".join(f"/image {path}\n{QUESTION}\n" for path in paths))
    check(seen, truth)


def test_the_server(ask_server, truth, seen):
    for file in FILES.values():
        content = [{"type": "text", "text": QUESTION}, image_part(file)]
        ask_server([{"role": "user", "content": content}])
    check(seen, truth)


def test_the_app(shipped, truth, seen, paths, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    from lladamedv.app import build_app

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build_app(*shipped)
    try:
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        for path in paths:
            file = path.rename(path.with_suffix(".png"))
            message = {"text": QUESTION, "files": [handle_file(str(file))]}
            Client(url, verbose=False).submit(message, 8, 8, 1, 0, api_name="/ask").result(timeout=60)
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


def with_images(chat, change):
    """The same chat with another form of its images."""
    return [
        turn if isinstance(turn["content"], str) else
        {**turn, "content": [change(part) if "image" in part else part for part in turn["content"]]}
        for turn in chat
    ]  # fmt: skip


def test_token_ids_of_conversations(shipped, ask_server, seen):
    """Those of the processor, the collator and the server."""
    model, processor = shipped
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    collator = DataCollatorForMaskedDiffusion(processor=processor)
    special = {model.config.mask_token_id, processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    for seed in range(50):
        chat = random_conversation(random.Random(seed), image)
        ids = processor.apply_chat_template(chat, **PROMPT)["input_ids"][0]
        # Each turn before the answer ends once, and nothing that a text says is a control token.
        turns = len(chat) + (chat[0]["role"] != "system")
        assert sum(token in special for token in ids) == turns

        images = [
            part["image"] for turn in chat for part in turn["content"] if isinstance(part, dict) and "image" in part
        ]
        messages = [*with_images(chat, lambda part: {"type": "image"}), {"role": "assistant", "content": "Yes"}]
        batch = collator([{"messages": messages, "images": images}])
        assert batch["input_ids"][0, : len(ids)].tolist() == ids
        assert (batch["labels"][0, len(ids) :] != -100).all()

        seen.clear()
        ask_server(with_images(chat, lambda part: image_part(encoded(image))))
        assert seen[0]["input_ids"][0].tolist() == ids


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_of_ask(shipped, command, seen, paths, text):
    chat = [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image", "image": FILES["RGB"]}]}]
    command("ask", paths[list(FILES).index("RGB")], text, *FLAGS)
    assert seen[0]["input_ids"].tolist() == shipped[1].apply_chat_template(chat, **PROMPT)["input_ids"]
