"""A saved folder in a process that cannot import this package: same logits, same text, same pipeline."""

import json

import torch

from lladamedv.demo import load_model
from tests.stranger import run_as_stranger
from tests.tiny import random_image


STRANGER = """
import json, torch
import transformers as t
from PIL import Image
load = {"pretrained_model_name_or_path": folder, "trust_remote_code": True}
processor = t.AutoProcessor.from_pretrained(**load)
image_processor = t.AutoImageProcessor.from_pretrained(**load)
config = t.AutoConfig.from_pretrained(**load)
classes = (t.AutoModelForCausalLM, t.AutoModelForMultimodalLM, t.AutoModelForImageTextToText)
models = [cls.from_pretrained(**load, dtype=torch.float32).eval() for cls in classes]
body = t.AutoModel.from_pretrained(**load, dtype=torch.float32).eval()
model = models[-1]
image = Image.open(folder / "picture.png")
question = "Is there a lesion?"
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
rendered = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(chat, **rendered)
with torch.no_grad():
    logits = [m(**inputs).logits for m in models]
    logits.append(model.lm_head(body(**inputs).last_hidden_state))
assert torch.equal(image_processor(image, return_tensors="pt")["pixel_values"], inputs["pixel_values"])
text = processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1]:])[0]
pipe = t.pipeline("image-text-to-text", model=str(folder), trust_remote_code=True, dtype=torch.float32)
plain = processor.apply_chat_template(chat, add_generation_prompt=True)
json.dump({
    "logits": [l[0, -3:].tolist() for l in logits],
    "text": text,
    "generation_config": type(model.generation_config).__name__,
    "model_type": config.model_type,
    "chat": pipe(text=chat, return_full_text=False)[0]["generated_text"],
    "plain": pipe(images=image, text=plain, return_full_text=False)[0]["generated_text"],
    "batched": [row[0]["generated_text"] for row in pipe(text=[chat, chat], batch_size=2, return_full_text=False)],
}, open(folder / "out.json", "w"))
"""


def test_a_stranger_gets_the_same_answers(tmp_path):
    model, processor = load_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image = random_image(64, 64)
    image.save(folder / "picture.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Is there a lesion?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs).logits[0, -3:]
    text = processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :])[0]

    run_as_stranger(STRANGER, folder, tmp_path)
    out = json.loads((folder / "out.json").read_text())
    for other in out["logits"]:
        assert torch.equal(torch.tensor(other), logits)
    assert out["text"] == text and out["chat"] == out["plain"] == text and out["batched"] == [text, text]
    assert out["generation_config"] == "LLaDAMedVGenerationConfig" and out["model_type"] == "lladamedv"
