"""Our processor, model and loop against numbers recorded from the authors' code (tests/parity/data)."""

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv.conversion import convert_checkpoint
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from tests.parity.fixtures import COPY, FIXTURES, NAMES, SHARED, image_processor, numbers, tensors, write_checkpoint
from tests.stranger import run_as_stranger
from tests.tiny import Words, tiny_processor, tiny_tokenizer


IMAGES = [(name, image) for name in NAMES for image in numbers(name, "preprocess")["images"]]
FORWARDS = [(name, case) for name in NAMES for case in numbers(name, "forward")["cases"]]
SCENARIOS = [(name, scenario) for name in NAMES for scenario in numbers(name, "generate")["scenarios"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each fixture in the layouts it was released in, and converted."""
    root = tmp_path_factory.mktemp("parity")
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    for name in NAMES:
        for layout in ("checkpoint", "llada_text"):
            source = write_checkpoint(name, root / "released" / layout / name, layout)
            convert_checkpoint(source, root / "converted" / layout / name, root / "tokenizer", report=lambda line: None)
    return root


@pytest.fixture(scope="module")
def models(folders):
    """Everything that is compared comes out of converted checkpoints."""
    return {
        name: LLaDAMedVForConditionalGeneration.from_pretrained(folders / "converted" / "checkpoint" / name)
        for name in NAMES
    }


def open_image(name, image):
    return Image.open(FIXTURES / numbers(name, "preprocess")["images"][image]["file"])


def splice(model, ids, images):
    """The fixture's ids with −200 per image as our model inputs."""
    prepared = image_processor(model)([images], return_tensors="pt") if images else {}
    counts = []
    if images:
        with torch.no_grad():
            counts = [len(features) for features in model.get_image_features(**prepared).pooler_output]
    expanded = []
    for token in ids:
        expanded += [model.config.image_token_id] * counts.pop(0) if token == -200 else [token]
    return torch.tensor([expanded]), dict(prepared)


def test_fixtures_are_complete_and_the_copy_is_faithful():
    """No test is skipped for want of a fixture: the copy alone holds everything that is compared."""
    weights = ("checkpoint/model", "checkpoint/embed_lm_head_overrides", "llada_text/model")
    recorded = ("preprocess", "forward", "loss")
    expected = {f"{name}/{part}.safetensors" for name in NAMES for part in weights + recorded}
    expected |= {"pad_mha/generate.safetensors", "pad_mha/checkpoint/siglip_tower/model.safetensors"}
    assert {str(file.relative_to(COPY)) for file in COPY.rglob("*.safetensors")} == expected
    if FIXTURES is SHARED:
        for file in sorted(COPY.rglob("*")):
            if file.is_file():
                assert file.read_bytes() == (SHARED / file.relative_to(COPY)).read_bytes(), file


@pytest.mark.parametrize("layout", ["checkpoint", "llada_text"])
@pytest.mark.parametrize("name", NAMES)
def test_without_converting(folders, name, layout):
    """A released folder gives the same model as its conversion, and saving it writes the same names."""
    direct = LLaDAMedVForConditionalGeneration.from_pretrained(folders / "released" / layout / name)
    direct.save_pretrained(folders / "saved" / layout / name)
    converted = folders / "converted" / layout / name
    again = load_file(folders / "saved" / layout / name / "model.safetensors")
    weights = load_file(converted / "model.safetensors")
    assert weights.keys() == again.keys() == direct.state_dict().keys()
    assert all(torch.equal(weight, direct.state_dict()[key]) for key, weight in weights.items())
    other = LLaDAMedVForConditionalGeneration.from_pretrained(converted)
    assert other.generation_config.to_dict() == direct.generation_config.to_dict()
    same = [{key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
            for model in (direct, other)]  # fmt: skip
    assert same[0] == same[1]


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_pixels(models, name, image):
    recorded = numbers(name, "preprocess")["images"][image]
    pixels = image_processor(models[name])(open_image(name, image), return_tensors="pt")["pixel_values"][0]
    assert list(pixels.shape) == [1] * (4 - len(recorded["pixel_values"]["shape"])) + recorded["pixel_values"]["shape"]
    eight_bit = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()
    assert hashlib.sha256(eight_bit.tobytes()).hexdigest() == recorded["pixel_values"]["sha256_uint8"]
    sample = pixels.flatten()[:: recorded["pixel_values"]["sample_stride"]]
    torch.testing.assert_close(sample, tensors(name, "preprocess")[f"{image}.pixel_sample"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_image_features(models, name, image):
    model, data = models[name], tensors(name, "preprocess")
    processor = image_processor(model)
    with torch.no_grad():
        features = model.get_image_features(**processor(open_image(name, image), return_tensors="pt")).pooler_output[0]
    recorded = numbers(name, "preprocess")["images"][image]
    width, height = recorded["size_wh"]
    assert len(features) == recorded["num_image_tokens"] == processor.get_number_of_image_tokens(height, width)
    rows = data[f"{image}.feature_rows"]
    torch.testing.assert_close(features[rows], data[f"{image}.features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(features.sum(-1), data[f"{image}.feature_rowsum"], atol=1e-4, rtol=0)
    torch.testing.assert_close(features.square().sum(-1), data[f"{image}.feature_rowsq"], atol=1e-4, rtol=1e-5)


def test_token_counts_of_forty_sizes(models):
    processor = image_processor(models["anyres_gqa"])
    rows = numbers("anyres_gqa", "preprocess")["token_count_table"]["rows"]
    assert len(rows) == 40
    for width, height, *_, count in rows:
        assert processor.get_number_of_image_tokens(height, width) == count, (width, height)


def test_two_images_in_one_prompt(models):
    model, data = models["anyres_gqa"], tensors("anyres_gqa", "preprocess")
    recorded = numbers("anyres_gqa", "preprocess")["multi_image_pad"]
    images = [open_image("anyres_gqa", image) for image in recorded["images"]]
    ids, inputs = splice(model, recorded["input_ids"], images)
    assert ids.shape[1] == recorded["total_embeds"]
    with torch.no_grad():
        embeddings, _ = model.model.get_multimodal_embeddings(ids, **inputs)
    rows = data["multi_image_pad.rows"]
    torch.testing.assert_close(embeddings[0, rows], data["multi_image_pad.embeds"], atol=1e-4, rtol=0)
    torch.testing.assert_close(embeddings[0].sum(-1), data["multi_image_pad.rowsum"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), FORWARDS)
def test_logits(models, name, case):
    check_logits(models[name], name, case)


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, case in FORWARDS if not numbers(name, "forward")["cases"][case].get("images")],
)
def test_logits_of_the_text_only_layout(folders, name, case):
    model = LLaDAMedVForConditionalGeneration.from_pretrained(folders / "converted" / "llada_text" / name)
    assert model.config.text_only
    check_logits(model, name, case)


def check_logits(model, name, case):
    forward, data = numbers(name, "forward"), tensors(name, "forward")
    recorded = forward["cases"][case]
    ids = torch.tensor(recorded["input_ids"])
    mask = recorded.get("attention_mask")
    inputs = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    valid = torch.ones(len(ids), recorded["seq_len"], dtype=torch.bool)
    if mask is not None:
        valid = torch.tensor(mask).bool()
    if recorded.get("images"):
        images = [open_image(name, image) if image else None for image in recorded["images"]]
        kept = [
            row[: sum(mask)]
            for row, mask in zip(recorded["input_ids"], recorded.get("attention_mask_in", [[1] * len(ids[0])]))
        ]
        rows = [splice(model, row, [image] if image else []) for row, image in zip(kept, images)]
        length = max(row.shape[1] for row, _ in rows)
        ids = torch.cat([torch.nn.functional.pad(row, (0, length - row.shape[1]), value=1) for row, _ in rows])
        valid = torch.tensor([[i < row.shape[1] for i in range(length)] for row, _ in rows])
        inputs = rows[0][1] | {"attention_mask": valid.long(), "batch_num_images": None}
    with torch.no_grad():
        rows = torch.tensor(recorded["rows"])
        hidden = model.model(input_ids=ids, **inputs).last_hidden_state[:, rows]
        logits = model.lm_head(hidden)
    valid = valid[:, rows]
    probe = torch.tensor(forward["probe_vocab_ids"])
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(hidden[valid], data[f"{case}.hidden"][valid], **close)
    torch.testing.assert_close(logits[..., probe][valid], data[f"{case}.logits_probe"][valid], **close)
    torch.testing.assert_close(logits.topk(8).values[valid], data[f"{case}.top8_logits"][valid], **close)
    torch.testing.assert_close(logits.double().logsumexp(-1)[valid], data[f"{case}.logsumexp"][valid], **close)


def run_scenario(model, name, scenario, monkeypatch, **options):
    everything = numbers(name, "generate")
    recorded = everything["scenarios"][scenario]
    arguments = dict(recorded["args"])
    arguments["max_new_tokens"] = arguments.pop("gen_length")
    images = [Image.open(FIXTURES / "images" / f"{recorded['image']}.png")] if recorded["image"] else []
    ids, inputs = splice(model, recorded["input_ids"], images)
    assert ids.shape[1] == recorded["prompt_embeds_len"]
    suppressed = [*everything["suppressed_ids"], everything["mask_id"]]
    if recorded["uses_lm_head_maskpred_override"]:
        override = load_file(FIXTURES / name / "checkpoint" / "embed_lm_head_overrides.safetensors")
        weight = model.lm_head.weight.detach().clone()
        weight[everything["mask_id"]] = override["lm_head_maskpred.rows"][0]
        monkeypatch.setitem(model.lm_head._parameters, "weight", torch.nn.Parameter(weight))
        suppressed.remove(everything["mask_id"])
    if recorded["args"].get("remasking") == "random":
        draws = iter(tensors(name, "generate")[f"{scenario}.rand"].double())
        monkeypatch.setattr(torch, "rand", lambda shape, **_: next(draws)[None, -shape[1] :])
    if arguments.get("generation_suffix"):
        arguments["generation_suffix"] = Words().decode(everything["suffix_ids"])
    arguments["stop_strings"] = [Words().decode(stop) for stop in recorded["stop_token_ids"] or ()]
    arguments |= {"suppress_tokens": suppressed, "eos_token_id": None, "return_dict_in_generate": True}
    output = model.generate(ids, **inputs, **arguments, **options, tokenizer=Words())
    return recorded, ids, output


@pytest.mark.parametrize(("name", "scenario"), SCENARIOS)
def test_generate(models, name, scenario, monkeypatch):
    if "prompt_has_mask" in scenario:  # we refuse what the authors' code takes for a part of the canvas
        with pytest.raises(ValueError, match="mask token 126336"):
            run_scenario(models[name], name, scenario, monkeypatch)
        return
    recorded, ids, output = run_scenario(models[name], name, scenario, monkeypatch)
    assert output.sequences[0, ids.shape[1] :].tolist() == recorded["output_ids"]
    assert output.num_forwards.tolist() == [recorded["forward_calls"]]
    last = {}
    for number, step in enumerate(recorded["steps"]):
        for position, token, confidence in zip(step["positions"], step["tokens"], step["confidence"]):
            # A null confidence is a position that the authors' top-k picked for want of candidates; a committed mask
            # token stays masked and is committed again later.
            if confidence is not None:
                last[position - recorded["prompt_embeds_len"]] = (number, token, confidence)
    steps, confidences = output.commit_step[0].tolist(), output.commit_confidence[0].tolist()
    committed = {place: step for place, step in enumerate(steps) if step >= 0}
    assert committed == {place: number for place, (number, _, _) in last.items()}
    # With random remasking the authors record the random draw where we give the token's probability.
    for place, (_, _, confidence) in last.items() if recorded["args"].get("remasking") != "random" else ():
        assert abs(confidences[place] - confidence) <= 5e-5
    if recorded["args"].get("generation_suffix") is None:
        canvas = output.sequences[0, ids.shape[1] :].tolist()
        assert all(canvas[place] == token for place, (_, token, _) in last.items() if place < len(canvas))
    if recorded["args"].get("remasking") == "random" or recorded["args"].get("temperature"):
        return
    # The same in fewer passes, by a depth or the other.
    depth = (1, 4)[SCENARIOS.index((name, scenario)) % 2]
    _, _, speculative = run_scenario(models[name], name, scenario, monkeypatch, speculation_depth=depth)
    assert torch.equal(speculative.sequences, output.sequences)
    assert torch.equal(speculative.commit_step, output.commit_step)
    confidences = speculative.commit_confidence, output.commit_confidence
    torch.testing.assert_close(*confidences, atol=5e-5, rtol=0, equal_nan=True)
    assert (speculative.num_forwards <= output.num_forwards).all()


def ids_of(processor, chat, template, **options):
    """The rendered prompt, and its ids with −200 for the image."""
    text = processor.apply_chat_template(chat, chat_template=CHAT_TEMPLATES[template], **options)
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    return text, [-200 if token == processor.image_token_id else token for token in ids]


PROMPTS = json.loads((FIXTURES / "labels.json").read_text())["prompts"]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: f"{prompt['template']} {prompt['question']:.20}")
def test_prompts(prompt):
    """The rendered prompts are the authors' ones, and so are their ids, the dropped newline after `<image>` aside."""
    processor = tiny_processor()
    content = [{"type": "image"}] * prompt["with_image"] + [{"type": "text", "text": prompt["question"]}]
    chat = [{"role": "user", "content": content}]
    text, ids = ids_of(processor, chat, prompt["template"], add_generation_prompt=True)
    assert text == prompt["prompt"]
    if prompt["with_image"]:
        newline = ids.index(-200) + 1
        assert processor.tokenizer.decode(ids.pop(newline)) == "\n"
    assert ids == prompt["input_ids"]
    suffix = " Answer concisely in English."  # of the authors' demo, which has no newline either
    if prompt["template"] == "llava_llada" and prompt["with_image"] and prompt["question"].endswith(suffix):
        content[1]["text"] = prompt["question"].removesuffix(suffix)
        assert ids_of(processor, chat, "llava_llada_demo", add_generation_prompt=True)[1] == prompt["input_ids"]


def test_plain_prompt_of_stage_1():
    """The "llada_plain" template gives the recorded ids, and marks the recorded labels."""
    processor = tiny_processor()
    cases = json.loads((FIXTURES / "labels.json").read_text())["cases"]
    (case,) = [case for case in cases if case["template"] == "llada_plain"]
    human, answer = (turn["value"] for turn in case["conversations"])
    question = [{"type": "image"}, {"type": "text", "text": human.replace("<image>", "").strip()}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    assert ids_of(processor, chat, "llada_plain")[1] == case["input_ids"]
    encoded = processor.tokenizer.apply_chat_template(
        chat, chat_template=CHAT_TEMPLATES["llada_plain"], tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert [token if mask else -100 for token, mask in marked] == case["labels"]


STRANGER = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for file in folder.glob("*/*/inputs.safetensors"):
    inputs, folder = load_file(file), file.parent
    ids, length = inputs.pop("input_ids"), int(inputs.pop("length"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(input_ids=ids, **inputs).logits[:, -8:]
    options = {"max_new_tokens": length, "block_length": length, "steps": length, "eos_token_id": None}
    sequences = model.generate(ids, **inputs, **options)
    save_file({"logits": logits.contiguous(), "sequences": sequences}, folder / "outputs.safetensors")
"""


def test_in_a_fresh_process(folders, tmp_path):
    """Converted folders with `trust_remote_code=True`, this package out of reach: the recorded tokens."""
    expected = {}
    for name, layout, scenario in (
        ("pad_mha", "checkpoint", "g32_b32_s32"), ("anyres_gqa", "checkpoint", "g32_b32_s32"),
        ("pad_mha", "llada_text", "g16_b16_s16_text_only"),
    ):  # fmt: skip
        folder = tmp_path / layout / name
        shutil.copytree(folders / "converted" / layout / name, folder)
        model = LLaDAMedVForConditionalGeneration.from_pretrained(folder)
        recorded = numbers(name, "generate")["scenarios"][scenario]
        assert recorded["stop_token_ids"] is None
        images = [Image.open(FIXTURES / "images" / f"{recorded['image']}.png")] if recorded["image"] else []
        ids, inputs = splice(model, recorded["input_ids"], images)
        length = torch.tensor(recorded["args"]["gen_length"])
        save_file({"input_ids": ids, "length": length, **inputs}, folder / "inputs.safetensors")
        if layout == "llada_text":  # recorded with the vision-language model's suppressed ids
            suppressed = [*numbers(name, "generate")["suppressed_ids"], model.config.mask_token_id]
            model.generation_config.suppress_tokens = suppressed
            model.generation_config.save_pretrained(folder)
        with torch.no_grad():
            expected[folder] = model(input_ids=ids, **inputs).logits[:, -8:], recorded["output_ids"]
    run_as_stranger(STRANGER, tmp_path, tmp_path)
    for folder, (logits, output_ids) in expected.items():
        outputs = load_file(folder / "outputs.safetensors")
        torch.testing.assert_close(outputs["logits"], logits, atol=0, rtol=0)
        assert outputs["sequences"][0, -len(output_ids) :].tolist() == output_ids


@pytest.mark.parametrize("name", NAMES)
def test_prompt_of_a_converted_folder(folders, name):
    """The folder's own processor renders the prompt that its generation was recorded with."""
    processor = LLaDAMedVProcessor.from_pretrained(folders / "converted" / "checkpoint" / name)
    recorded = numbers(name, "generate")["scenarios"]["g32_b32_s32"]
    image = Image.open(FIXTURES / "images" / f"{recorded['image']}.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": recorded["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = inputs["input_ids"][0].tolist()
    first = ids.index(processor.image_token_id)
    count = ids.count(processor.image_token_id)
    # The authors' tokenisation loses the newline behind the image.
    assert [*ids[:first], -200, *ids[first + count + 1 :]] == recorded["input_ids"]
    assert count == recorded["prompt_embeds_len"] - len(recorded["input_ids"]) + 1
