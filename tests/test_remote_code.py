"""A saved folder in a process that cannot import this package: same logits, same text, same pipeline."""

import json

import torch
from PIL import Image

from lladamedv.demo import load_model
from tests.stranger import run_as_stranger
from tests.tiny import random_image


# Run here, with this package's classes, and there.
ANSWER = """
question = [{"type": "image", "image": Image.open(folder / "picture.png")}, {"type": "text", "text": "Is it a lesion?"}]
chat = [{"role": "user", "content": question}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = [m(**inputs).logits for m in models]
text = processor.batch_decode(models[0].generate(**inputs)[:, inputs["input_ids"].shape[1]:])[0]
"""
STRANGER = f"""
import json, torch
import transformers as t
from PIL import Image
load = {{"pretrained_model_name_or_path": folder, "trust_remote_code": True}}
processor = t.AutoProcessor.from_pretrained(**load)
image_processor = t.AutoImageProcessor.from_pretrained(**load)
classes = (t.AutoModelForCausalLM, t.AutoModelForMultimodalLM, t.AutoModelForImageTextToText)
models = [cls.from_pretrained(**load, dtype=torch.float32).eval() for cls in classes]
{ANSWER}
body = t.AutoModel.from_pretrained(**load, dtype=torch.float32).eval()
with torch.no_grad():
    logits.append(models[0].lm_head(body(**inputs).last_hidden_state))
assert torch.equal(image_processor(question[0]["image"], return_tensors="pt")["pixel_values"], inputs["pixel_values"])
pipe = t.pipeline("image-text-to-text", model=str(folder), trust_remote_code=True, dtype=torch.float32)
plain = processor.apply_chat_template(chat, add_generation_prompt=True)
texts = [text, *(row[0]["generated_text"] for row in pipe(text=[chat, chat], batch_size=2, return_full_text=False))]
texts += [pipe(text=chat, return_full_text=False)[0]["generated_text"]]
texts += [pipe(images=question[0]["image"], text=plain, return_full_text=False)[0]["generated_text"]]
kinds = [type(models[0].generation_config).__name__, t.AutoConfig.from_pretrained(**load).model_type]
json.dump([[each[0, -3:].tolist() for each in logits], texts, kinds], open(folder / "out.json", "w"))
"""


def test_a_stranger_gets_the_same_answers(tmp_path):
    folder = tmp_path / "model"
    model, processor = load_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    random_image(64, 64).save(folder / "picture.png")
    here = {"models": [model], "processor": processor, "folder": folder, "torch": torch, "Image": Image}
    exec(ANSWER, here)
    run_as_stranger(STRANGER, folder, tmp_path)
    logits, texts, kinds = json.loads((folder / "out.json").read_text())
    assert len(logits) == 4 and all(torch.tensor(each).equal(here["logits"][0][0, -3:]) for each in logits)
    assert texts == [here["text"]] * 5 and kinds == ["LLaDAMedVGenerationConfig", "lladamedv"]
