"""Where the medical VQA benchmarks are published, under which licence, and how many questions they are said to have.

Counts are of images, questions, and open and closed ones. Those of LLaVA-Med's files are its authors' own
(run_eval_metrics.ipynb of microsoft/LLaVA-Med, tag v1.0.0); those of the mirrors are their dataset cards', and what
follows from both. Only published numbers are here.
"""

from __future__ import annotations

from dataclasses import dataclass, field


TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
COUNTED = ("images", "questions", "open", "closed")


@dataclass(frozen=True)
class VQASource:
    """One publication of a benchmark.

    Args:
        hub_id: data set on the Hub; `None` where there are only local files.
        licence: of the questions, and of the pictures where that is another.
        published: for each split, the published numbers of `COUNTED`, `None` where there is none.
        revision: commit of `hub_id`; `None` is the newest one, which is not pinned.
        zipped: whether it is JSON files of its splits and an imgs.zip, not a table that holds its images.
    """

    hub_id: str | None
    licence: str
    published: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    revision: str | None = None
    zipped: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.published)


_CC0 = "CC0 1.0 (VQA-RAD)"
_CC_BY = "CC BY 4.0 (SLAKE)"
_MIT = "MIT; the pictures belong to publishers of textbooks and to the PEIR digital library"
LLAVA_MED = "llava-med"
PHANTOMS = "phantoms"
# Of each benchmark, the first source is the default. For VQA-RAD and SLAKE it is one that says which questions are
# closed: more than are answered by yes or no, of VQA-RAD's test questions 272, not 251.
_RAD = {TRAIN: (314, 3064, 1241, 1823), TEST: (203, 451, 179, 272)}
_SLAKE = {TRAIN: (450, 4919, 2976, 1943), VALIDATION: (96, 1053, 631, 422), TEST: (96, 1061, 645, 416)}
_SLAKE_TOTALS = {split: (images, questions, None, None) for split, (images, questions, *_) in _SLAKE.items()}
_PATH_MIRROR = {TRAIN: (None, 19654, None, None), VALIDATION: (None, 6259, None, None), TEST: (None, 6719, None, None)}
_PATH = {TRAIN: (2599, 19755, 9949, 9806), VALIDATION: (832, 6279, 3144, 3135), TEST: (858, 6761, 3370, 3391)}
_MIRROR_OF_RAD = {TRAIN: (None, 1793, None, None), TEST: (203, 451, 200, 251)}
_WITHOUT_VALIDATION = {TRAIN: (546, 5972, 3607, 2365), TEST: _SLAKE[TEST]}  # it is part of train
_PUBLISHED = {
    "vqa-rad": (
        ("OctoMed/VQA-RAD", _CC0, _RAD),
        ("flaviagiammarino/vqa-rad", _CC0, _MIRROR_OF_RAD, "bcf91e7654fb9d51c8ab6a5b82cacf3fafd2fae9"),
        (None, _CC0, _RAD),
    ),
    "slake": (
        ("BoKelvin/SLAKE", _CC_BY, _SLAKE, "a9083ce6c34ac3ffb17671a605962924d8a8f9e9", True),
        ("OctoMed/SLAKE", _CC_BY, _WITHOUT_VALIDATION),
        ("mdwiratathya/SLAKE-vqa-english", _CC_BY, _SLAKE_TOTALS, "8d18b4d5a4eae47101c1d9f57b99fc58df66f17e"),
        (None, _CC_BY, _SLAKE),
    ),
    "path-vqa": (
        ("flaviagiammarino/path-vqa", _MIT, _PATH_MIRROR, "1685832883334b5bb5beaf4e4b333fdeecaa4ad9"),
        (None, _MIT, _PATH),
    ),
}
SOURCES: dict[str, dict[str, VQASource]] = {
    benchmark: {each[0] or LLAVA_MED: VQASource(*each) for each in sources} for benchmark, sources in _PUBLISHED.items()
}
# Drawn, not published: the counts of questions are the default's.
SOURCES[PHANTOMS] = {PHANTOMS: VQASource(None, "as this package", {TEST: (300, 300, None, None)})}
BENCHMARKS = tuple(SOURCES)
# Whether pictures of the test split were seen in training.
LEAKAGE = {
    "vqa-rad": "at least 202 of the 203 test images also occur in train: the split is by question, not by image "
    "(313 + 203 images of which 314 differ)",
    "slake": "none: the splits share no image (450 + 96 + 96 = 642)",
    "path-vqa": "none: the splits share no image (2599 + 832 + 858 = 4289)",
    PHANTOMS: "none between sets of different seeds: every picture is drawn for its question",
}
