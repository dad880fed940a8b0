"""Chat and images into model inputs: the prompt template and the processor."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jinja2
from tokenizers import AddedToken
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens, render_jinja_template

from .medical_images import READING_OPTIONS


logger = logging.get_logger(__name__)
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


_TURN = "{{- turn.text | trim"  # how the expression begins that writes a turn's text and its end


def _chat_template(system: str | None, image: str = "'<image>\\n'", suffix: str = "") -> str:
    """The Llama-3-like template that all released checkpoints share, for a system text and ways of writing a turn."""
    system_turn = f"<|start_header_id|>system<|end_header_id|>\\n\\n{system}<|eot_id|>" if system else ""
    suffix = f"('{suffix}' if message['role'] == 'user' else '') + " if suffix else ""
    turn = f"{_TURN} + {suffix}'<|eot_id|>' -}}}}"
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


def get_training_chat_template(chat_template: str) -> str:
    """The template that renders the same text and marks the assistant's tokens, its end of turn included, with
    `{% generation %}`.

    Raises:
        ValueError: for a template that marks nothing itself and does not write turns as [`CHAT_TEMPLATES`] do.
    """
    if "{% generation %}" in chat_template or "{%- generation" in chat_template:
        return chat_template
    head, found, rest = chat_template.partition(_TURN)
    turn, end, tail = rest.partition("-}}")
    if not found or not end or _TURN in tail:
        raise ValueError(
            f"`chat_template` begins {chat_template[:60]!r} and marks no answers; allowed are the templates that come "
            "with this package, and templates with {% generation %} around the assistant's text."
        )
    turn = found + turn + end
    return (
        f"{head}{{%- if message['role'] == 'assistant' -%}}{{% generation %}}{turn}{{% endgeneration %}}{{%- else -%}}"
        f"{turn}{{%- endif -%}}{tail}"
    )


_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja")  # that a processor may have
_LARGEST_CONFIG, _LARGEST_TOKENIZER = 2**24, 2**28  # bytes
_CHAT_ADVICE = (
    "Give a conversation to `apply_chat_template`, or to a pipeline as `text=[{'role': 'user', 'content': "
    "[{'type': 'image', 'image': …}, {'type': 'text', 'text': …}]}]`."
)
ROLES, IMAGE_KEYS = ("system", "user", "assistant"), ("image", "url", "path", "base64")


class LLaDAMedVProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: text with `<image>` placeholders and images in, model inputs out.

    A `text` is taken as it is: `<image>` and special tokens in it are what they say. Texts of users belong into the
    messages of [`apply_chat_template`], where they stay text.

    `<image>` is not part of the released vocabulary. It is added to the tokenizer as the next free id (126349 for the
    released one), which is a spare row of the released embedding matrix: the matrix is neither resized nor changed,
    and the row is never read, because image features stand in its place. Each placeholder is repeated until there is
    one token per image feature.

    Args:
        image_processor ([`LLaDAMedVImageProcessor`]): cuts images into tiles.
        tokenizer (`PreTrainedTokenizerFast`): LLaDA's tokenizer; `<image>` is added where it is missing.
        chat_template (`str` or `dict[str, str]`, *optional*): Jinja template, or several by name with one "default"; by
            default LLaDA-MedV's own of [`CHAT_TEMPLATES`], which starts with the medical system text unless the first
            message is a system message.

    Raises (when called):
        ValueError: if the number of images differs from the number of placeholders, in total or in a prompt; if a
            prompt is empty or no text that UTF-8 can hold; or for the reasons of the image processor.
        TypeError: for something that is no image.
    """

    image_token = "<image>"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        if tokenizer is not None and self.image_token not in tokenizer.get_added_vocab():
            tokenizer.add_tokens(AddedToken(self.image_token, special=True, normalized=False), special_tokens=True)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `ProcessorMixin.from_pretrained`, but code of a folder runs with `trust_remote_code=True` only.

        Raises:
            ValueError: for a folder that holds such code and needs it, or files that hold no processor.
        """
        kwargs.setdefault("trust_remote_code", False)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        for file in (file for pattern in _FILES for file in folder.glob(pattern)):
            # The library opens what is there: a pipe or a device may never end.
            largest = _LARGEST_CONFIG if file.name.endswith("config.json") else _LARGEST_TOKENIZER
            if not file.is_file() or file.stat().st_size > largest:
                raise ValueError(f"{str(file)!r} is no regular file of at most {largest} bytes; no others are allowed.")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:  # of many kinds, and of the tokenizers library no kind of its own
            if type(error) is ValueError or isinstance(error, (ImportError, OSError)):
                raise
            name, reason = str(pretrained_model_name_or_path), f"{' '.join(str(error).split()):.300}"
            raise ValueError(f"The processor of {name!r} cannot be read: {reason}") from error

    def __call__(self, images=None, text=None, **kwargs):
        """As in Transformers; tensors of several texts are padded unless `padding` says otherwise."""
        given = {**(kwargs.get("common_kwargs") or {}), **(kwargs.get("text_kwargs") or {}), **kwargs}
        if given.get("return_tensors") is not None and "padding" not in given:
            kwargs["padding"] = True
        return super().__call__(images=images, text=text, **kwargs)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """A conversation, or a list of them, as a prompt or, with `tokenize=True`, as model inputs.

        Training, evaluation, the server and every command make their token ids here.

        The images of a turn come first, whatever the order of its parts, as in LLaVA's training and templates; texts
        keep their order behind them, also a text that stood between two images.

        What messages say is text and never becomes a control token, whatever it looks like: a `<|mdm_mask|>`,
        `<|eot_id|>` or `<image>` in it is tokenized as ordinary characters. That holds for `tokenize=True`, where
        `sanitize_control_tokens=False` switches it off. It cannot hold for `tokenize=False`, which returns what a
        tokenizer takes for control tokens; a warning says so.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): messages with a `role` (`"system"`, `"user"` or
                `"assistant"`) and a `content`, which is text or a list of parts: `{"type": "text", "text": …}` and
                `{"type": "image", "image": …}` (or `url`, `path`, `base64`). Messages and parts may be dataclasses or
                pydantic models, too.
            chat_template (`str`, *optional*): a template, or the name of one of the processor's.
            return_assistant_tokens_mask (`bool`, *optional*): also return `assistant_masks`, 1 for the tokens that the
                template marks with `{% generation %}`. It needs `tokenize=True` and `return_dict=True`, and for
                templates other than [`CHAT_TEMPLATES`] such marks.
            The other arguments are those of Transformers.

        Raises:
            ValueError: for a conversation of another form, and for the reasons of calling the processor.
            TypeError: for something that is no image.
        """
        several = isinstance(conversation, (list, tuple)) and any(
            isinstance(chat, (list, tuple)) for chat in conversation
        )
        chats = [normalize_chat(chat) for chat in (conversation if several else [conversation])]
        template = self._template(chat_template)
        masked = kwargs.pop("return_assistant_tokens_mask", False)
        if masked and not (kwargs.get("tokenize") and kwargs.get("return_dict")):
            raise ValueError("`return_assistant_tokens_mask` is True; it needs tokenize=True and return_dict=True.")
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in (template or ""):
                raise ValueError(f"`{name}` is given, but the chat template does not use it; leave it out.")
        if kwargs.get("tokenize"):
            kwargs.setdefault("sanitize_control_tokens", True)
        else:
            self._warn_of_control_tokens(chats)
        try:
            if not masked:
                return super().apply_chat_template(chats if several else chats[0], chat_template, **kwargs)
            template, tensors = get_training_chat_template(template or ""), kwargs.pop("return_tensors", None)
            if tensors is not None and "padding" not in kwargs:  # the masks become tensors with the rest, afterwards
                kwargs["processor_kwargs"] = {"padding": True, **(kwargs.get("processor_kwargs") or {})}
            inputs = super().apply_chat_template(chats, template, **kwargs)
            inputs["assistant_masks"] = self._assistant_masks(inputs, chats, template, kwargs)
            return inputs.convert_to_tensors(tensors)
        except (jinja2.TemplateError, ArithmeticError, RecursionError) as error:  # Overflow: the sandbox's, of ranges
            raise ValueError(f"`conversation` does not suit the chat template: {error}") from error

    def _template(self, name: str | None = None) -> str | None:
        """The text of a template, by default the default one; `None` if there is no default."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return named.get("default" if name is None else name, name)

    def _control_tokens(self, template: str = "") -> re.Pattern:
        """Finds the tokens that must not come from what messages say, the longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = [token.content for token in added if token.special or token.content in template]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def _assistant_masks(self, inputs: dict, chats: list[list[dict]], template: str, options: dict) -> list[list[int]]:
        """For each token whether the template marks it. Transformers does that for texts without control tokens only.

        A token that lies across the end of a mark is marked.
        """
        names = ("add_generation_prompt", "continue_final_message")
        prompts, spans = render_jinja_template(
            conversations=mark_control_tokens(chats, self._control_tokens(template)), chat_template=template,
            return_assistant_tokens_mask=True, **{name: options[name] for name in names if name in options},
            **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        sizes = zip(inputs.get("image_sizes", ()), self._alone(inputs.get("batch_num_images", ())))
        counts = (self.image_processor.get_number_of_image_tokens(*map(int, size), alone) for size, alone in sizes)
        masks = []
        for prompt, own, row, seen in zip(prompts, spans, inputs["input_ids"], inputs["attention_mask"]):
            tokens = encode_marked_chat(self.tokenizer, prompt)
            mask = [0] * len(tokens)
            for start, end in own:
                (first, _), (last, length) = (self._shared_tokens(prompt[:place], tokens) for place in (start, end))
                last += last < length  # with the token that reaches across the end
                mask[first:last] = [1] * (last - first)
            expanded = [
                (token, marked) for token, marked in zip(tokens, mask)
                for _ in range(next(counts) if token == self.image_token_id else 1)
            ]  # fmt: skip
            places = [place for place, visible in enumerate(seen) if visible]
            if [int(row[place]) for place in places] != [token for token, _ in expanded]:
                raise ValueError("`chat_template` depends on other arguments; with them no assistant mask can be made.")
            masks.append([0] * len(row))
            for place, (_, marked) in zip(places, expanded):
                masks[-1][place] = marked
        return masks

    def _shared_tokens(self, head: str, tokens: list[int]) -> tuple[int, int]:
        """How many tokens the beginning of a prompt shares with all of it, and how many it has."""
        ids = encode_marked_chat(self.tokenizer, head)
        return next((n for n, (own, other) in enumerate(zip(ids, tokens)) if own != other), len(ids)), len(ids)

    def _warn_of_control_tokens(self, chats: list[list[dict]]) -> None:
        find = self._control_tokens().search
        for part in (part for chat in chats for message in chat for part in _as_parts(message["content"])):
            if part["type"] == "text" and (match := find(part["text"])):
                logger.warning(
                    "`conversation` holds the text %r, which tokenizing the prompt will take for a control token; "
                    "with tokenize=True it stays text.",
                    match.group(),
                )

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Open the images and group them by prompt."""
        if text is not None:
            prompts = text if isinstance(text, (list, tuple)) else [text]
            for prompt in prompts or [""]:
                if not _is_text(prompt) or not prompt.strip():
                    raise ValueError(
                        f"`text` is {prompt!r:.200}; allowed are non-empty texts (an empty prompt asks nothing) "
                        "without lone surrogates."
                    )
            if images is not None and not kwargs.get("sanitize_control_tokens"):
                self._warn_of_bare_texts(prompts)
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if text is not None:
            # What messages say was marked; it places no image.
            marked = mark_control_tokens(self.image_token, re.compile(re.escape(self.image_token)))
            counts = [prompt.count(self.image_token) - prompt.count(marked) for prompt in text]
            rows = [] if images is None else images if isinstance(images, list) else [images]
            nested = any(isinstance(row, list) for row in rows)
            rows = [row if isinstance(row, list) else [row] for row in rows]
            given = list(map(len, rows)) if nested else len(rows)
            if given != (counts if nested else sum(counts)):
                raise ValueError(
                    f"`images` holds {given} images, but the prompts hold {counts} {self.image_token} placeholders; "
                    f"the two must agree. {_CHAT_ADVICE}"
                )
            if rows:
                flat = (image for row in rows for image in row)
                images = [[next(flat) for _ in range(count)] for count in counts]
        return images, text, *others

    def _warn_of_bare_texts(self, prompts) -> None:
        """Say that a bare question about an image is no question to a model that was trained on turns."""
        tokens = set(self._control_tokens().findall(self._template() or ""))
        turns = tokens - {self.image_token, self.tokenizer.bos_token}
        if turns and any(not any(token in prompt for token in turns) for prompt in prompts):
            logger.warning_once(
                f"`text` holds no turn of a conversation. This model was trained on conversations; its answer to a "
                f"bare text is mostly empty. {_CHAT_ADVICE}"
            )

    def validate_inputs(self, images=None, text=None, **kwargs):
        """The checks of Transformers, of which the count of placeholders is not for marked texts: it takes what is left
        of `<ima<image>ge>` without the mark for one. [`prepare_inputs_layout`] has counted them."""
        if not kwargs.get("sanitize_control_tokens"):
            super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """As many placeholders as the image has features."""
        alone = self._alone(image_inputs["batch_num_images"])
        height, width = (int(value) for value in image_inputs["image_sizes"][image_idx])
        return self.image_token * self.image_processor.get_number_of_image_tokens(height, width, alone[image_idx])

    @staticmethod
    def _alone(batch_num_images) -> list[bool]:
        """For each image whether it is the only one of its prompt."""
        return [int(count) == 1 for count in batch_num_images for _ in range(int(count))]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Image tokens for images of these `(height, width)`, each alone in its prompt (the API that vLLM uses)."""
        if image_sizes is None:
            return MultiModalData()
        counts = [self.image_processor.get_number_of_image_tokens(height, width) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(image_sizes))


def normalize_chat(chat, argument: str = "conversation") -> list[dict]:
    """A conversation of plain messages, each with its images first and one text behind them.

    Two texts side by side could together make a control token that neither holds, so they become one.

    Args:
        chat: messages as dicts, dataclasses or pydantic models, or an object that holds such `messages`.
        argument: how errors call it.

    Raises:
        ValueError: for messages that chat templates do not expect.
    """
    chat = getattr(chat, "messages", chat)
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"`{argument}` is {chat!r:.200}; allowed are lists of messages with at least one.")
    normalized = []
    for message in map(_as_dict, chat):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise ValueError(
                f"`{argument}` holds the message {message!r:.200}; allowed are dicts whose `role` is one of {ROLES}."
            )
        images, text, beside = [], "", True
        for part in map(_as_dict, _as_parts(content)):
            kind, words = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
            is_text = kind == "text" and _is_text(words)
            is_image = kind in ("image", "image_url") and sum(part.get(key) is not None for key in IMAGE_KEYS) <= 1
            if not is_text and not is_image:
                raise ValueError(
                    f"`{argument}` holds the content {part!r:.200}; allowed are texts without lone surrogates, and "
                    'lists of {"type": "text", "text": …} and of {"type": "image", …} with one of '
                    f"{IMAGE_KEYS}."
                )
            if is_text:
                between = bool(text and words) and not beside
                text += "\n" * (between and not (text[-1].isspace() or words[0].isspace())) + words
            else:
                part = {key: value for key, value in part.items() if value is not None}
                if options := [option.name for option in READING_OPTIONS if option.name in part]:
                    raise ValueError(
                        f"`{argument}` holds an image with {', '.join(options)}, which would have no effect here; read "
                        "it by `read_medical_image` with these options first, and give its `image`."
                    )
                if "base64" in part:
                    part = {"type": "image", "url": f"data:;base64,{part['base64'].rpartition(',')[2]}"}
                images.append(part)
            beside = is_text
        parts = [*images, {"type": "text", "text": text}] if text or not images else images
        normalized.append({**message, "content": content if isinstance(content, str) else parts})
    return normalized


def _as_dict(value):
    """A message or a part of one as a dict, of a dataclass or a pydantic model, too; other values as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    return dict(value) if isinstance(value, Mapping) else value


def _as_parts(content) -> list:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, (list, tuple)) else [content]


def _is_text(value) -> bool:
    """Whether it is a text without lone surrogates, which no file and no tokenizer can hold."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


LLaDAMedVProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["CHAT_TEMPLATES", "LLaDAMedVProcessor", "get_training_chat_template", "normalize_chat"]
