"""What counts as the same answer: the text rules of the VQA v2 evaluation, as published and without their faults.

Published medical VQA numbers were computed on text that went through the rules with their faults, so both are needed:
the first to compare, the second to measure. A neighbour of `medical_vqa.py`, which `evaluate` copies along with it.
"""

from __future__ import annotations

import re
import unicodedata


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(value) for value, word in enumerate(NUMBER_WORDS)}
DIGITS["none"] = "0"

# The toolkit lists 120 pairs. 113 of them map a form that lost one apostrophe to the full form, and are made from the
# full forms below; one goes the other way. Two map a word to itself (let's, she's) and four have a capital letter
# (I'm, I've, I'd've twice), which lower-cased text never has: these six change nothing and are left out.
_FULL_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _FULL_FORMS
    for place, character in enumerate(form)
    if character == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"

# Marks that belong to a word or a number: the point of 3.5 and .5, the apostrophe of a contraction or a genitive.
_INSIDE_WORDS = re.compile(
    r"(?<=\d)\.(?=\d)|(?<![^\W_])\.(?=\d)|(?<=[^\W\d_])'(?=(?:s|t|re|ve|ll|d|m|am|all|at|clock)+(?![^\W_]))"
)
_INITIALISM = re.compile(r"(?<![^\W_])(?:[^\W\d_]\.){2,}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_APOSTROPHES = "\u2018\u2019\u02bc\u00b4\uff07"

# The toolkit passes a flag where `re.sub` takes the number of replacements; the flag's value is 32.
_PERIODS_REMOVED_AT_MOST = 32


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PSC"  # punctuation, symbols and control characters


def _plain(character: str) -> str:
    """A letter or digit of the usual width, a straight apostrophe, nothing for what is invisible."""
    if unicodedata.category(character) == "Cf":
        return ""
    if character in _APOSTROPHES:
        return "'"
    return character if _is_mark(character) else unicodedata.normalize("NFKC", character).lower()


def normalize_answer(text: str, normalizer: str = "vqa_v2_fixed") -> str:
    """Text as the VQA v2 evaluation compares it.

    Both rule sets lower-case the text; remove punctuation; turn number words from "none" to "ten" into digits; drop
    articles; give contractions their apostrophe back; and join what is left with single spaces. They differ in the
    punctuation:

    - `"vqa_v2"`, fault for fault: of the marks in `PUNCTUATION` each becomes a space, but if it stands beside a space
      anywhere in the text, all marks of its kind are deleted ("sub-pleural nodule - left" becomes "subpleural nodule
      left"), and so are all marks of every kind if the text has a comma between two digits. The first 32 periods that
      no digit follows are deleted. All other marks stay ("yes:" is not "yes").
    - `"vqa_v2_fixed"`: every punctuation mark and symbol of Unicode becomes a space. Kept are decimal points and the
      apostrophes of contractions and genitives; deleted are the commas between thousands ("1,000" becomes "1000"), the
      periods of initials ("e.g." becomes "eg"), and invisible characters. Letters and digits of other widths count as
      the usual ones (NFKC).

    Args:
        text (`str`): any text.
        normalizer (`str`, defaults to `"vqa_v2_fixed"`): `"vqa_v2"` or `"vqa_v2_fixed"`.

    Returns:
        `str`: the normalised text, empty if nothing is left of it.

    Raises:
        ValueError: for an unknown normaliser.

    Source: the evaluation code of VQA v2 (Goyal et al., arXiv 1612.00837; GT-Vision-Lab/VQA), which LLaVA-Med's
    evaluation (arXiv 2306.00890) applies to lower-cased text.
    """
    text = text.lower()
    if normalizer == "vqa_v2":
        # The conditions look at the text as it came, not at what earlier marks made of it.
        comma_in_number = re.search(r"\d,\d", text) is not None
        stripped = text
        for mark in PUNCTUATION:
            beside_space = f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if beside_space or comma_in_number else " ")
        stripped = re.sub(r"\.(?!\d)", "", stripped, count=_PERIODS_REMOVED_AT_MOST)
    elif normalizer == "vqa_v2_fixed":
        text = unicodedata.normalize("NFC", "".join(map(_plain, text)))
        text = _INITIALISM.sub(lambda found: found[0].replace(".", ""), _THOUSANDS.sub("", text))
        kept = {found.start() for found in _INSIDE_WORDS.finditer(text)}
        stripped = "".join(
            " " if _is_mark(character) and place not in kept else character for place, character in enumerate(text)
        )
    else:
        raise ValueError(f'normalizer must be "vqa_v2" or "vqa_v2_fixed", not {normalizer!r}')
    words = (DIGITS.get(word, word) for word in stripped.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
