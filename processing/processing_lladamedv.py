"""Chat and images into model inputs: the prompt template and the processor."""

from tokenizers import AddedToken
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin


# What LLaDA-MedV was trained with (LLaVA-Med's system text).
MEDICAL_SYSTEM_PROMPT = (
    "You are a helpful medical language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)

_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nSYSTEM_PROMPT<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {%- set turn = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set turn.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- set turn.text = turn.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}
        {%- endfor -%}
    {%- endif -%}
    RENDER_TURN
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""".replace("SYSTEM_PROMPT", MEDICAL_SYSTEM_PROMPT)
_TURN = "{{- turn.text | trim + '<|eot_id|>' -}}"

CHAT_TEMPLATE = _TEMPLATE.replace("RENDER_TURN", _TURN)
# The same text; marks the assistant's tokens, its end of turn included, for `return_assistant_tokens_mask=True`.
TRAINING_CHAT_TEMPLATE = _TEMPLATE.replace(
    "RENDER_TURN",
    "{%- if message['role'] == 'assistant' -%}{% generation %}" + _TURN + "{% endgeneration %}{%- else -%}" + _TURN
    + "{%- endif -%}",
)  # fmt: skip


class LLaDAMedVProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: text with `<image>` placeholders and images in, model inputs out.

    `<image>` is not part of the released vocabulary. It is added to the tokenizer as the next free id (126349 for the
    released one), which is a spare row of the released embedding matrix: the matrix is neither resized nor changed,
    and the row is never read, because image features stand in its place. Each placeholder is repeated until there is
    one token per image feature.

    Args:
        image_processor ([`LLaDAMedVImageProcessor`]): cuts images into tiles.
        tokenizer (`PreTrainedTokenizerFast`): LLaDA's tokenizer; `<image>` is added where it is missing.
        chat_template (`str`, *optional*): Jinja template; by default LLaDA-MedV's own, which starts with the medical
            system text unless the first message is a system message.

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

__all__ = ["LLaDAMedVProcessor"]
