"""Conversations and pictures become model inputs; texts and pictures that do not fit together are refused."""

import pytest
import torch

from lladamedv import LLaDAMedVProcessor
from lladamedv.processing.processing_lladamedv import (
    CHAT_TEMPLATE,
    MEDICAL_SYSTEM_PROMPT,
    get_training_chat_template,
    normalize_chat,
)
from tests.tiny import random_image, tiny_processor


IMAGE = random_image()


def chat(*parts, answer=None):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def encode(processor, conversation, **kwargs):
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"} | kwargs
    return processor.apply_chat_template(conversation, **kwargs)


def test_image_token_is_the_next_free_id_and_fits_the_released_matrix(processor):
    assert processor.image_token_id == 126349 < 126464
    assert processor.tokenizer.convert_ids_to_tokens(126349) == "<image>"
    assert processor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == 126336


@pytest.mark.parametrize("aspect_ratio", ["square", "pad", "anyres_max_4"])
def test_exact_number_of_image_tokens(aspect_ratio):
    processor = tiny_processor(aspect_ratio)
    image = random_image(90, 40)
    inputs = encode(processor, chat(image, "What is this?"))
    expected = processor.image_processor.get_number_of_image_tokens(40, 90)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == expected
    both = encode(processor, chat(image, image, "Compare."))
    each = processor.image_processor.get_number_of_image_tokens(40, 90, alone=False)
    assert int((both["input_ids"] == processor.image_token_id).sum()) == 2 * each
    assert both["batch_num_images"].tolist() == [2]


def test_batch_with_and_without_images(processor):
    conversations = [chat(IMAGE, "What is this?"), chat("No picture here."), chat(IMAGE, IMAGE, "Two?")]
    inputs = encode(processor, conversations, processor_kwargs={"padding": True})
    images = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert images == [16, 0, 32] and inputs["batch_num_images"].tolist() == [1, 0, 2]
    assert inputs["pixel_values"].shape == (3, 1, 3, 32, 32)


def test_system_message(processor):
    default = processor.apply_chat_template(chat("Hi"))
    assert MEDICAL_SYSTEM_PROMPT in default and default.count("system") == 1
    own = [{"role": "system", "content": "Be brief."}, *chat("Hi")]
    rendered = processor.apply_chat_template(own)
    assert "Be brief." in rendered and MEDICAL_SYSTEM_PROMPT not in rendered


def test_texts_around_an_image_are_lines_of_their_own():
    (message,) = normalize_chat(chat("a", "b", IMAGE, "c"))
    assert message["content"] == [{"type": "image", "image": IMAGE}, {"type": "text", "text": "ab\nc"}]


def test_training_template_marks_the_assistants_tokens(processor):
    conversation, template = chat(IMAGE, "What is this?", answer="A lesion."), get_training_chat_template(CHAT_TEMPLATE)
    assert processor.apply_chat_template(conversation) == processor.apply_chat_template(conversation, template)
    options = {"add_generation_prompt": False, "chat_template": template, "return_assistant_tokens_mask": True}
    inputs = encode(processor, conversation, **options)
    marked = inputs["input_ids"][torch.as_tensor(inputs["assistant_masks"]).bool()]
    assert processor.decode(marked) == "A lesion.<|eot_id|>"


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = LLaDAMedVProcessor.from_pretrained(tmp_path)
    conversation = chat(random_image(), "What is this?")
    before, after = encode(processor, conversation), encode(again, conversation)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([IMAGE], "no placeholder", r"`images` holds 1 images, but the prompts hold \[0\] <image> placeholders"),
        (None, "<image> but no picture", r"`images` holds 0 images, but the prompts hold \[1\]"),
        ([IMAGE], "<image><image> two", r"`images` holds 1 images, but the prompts hold \[2\]"),
        ([[IMAGE] * 2, [IMAGE]], ["<image> 1", "<image><image> 2"], r"holds \[2, 1\] images, but .* hold \[1, 2\]"),
        (None, "   ", "non-empty texts"),
        (None, ["ok", ""], "non-empty texts"),
    ],
)
def test_bad_input(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_an_image_part_with_reading_options_is_refused(processor):
    """They mean something in the server's requests, and would be ignored here."""
    image = {"type": "image", "image": random_image(), "detail": "low", "window": "lung"}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "Why?"}]}]
    with pytest.raises(ValueError, match="an image with window, which would have no effect"):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert processor.apply_chat_template([{**chat[0], "content": [{**image, "window": None}]}], tokenize=True)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_what_the_template_does_not_use_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is given, but the chat template does not use it"):
        tiny_processor().apply_chat_template([{"role": "user", "content": "Hello"}], **{name: [{"title": "x"}]})


def test_assistant_masks_of_a_batch_are_tensors():
    chats = [
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}] for answer in ("Yes", "No, no")
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batch = tiny_processor().apply_chat_template(chats, return_tensors="pt", **options)
    for chat, mask, seen in zip(chats, batch["assistant_masks"], batch["attention_mask"]):
        alone = tiny_processor().apply_chat_template(chat, **options)["assistant_masks"][0]
        assert mask[seen.bool()].tolist() == alone and mask.sum() == sum(alone)


def test_bare_texts_without_a_default_template():
    processor = tiny_processor()
    processor.chat_template = {"mine": "<|eot_id|>"}
    assert processor(text="<image> What?", images=random_image(), return_tensors="pt")["input_ids"].shape[0] == 1
