"""Random cases for the properties: tiny models, batches of prompts, and options of `generate` in valid combinations.

Everything of a model is computed in float64. A batch and a row alone, or two paddings of a row, then differ by 1e-15
and never decide a near-tie differently, so that answers are compared for equality and no case has to be left out.
"""

from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration
from tests.tiny import Words, randomize


WORDS, BOS, END, MASK, IMAGE, VOCABULARY = 30, 30, 31, 38, 39, 40  # ids below WORDS are ordinary ones
TILE, PATCH, TILES = 16, 8, 5
IMAGE_SIZES = [(16, 16), (40, 20), (16, 48), (7, 25)]  # height and width, in pixels


# Models


@dataclass(frozen=True)
class ModelSpec:
    """`kind` is an aspect ratio, or "text" for a model without images; the seed also decides the size."""

    kind: str
    seed: int
    attention: str = "sdpa"


@cache
def build_model(spec: ModelSpec) -> LLaDAMedVForConditionalGeneration:
    """A random model in float64, with logits far enough apart that answers depend on all that they should depend on."""
    text_only = spec.kind == "text"
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": TILE, "patch_size": PATCH}
    config = LLaDAMedVConfig(
        vision_config=None if text_only else vision,
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 16 if spec.seed % 2 else 32,
            "intermediate_size": 16,
            "num_hidden_layers": 1 + spec.seed // 2 % 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2 if spec.seed % 3 else 4,
            "max_position_embeddings": 128,
            "bos_token_id": BOS,
            "eos_token_id": END,
            "pad_token_id": END,
        },
        image_token_id=IMAGE,
        mask_token_id=MASK,
        text_only=text_only,
        **({} if text_only else {"vision_aspect_ratio": spec.kind}),
        image_grid_pinpoints=None if text_only else [[16, 32], [32, 16], [32, 32]],
    )
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = LLaDAMedVForConditionalGeneration._from_config(config, attn_implementation=spec.attention)
    randomize(model, spec.seed)
    if spec.seed >= 4:  # one that repeats itself, and likes the mask, if it may propose it
        with torch.no_grad():
            model.lm_head.weight[[0, 1, 2, MASK]] *= 2
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):  # it rounds to float32
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model.double().eval()


def model_specs(kinds=("text", "square", "pad", "anyres_max_2"), attention=("sdpa", "eager")):
    return st.builds(ModelSpec, st.sampled_from(kinds), st.integers(0, 7), st.sampled_from(attention))


# Prompts


@dataclass(frozen=True)
class Prompt:
    """Words, images of these sizes, and words."""

    before: tuple[int, ...]
    images: tuple[tuple[int, int], ...]
    after: tuple[int, ...]
    pixel_seed: int = 0


words = st.integers(0, WORDS - 1)


def prompts(kind: str):
    """Prompts that a model of this kind understands."""
    images = st.just(()) if kind == "text" else st.lists(st.sampled_from(IMAGE_SIZES), max_size=2).map(tuple)
    texts = st.lists(words, max_size=4).map(tuple)
    return st.builds(Prompt, texts, images, texts.filter(len), st.integers(0, 9))


@dataclass(frozen=True)
class Padding:
    """Where what a row lacks goes (left, right, or by turns either), how many columns more there are, and what id."""

    side: str = "left"
    extra: int = 0
    token: int = END


paddings = st.builds(
    Padding, st.sampled_from(["left", "right", "mixed"]), st.integers(0, 2), st.sampled_from([END, 0, MASK])
)


