"""Build a VQA benchmark anew, as recipe.json beside this file says: `python rebuild.py OUT [PATH [IMAGE_FOLDER]]`.

Every row's text must be what it was when the recipe was written. OUT gets a Parquet file for each split; PATH is the
local copy of the data that some recipes need. It needs the package lladamedv: `pip install .` in its sources.
"""

import hashlib
import json
import sys
from pathlib import Path

from lladamedv.processing.datasets import load_vqa


def fingerprint(dataset) -> str:
    """SHA-256 of all rows, images apart, in their order."""
    digest = hashlib.sha256()
    for row in dataset.remove_columns("image"):
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def rebuild(recipe: dict, out: Path, *place: str) -> None:
    """Write all splits of a recipe into the folder `out`.

    Raises:
        ValueError: if data are not what they were, or `place` is missing.
    """
    if recipe["needs_path"] and not place:
        raise ValueError("PATH is missing; this recipe needs a local copy of the data.")
    arguments = recipe["arguments"] | dict(zip(("path", "image_folder"), place))
    for split, expected in recipe["splits"].items():
        dataset, report = load_vqa(recipe["benchmark"], split, **arguments)
        print(report.summary())
        if (found := fingerprint(dataset)) != expected["sha256"]:
            raise ValueError(
                f"The {split} split is not what it was: {len(dataset)} rows, {found}; "
                f"expected are {expected['rows']}, {expected['sha256']}."
            )
        out.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(out / f"{split}.parquet")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        rebuild(json.loads(Path(__file__).with_name("recipe.json").read_text(encoding="utf-8")),
                Path(sys.argv[1]), *sys.argv[2:4])  # fmt: skip
    except ValueError as error:
        sys.exit(str(error))
