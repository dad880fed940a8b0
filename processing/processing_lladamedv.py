"""Chat and images into model inputs: the prompt template and the processor."""

from tokenizers import AddedToken
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin


_ABILITIES = (
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language."
)
# What LLaDA-MedV was trained with (LLaVA-Med's system text) …
MEDICAL_SYSTEM_PROMPT = f"You are a helpful medical language and vision assistant. {_ABILITIES}"
# … and LLaDA-V, whose prompt the authors' demo keeps.
GENERAL_SYSTEM_PROMPT = f"You are a helpful language and vision assistant. {_ABILITIES}"
# What the authors' demo appends to every question.
CONCISE_SUFFIX = " Answer concisely in English."

_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- 'SYSTEM_TURN' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {%- set turn = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set turn.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- set turn.text = turn.text + (IMAGE if part['type'] == 'image' else part['text']) -%}
        {%- endfor -%}
    {%- endif -%}
    RENDER_TURN
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
# Stage 1 aligns the projector on bare captions: the image, the caption, a newline; no roles, no instruction.
_PLAIN_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {%- else -%}
        {%- if message['content'] is string -%}
            {%- set caption = message['content'] -%}
        {%- else -%}
            {%- set caption = message['content'] | map(attribute='text') | join -%}
        {%- endif -%}
        {% generation %}{{- caption + '\\n' -}}{% endgeneration %}
    {%- endif -%}
{%- endfor -%}
"""


def _chat_template(system: str | None, image: str = "'<image>\\n'", suffix: str = "", training: bool = False) -> str:
    """The Llama-3-like template that all released checkpoints share, for a system text and ways of writing a turn."""
    system_turn = f"<|start_header_id|>system<|end_header_id|>\\n\\n{system}<|eot_id|>" if system else ""
    turn = "{{- turn.text | trim + '<|eot_id|>' -}}"
    if suffix:
        turn = "{{- turn.text | trim + ('" + suffix + "' if message['role'] == 'user' else '') + '<|eot_id|>' -}}"
    if training:
        turn = (
            "{%- if message['role'] == 'assistant' -%}{% generation %}" + turn + "{% endgeneration %}{%- else -%}"
            + turn + "{%- endif -%}"
        )  # fmt: skip
    return _TEMPLATE.replace("SYSTEM_TURN", system_turn).replace("IMAGE", image).replace("RENDER_TURN", turn)


CHAT_TEMPLATE = _chat_template(MEDICAL_SYSTEM_PROMPT)
# What the released checkpoints were trained or are run with, under the authors' names where they have one. A converted
# folder carries all of them, for `apply_chat_template(…, chat_template=name)`.
CHAT_TEMPLATES = {
    "llava_llada_med": CHAT_TEMPLATE,
    "llava_llada": _chat_template(GENERAL_SYSTEM_PROMPT),
    # The authors' demo as it arrives at the model: their tokenisation loses the newline behind the image.
    "llava_llada_demo": _chat_template(GENERAL_SYSTEM_PROMPT, image="'<image>'", suffix=CONCISE_SUFFIX),
    "llada_plain": _PLAIN_TEMPLATE,
    "llada": _chat_template(None, image="raise_exception('This prompt is for a text-only model: it takes no images.')"),
}


# The same texts; they mark the assistant's tokens, its end of turn included, for `return_assistant_tokens_mask=True`.
_TRAINING_CHAT_TEMPLATES = {
    CHAT_TEMPLATES["llava_llada_med"]: _chat_template(MEDICAL_SYSTEM_PROMPT, training=True),
    CHAT_TEMPLATES["llava_llada"]: _chat_template(GENERAL_SYSTEM_PROMPT, training=True),
    CHAT_TEMPLATES["llava_llada_demo"]: _chat_template(
        GENERAL_SYSTEM_PROMPT, image="'<image>'", suffix=CONCISE_SUFFIX, training=True
    ),
    CHAT_TEMPLATES["llada"]: _chat_template(None, image="'<image>\\n'", training=True),
}


def get_training_chat_template(chat_template: str) -> str:
    """The template that renders the same text and marks the assistant's tokens with `{% generation %}`.

    Raises:
        ValueError: for a template that is none of [`CHAT_TEMPLATES`] and marks nothing itself.
    """
    if "{% generation %}" in chat_template or "{%- generation" in chat_template:
        return chat_template
    if chat_template not in _TRAINING_CHAT_TEMPLATES:
        raise ValueError(
            f"`chat_template` begins {chat_template[:60]!r} and marks no answers; allowed are the templates that come "
            "with this package, and templates with {% generation %} around the assistant's text."
        )
    return _TRAINING_CHAT_TEMPLATES[chat_template]


class LLaDAMedVProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: text with `<image>` placeholders and images in, model inputs out.

    `<image>` is not part of the released vocabulary. It is added to the tokenizer as the next free id (126349 for the
    released one), which is a spare row of the released embedding matrix: the matrix is neither resized nor changed,
    and the row is never read, because image features stand in its place. Each placeholder is repeated until there is
    one token per image feature.

    Args:
        image_processor ([`LLaDAMedVImageProcessor`]): cuts images into tiles.
        tokenizer (`PreTrainedTokenizerFast`): LLaDA's tokenizer; `<image>` is added where it is missing.
        chat_template (`str` or `dict[str, str]`, *optional*): Jinja template, or several by name with one "default"; by
            default LLaDA-MedV's own, which starts with the medical system text unless the first message is a system
            message. [`CHAT_TEMPLATES`] holds those of all released checkpoints.

    Raises (when called):
        ValueError: if the number of images differs from the number of placeholders, in total or in a prompt; if a
            prompt is empty; or for the reasons of the image processor.
    """

    image_token = "<image>"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        if tokenizer is not None and self.image_token not in tokenizer.get_added_vocab():
            tokenizer.add_tokens(AddedToken(self.image_token, special=True, normalized=False), special_tokens=True)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Open the images and group them by prompt."""
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if text is not None and not all(isinstance(prompt, str) and prompt.strip() for prompt in text):
            raise ValueError(f"`text` is {text!r}; allowed are non-empty texts: an empty prompt asks nothing.")
        if images is not None and text is not None:
            counts = [prompt.count(self.image_token) for prompt in text]
            if isinstance(images, list) and any(isinstance(row, list) for row in images):
                given = [len(row) if isinstance(row, list) else 1 for row in images]
                if given != counts:
                    raise ValueError(
                        f"`images` holds {given} images per prompt, but the prompts hold {counts} {self.image_token} "
                        "placeholders; the two must agree."
                    )
            flat = iter(make_flat_list_of_images(images))
            if sum(counts) == len(make_flat_list_of_images(images)):
                images = [[next(flat) for _ in range(count)] for count in counts]
        return images, text, *others

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """As many placeholders as the image has features."""
        alone = [count == 1 for count in image_inputs["batch_num_images"] for _ in range(int(count))]
        height, width = (int(value) for value in image_inputs["image_sizes"][image_idx])
        return self.image_token * self.image_processor.get_number_of_image_tokens(height, width, alone[image_idx])

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Image tokens for images of these `(height, width)`, each alone in its prompt (the API that vLLM uses)."""
        if image_sizes is None:
            return MultiModalData()
        counts = [self.image_processor.get_number_of_image_tokens(height, width) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(image_sizes))


LLaDAMedVProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["CHAT_TEMPLATES", "LLaDAMedVProcessor", "get_training_chat_template"]