@torch.no_grad()
def collate(model, batch, padding: Padding = Padding()) -> dict:
    """The inputs of `generate` for some prompts, as the processor would make them."""
    rows, pixels, sizes = [], [], []
    tiles = TILES if "anyres" in model.config.vision_aspect_ratio else 1
    for prompt in batch:
        row = list(prompt.before)
        if prompt.images:
            shape = (len(prompt.images), tiles, 3, TILE, TILE)
            generator = torch.Generator().manual_seed(prompt.pixel_seed)
            pixels.append(torch.randn(shape, generator=generator, dtype=torch.float64))
            sizes.append(torch.tensor(prompt.images))
            features = model.get_image_features(pixels[-1], sizes[-1], torch.tensor([len(prompt.images)]))
            row += [IMAGE] * sum(map(len, features.pooler_output))
        rows.append(row + list(prompt.after))
    width = max(map(len, rows)) + padding.extra
    ids, mask = torch.full((len(rows), width), padding.token), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        spare = width - len(row)
        left = {"left": spare, "right": 0, "mixed": spare // (1 + number % 3)}[padding.side]
        ids[number, left : left + len(row)] = torch.tensor(row)
        mask[number, left : left + len(row)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pixels:
        inputs |= {"pixel_values": torch.cat(pixels), "image_sizes": torch.cat(sizes)}
        inputs["batch_num_images"] = torch.tensor([len(prompt.images) for prompt in batch])
    return inputs


# Options


def _maybe(strategy):
    return st.none() | strategy


def id_texts(least=1, most=3):
    """Texts of [`Words`]."""
    return st.lists(words, min_size=least, max_size=most).map(lambda ids: " ".join(map(str, ids)))


@st.composite
def commit_rules(draw, sampled: bool) -> dict:
    """Options that say which tokens a step commits."""
    name = draw(st.sampled_from(["remasking", "remasking", "confidence_threshold", "factor", "entropy_bound"]))
    if name == "remasking":
        rankings = ["low_confidence", "margin", "entropy", *["random"] * sampled]
        shift = draw(_maybe(st.sampled_from([0.2, 1.0, 3.0])))
        return {"remasking": draw(st.sampled_from(rankings)), "schedule_shift": shift}
    values = {"confidence_threshold": [0.05, 0.3, 0.6, 1.0], "factor": [0.1, 1.0, 2.5], "entropy_bound": [0.1, 1.0, 3]}
    return {name: draw(st.sampled_from(values[name]))}


@st.composite
def caches(draw, always: bool) -> dict:
    """Options of the cache, without one in half of the cases if not `always`."""
    if not always and draw(st.booleans()):
        return {}
    return {
        "use_cache": True,
        "cache_implementation": draw(st.sampled_from(["dual", "prefix", "prefix", None])),
        "cache_refresh_interval": draw(_maybe(st.integers(1, 4))),
        "cache_drift_bound": draw(_maybe(st.sampled_from([1e-4, 0.05, 1.0]))),
        "output_cache_drift": draw(st.booleans()),
    }


@st.composite
def generation_options(draw, sampled=True, ends=True, masks=False, cached=False) -> dict:
    """Options of `generate`, all but `compile_config`; those that are left at their defaults are absent.

    Args:
        sampled: also such as draw random numbers.
        ends: also such as end an answer.
        masks: also such as let the model propose the mask itself.
        cached: only such as use the cache.
    """
    block = draw(st.sampled_from(range(1, 9)))
    blocks = draw(st.sampled_from(range(1, 1 + min(4, 16 // block))))
    length = block * blocks
    options = {"max_new_tokens": length, "block_length": block}
    options["steps"] = draw(_maybe(st.integers(1, block + 2).map(lambda count: count * blocks)))
    options |= draw(commit_rules(sampled)) | draw(caches(cached))
    options["temperature"] = draw(st.sampled_from([0.0, 0.0, *[0.5, 1.0] * sampled]))
    options["cfg_scale"] = draw(st.sampled_from([0.0, 0.0, 0.7, 2.0]))
    options["initial_canvas_length"] = draw(_maybe(st.integers(1, blocks).map(lambda count: count * block)))
    options["suffix_blocks"] = draw(_maybe(st.integers(0, 2)))
    if ends:
        eos = draw(_maybe(words | st.lists(words, min_size=1, max_size=8, unique=True)))
        options |= {"eos_token_id": eos, "stop_strings": draw(_maybe(id_texts() | st.lists(id_texts(), max_size=3)))}
        if eos is not None:
            options |= {"min_new_tokens": draw(_maybe(st.integers(1, length))), "defer_eos": draw(st.booleans())}
    options["generation_suffix"] = draw(_maybe(id_texts()))
    suppressed = st.lists(words, max_size=6)
    with_mask = suppressed.map(lambda ids: [MASK, *ids])
    options["suppress_tokens"] = draw(_maybe(with_mask | suppressed if masks else with_mask))
    options["repetition_penalty"] = draw(st.sampled_from([1.0, 1.0, 0.7, 1.5]))
    if "remasking" in options and (options["steps"] or length) >= length:
        options["no_repeat_ngram_size"] = draw(_maybe(st.integers(1, 3)))
    options["pad_token_id"] = draw(st.sampled_from([END, 0]))
    options["confidence_temperature"] = draw(st.sampled_from([1.0, 2.0]))
    options["abstention_threshold"] = draw(_maybe(st.just(0.5)))
    return {name: value for name, value in options.items() if value is not None}


END_OPTIONS = ("eos_token_id", "stop_strings", "min_new_tokens", "defer_eos")


def generate(spec: ModelSpec, batch, options: dict, padding: Padding = Padding(), seed: int = 0, **more):
    """`model.generate` with everything that it can return, and the width of the prompts."""
    model = build_model(spec)
    inputs = collate(model, batch, padding)
    torch.manual_seed(seed)
    more = {"tokenizer": Words(), "return_dict_in_generate": True, "output_history": True} | more
    return model.generate(**inputs, **options, **more), inputs


@st.composite
def generation_cases(
    draw, sampled=True, ends=True, masks=False, cached=False, rows=(1, 4), attention=("sdpa", "eager")
):
    """A model, prompts for it, and options; in half of the cases with an end that the first greedy answer holds."""
    spec = draw(model_specs(attention=attention))
    batch = draw(st.lists(prompts(spec.kind), min_size=rows[0], max_size=rows[1]))
    options = draw(generation_options(sampled, ends, masks, cached))
    if all(prompt.images for prompt in batch) and draw(st.booleans()):
        options["image_guidance_scale"] = options.pop("cfg_scale")
    if ends and draw(st.booleans()):
        endless = {name: value for name, value in options.items() if name not in END_OPTIONS} | {"temperature": 0.0}
        output, _ = generate(spec, batch[:1], endless)
        start = draw(st.integers(0, options["max_new_tokens"] - 1))
        end = draw(st.integers(start + 1, min(start + 3, options["max_new_tokens"])))
        options["stop_strings"] = Words().decode(output.history[-1, 0, start:end])
    return spec, batch, options


# Templates


@dataclass(frozen=True)
class Piece:
    """Fixed `ids`, or where there is a `name` a blank of `width` tokens, which `choices` may fill, if there are any."""

    ids: tuple[int, ...] = ()
    name: str = ""
    width: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class InfillCase:
    model: ModelSpec
    batch: list[Prompt]
    pieces: list[Piece]
    options: dict

    @property
    def ids(self) -> list[int]:
        """The canvas as it is in the beginning."""
        return [token for piece in self.pieces for token in (piece.ids or [MASK] * piece.width)]


@st.composite
def infill_cases(draw, sampled: bool = True) -> InfillCase:
    """A model, prompts for it, a template with one to three blanks, and options of `infill`."""
    spec = draw(model_specs())
    batch = draw(st.lists(prompts(spec.kind), min_size=1, max_size=3))
    pieces, uncut = [], []
    for name in "abc"[: draw(st.integers(1, 3))]:
        pieces += [Piece(tuple(ids)) for ids in [draw(st.lists(words, max_size=3))] if ids]
        start = sum(len(piece.ids) + piece.width for piece in pieces)
        choices = tuple(draw(st.lists(id_texts(), min_size=1, max_size=4, unique=True))) if draw(st.booleans()) else ()
        width = draw(st.integers(1, 4)) if not choices else max(len(text.split()) for text in choices)
        pieces.append(Piece(name=name, width=width, choices=choices))
        uncut += [(start, start + width - 1)] if choices else []
    pieces += [Piece(tuple(ids)) for ids in [draw(st.lists(words, max_size=3))] if ids]

    options = draw(generation_options(sampled))
    for name in ("max_new_tokens", "min_new_tokens", "initial_canvas_length", "stop_strings", "generation_suffix",
                 "abstention_threshold", "confidence_temperature", "no_repeat_ngram_size"):  # fmt: skip
        options.pop(name, None)
    length = sum(len(piece.ids) + piece.width for piece in pieces)
    whole = [size for size in range(1, length + 3) if all(first // size == last // size for first, last in uncut)]
    options["block_length"] = draw(st.sampled_from(whole))
    blocks = -(-length // options["block_length"])
    options["steps"] = blocks * draw(st.integers(1, options["block_length"] + 1))
    needed = {int(word) for piece in pieces for text in piece.choices for word in text.split()}
    if "suppress_tokens" in options:
        options["suppress_tokens"] = [token for token in options["suppress_tokens"] if token not in needed]
    return InfillCase(spec, batch, pieces, options)


def infill(case: InfillCase, padding: Padding = Padding(), seed: int = 0, batch=None):
    """`model.infill` with its history, and its inputs."""
    model = build_model(case.model)
    inputs = collate(model, case.batch if batch is None else batch, padding)
    torch.manual_seed(seed)
    template = "".join(
        " ".join(map(str, piece.ids)) if piece.ids else f"[[{piece.name}:{piece.width}]]" for piece in case.pieces
    )
    choices = {piece.name: list(piece.choices) for piece in case.pieces if piece.choices}
    report = model.infill(
        **inputs, template=template, tokenizer=Words(), choices=choices, output_history=True, **case.options
    )
    return report, inputs


# Rows to train on


@dataclass(frozen=True)
class TrainingRow:
    """A question, images, and answers: ids, and for each whether it is to be learned."""

    question: tuple[int, ...]
    images: tuple[tuple[int, int], ...]
    answers: tuple[tuple[tuple[int, bool], ...], ...]
    pixel_seed: int = 0


def training_rows(kind: str):
    answer = st.lists(st.tuples(words, st.sampled_from([True, True, False])), min_size=1, max_size=5).map(tuple)
    images = st.just(()) if kind == "text" else st.lists(st.sampled_from(IMAGE_SIZES), max_size=2).map(tuple)
    answers = st.lists(answer, min_size=1, max_size=3).map(tuple)
    question = st.lists(words, min_size=1, max_size=3).map(tuple)
    return st.builds(TrainingRow, question, images, answers, st.integers(0, 9))


@st.composite
def training_cases(draw, most: int = 4):
    """A model and rows for it."""
    spec = draw(model_specs(attention=("sdpa",)))
    return spec, draw(st.lists(training_rows(spec.kind), min_size=1, max_size=most))


def training_batch(model, rows: list[TrainingRow], padding: Padding = Padding("right")):
    """Inputs of the model, labels and answer numbers, as the data collator makes them."""
    tokens = [[token for answer in row.answers for token in answer] for row in rows]
    ids = [tuple(token for token, _ in own) for own in tokens]
    batch = [Prompt(row.question, row.images, own, row.pixel_seed) for row, own in zip(rows, ids)]
    inputs = collate(model, batch, padding)
    if "pixel_values" in inputs:
        inputs["image_index"] = torch.arange(len(inputs["pixel_values"]))
    labels, answer_ids = torch.full_like(inputs["input_ids"], -100), torch.zeros_like(inputs["input_ids"])
    first = 0
    for number, row in enumerate(rows):
        end = int(inputs["attention_mask"][number].nonzero()[-1]) + 1
        places = slice(end - len(ids[number]), end)
        learned = torch.tensor([learned for _, learned in tokens[number]])
        labels[number, places] = torch.where(learned, torch.tensor(ids[number]), -100)
        owners = [first + place for place, answer in enumerate(row.answers) for _ in answer]
        answer_ids[number, :end], answer_ids[number, places] = first, torch.tensor(owners)
        first += len(row.answers)
    return inputs, labels, answer_ids
