"""Templates: against a plain loop, against the reference's suffix, blanks of allowed texts, ends, caches, batches."""

import itertools
import math

import pytest
import torch

from lladamedv import LLaDAMedVGenerationConfig
from tests.brute_force import median_picture
from tests.test_generation_lladamedv import PIXELS, PROMPT, SUPPRESSED, generate
from tests.tiny import Words, image_prompt, tiny_model


def infill(model, template, prompt=None, pixel_values=PIXELS, **options):
    prompt = image_prompt(PROMPT) if prompt is None else prompt
    options = {"suppress_tokens": SUPPRESSED, **options}
    return model.infill(prompt, template, Words(), pixel_values=pixel_values, **options)


def plain_infill(model, prompt, canvas, steps, choices=None, ends=()):
    """One row, one block, `steps` steps: `canvas` holds ids, and a blank's name where a token is missing.

    Returns what the blanks hold, the canvas in the end and the number of passes.
    """
    canvas = list(canvas)
    names = list(canvas)
    masks = sum(isinstance(token, str) for token in canvas)
    gone, forwards = set(), 0
    choices = choices or {}

    def blank(name):
        return [i for i, owner in enumerate(names) if owner == name]

    while any(isinstance(token, str) for token in canvas):
        ids = [98 if isinstance(token, str) else token for token in canvas]
        there = [i for i in range(len(canvas)) if i not in gone]
        row = torch.tensor([[*prompt[0].tolist(), *(ids[i] for i in there)]])
        positions = torch.tensor([[*range(prompt.shape[1]), *(prompt.shape[1] + i for i in there)]])
        logits = model(input_ids=row, position_ids=positions, pixel_values=PIXELS).logits[0, prompt.shape[1] :]
        logits[:, SUPPRESSED] = -torch.inf
        logs = dict(zip(there, logits.double().log_softmax(-1)))
        proposals = {}
        for i, token in enumerate(canvas):
            if isinstance(token, str) and token not in choices:
                proposals[i] = (logs[i].max().item(), int(logs[i].argmax()))
        for name, texts in choices.items():
            places = [i for i in blank(name) if isinstance(canvas[i], str)]
            if places:
                means = [sum(logs[i][t].item() for i, t in zip(places, text)) / len(text) for text in texts]
                total = sum(math.exp(mean) for mean in means)
                best = max(range(len(texts)), key=lambda number: means[number])
                for i in places:
                    proposals[i] = (means[best] - math.log(total), best)
        quota = masks // steps + (forwards < masks % steps)
        for i in sorted(proposals, key=lambda i: (-proposals[i][0], i))[:quota]:
            name = names[i]
            if name in choices:
                text = choices[name][proposals[i][1]]
                places = blank(name)
                for place, token in itertools.zip_longest(places, text, fillvalue=None):
                    canvas[place] = token
                    gone |= {place} if token is None else set()
            else:
                canvas[i] = proposals[i][1]
        for name in {name for name in names if isinstance(name, str) and name not in choices}:
            places = blank(name)
            found = [i for i in places if canvas[i] in ends and i not in gone]
            if found:
                for i in range(found[0], places[-1] + 1):
                    canvas[i] = None
                    gone.add(i)
        forwards += 1
    fields = {name: [canvas[i] for i in blank(name) if i not in gone] for name in names if isinstance(name, str)}
    return fields, [token for token in canvas if token is not None], forwards


TEMPLATES = [
    ("30 31 [[a:4]] 32 [[b:3]]", [30, 31, *"aaaa", 32, *"bbb"], {}),
    ("[[a:1]] 30 [[b:6]] 31", [*"a", 30, *"bbbbbb", 31], {}),
    ("[[a]] 30 [[b:3]]", [*"aaa", 30, *"bbb"], {"a": ["5 6 7", "8 9", "10"]}),
    ("30 [[a:4]] [[b]] 31", [30, *"aaaa", *"bb", 31], {"a": ["5 6 7", "11 12 13 14"], "b": ["8 9", "9 8"]}),
    ("[[a]] 30", [*"a", 30], {"a": ["5", "6"]}),
]  # fmt: skip


@pytest.mark.parametrize(("template", "canvas", "choices"), TEMPLATES, ids=lambda value: str(value)[:24])
@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize("end", [False, True])
@torch.no_grad()
def test_against_a_plain_loop(template, canvas, choices, per_step, end):
    model = tiny_model(seed=1)
    prompt = image_prompt(PROMPT)
    masks = sum(isinstance(token, str) for token in canvas)
    steps = -(-masks // per_step)
    ids = {name: [[int(part) for part in text.split()] for text in texts] for name, texts in choices.items()}
    ends = []
    if end:
        free, _, _ = plain_infill(model, prompt, canvas, steps, ids)
        ends = [values[len(values) // 2] for name, values in free.items() if name not in choices][:1]
    fields, text, forwards = plain_infill(model, prompt, canvas, steps, ids, ends)
    output = infill(model, template, choices=choices, steps=steps, eos_token_id=ends or None)
    assert output.fields == [{name: Words().decode(values) for name, values in fields.items()}]
    filled = output.sequences[0, prompt.shape[1] :]
    assert {name: filled[start:end].tolist() for name, (start, end) in output.field_spans[0].items()} == fields
    assert output.sequences[0, prompt.shape[1] :].tolist() == text
    assert output.texts == [Words().decode(text)]
    assert output.num_forwards.tolist() == [forwards]


@pytest.mark.parametrize("guidance", [{}, {"image_guidance_scale": 1.0}])
@torch.no_grad()
def test_the_suffix_is_a_special_case(model, guidance):
    expected = generate(model, max_new_tokens=8, block_length=8, generation_suffix="30 31", **guidance)
    output = infill(model, "[[answer:8]] 30 31", **guidance)
    assert torch.equal(output.sequences, expected.sequences)
    values = list(output.field_confidence[0].values())
    assert values[0] == pytest.approx(expected.answer_confidence.item(), rel=1e-4)
    assert output.fields[0]["answer"] == Words().decode(expected.sequences[0, -10:-2])


@torch.no_grad()
def test_a_growing_canvas_of_the_model_is_left_out(model):
    """How long a template is, it says itself, whatever the model's own configuration asks of `generate`."""
    own = model.generation_config
    model.generation_config = LLaDAMedVGenerationConfig(
        initial_canvas_length=8, block_length=8, eos_token_id=5, grow_until_eos_confidence=0.5
    )
    try:
        assert infill(model, "30 [[answer:4]] 31").texts[0].startswith("30 ")
    finally:
        model.generation_config = own


@pytest.mark.parametrize("scale", [0.0, 1.5])
@torch.no_grad()
def test_the_choice_of_one_token_is_the_more_probable(model, scale):
    """With one place, the probability of a choice is a softmax over the allowed tokens' logits, guided if asked for."""
    row = torch.cat([image_prompt(PROMPT), torch.tensor([[98]])], dim=1)
    logits, neutral = (model(row, pixel_values=each).logits[0, -1] for each in (PIXELS, median_picture(PIXELS)))
    logits = logits + scale * (logits - neutral)
    allowed = [5, 9, 40]
    probability = logits[allowed].double().softmax(-1)
    choices = {"a": [str(token) for token in allowed]}
    output = infill(model, "[[a]]", choices=choices, image_guidance_scale=scale)
    assert output.fields == [{"a": str(allowed[int(probability.argmax())])}]
    assert output.field_confidence[0]["a"] == pytest.approx(probability.max().item(), abs=1e-5)
    assert output.num_forwards.tolist() == [1]


@torch.no_grad()
def test_temperature_draws_choices(model):
    prompt = image_prompt(PROMPT)
    logits = model(input_ids=torch.cat([prompt, torch.tensor([[98]])], dim=1), pixel_values=PIXELS).logits[0, -1]
    probability = logits[[5, 9]].double().div(4).softmax(-1)[0].item()
    torch.manual_seed(0)
    batch = 400
    output = infill(
        model, "[[a]]", prompt.repeat(batch, 1), PIXELS.repeat(batch, 1, 1, 1, 1), choices={"a": ["5", "9"]},
        temperature=4.0,
    )  # fmt: skip
    share = sum(fields["a"] == "5" for fields in output.fields) / batch
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / batch) ** 0.5)


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("no blank", {}, "`template` is 'no blank'; allowed are texts with blanks"),
        (None, {}, "`template` is None; allowed are texts with blanks"),
        ("[[a:2]] [[b:2", {}, "not allowed are unpaired double brackets"),
        ("98 [[a:2]]", {}, "not allowed are unpaired double brackets, the mask token"),
        ("99 [[a:2]]", {}, "and the image token"),
        ("[[a]]", {}, "the blank 'a' of 0 tokens and no `choices`"),
        ("[[a:0]]", {}, "the blank 'a' of 0 tokens"),
        ("[[a:1]]", {"choices": {"a": ["5 6"]}}, "the blank 'a' of 1 tokens and choices of up to 2 tokens"),
        ("[[a:2]] [[a:2]]", {}, "two blanks of the name 'a'"),
        ("[[a:2]]", {"choices": {"b": ["5"]}}, "`choices` names \\['b'\\]; the blanks are \\['a'\\]"),
        ("[[a:2]]", {"choices": {"a": []}}, "`choices` holds \\[\\] for 'a'"),
        ("[[a:2]]", {"choices": {"a": "5"}}, "`choices` holds '5' for 'a'"),
        ("[[a:2]]", {"choices": {"a": ["5", "5"]}}, "different, non-empty texts"),
        ("[[a:2]]", {"choices": {"a": ["5 98"]}}, "that `suppress_tokens` does not allow: \\[98\\]"),
        ("1 2 3 [[a]]", {"choices": {"a": ["5 6"]}, "block_length": 4}, "the blank 'a' \\(tokens 3 to 4\\) in two"),
        ("[[a]]", {"choices": {"a": ["5 6"]}, "no_repeat_ngram_size": 2}, "not allowed with `choices`"),
        ("[[a:2]]", {"max_new_tokens": 8}, "`max_new_tokens` is 8, which `infill` does not take"),
        ("[[a:2]]", {"stop_strings": ["5"]}, "`stop_strings` is \\['5'\\], which `infill` does not take"),
        ("[[a:2]]", {"gen_length": 8}, "Unknown generation arguments \\['gen_length'\\]"),
        ("[[a:600]]", {}, "need 619 positions; the model's context allows 512"),
    ],
)
def test_bad_input_fails_before_the_first_forward(model, monkeypatch, template, options, message):
    monkeypatch.setattr(model.model.language_model, "forward", lambda *a, **k: pytest.fail("a forward pass was made"))
    with pytest.raises(ValueError, match=message):
        infill(model, template, **options)
