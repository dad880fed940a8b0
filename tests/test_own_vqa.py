"""A user's own questions, in files of every form, become rows; the report claims nothing that is not in them."""

import base64
import csv
import io
import json
import zipfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from lladamedv.evaluation import vqa
from lladamedv.hub_cards.results import EvaluationResults
from lladamedv.processing.datasets import load_own_vqa, load_vqa
from lladamedv.processing.datasets.columns import derived_answer_type


pytestmark = pytest.mark.usefixtures("own_cache")
CASES = Path(__file__).parent / "cases" / "eval"
SHORT = {"model_name": "demo", "options": {"max_new_tokens": 8, "block_length": 8, "steps": 1}, "bootstrap_samples": 0}


def picture(level=0):
    file = io.BytesIO()
    Image.new("L", (20, 20), level).save(file, "PNG")
    return file.getvalue()


def rows_of(data, *arguments, **options):
    dataset, report = load_own_vqa(data, *arguments, **options)
    rows = list(dataset.cast_column("image", datasets.Image(decode=False)))
    return [(row["id"], row["question"], row["answer"], row["answer_type"]) for row in rows], report


LESION = "Is there a lesion?"
PARQUET = ["is there a lesion?", "what is shown?", "how many?", "does it show x?"]
TYPES = ["closed", "open", "open", "closed"]


def four(answers, types=TYPES):
    return [(f"own-data/all/{n}", *row) for n, row in enumerate(zip(PARQUET, answers, types))]


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        *((f"rad/{name}.json", [("0", LESION, "Yes", "closed"), ("1", LESION, "no", "closed")])
          for name in ("bom", "utf16", "wrapped", "jsonl_as")),
        ("rad/float.json", [("0", LESION, "Yes", "closed"), ("3", "How wide is the lesion in cm?", "5.6", "open")]),
        ("rad/null.json", [("0", LESION, "Yes", "closed"), ("6", "Describe the image.", "", "open")]),
        ("rad/nan.json", [("0", LESION, "Yes", "closed"), ("1", LESION, "", "closed")]),
        ("rad/bool.json", [("0", LESION, "yes", "closed")]),
        (
            "pq/odd.json",
            [(str(n), q, a, "closed") for n, (q, a) in enumerate(
                [(LESION, "YES"), (LESION, "Yes."), (LESION, "yes, left"), ("q?", "no")])],
        ),
        ("pq/qlang.json", [("0", "What?", "CT", "open")]),
        ("pq/uni.json", [("0", "\u8fd9\u662f\u4ec0\u4e48?", "CT", "open")]),
        ("pq/x.csv", [("own-data/all/0", PARQUET[0], "yes", "closed")]),
        *((f"pq/{name}.parquet", four(["yes", "CT", "2", "no"]))
          for name in ("bytes", "capital", "paths", "images list")),
        ("pq/hf.parquet", four(["yes", "CT", "2", "No."])),
        ("pq/ints.parquet", four(["1", "2", "3", "4"], ["open"] * 4)),
        ("pq/floats.parquet", four(["1", "2.5", "3", ""], ["open"] * 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_odd_files(file, rows, streaming):
    found, report = rows_of(CASES / file, streaming=streaming)
    assert found == rows
    assert report.empty_answers == [row[0] for row in rows if not row[2]]


def test_missing_pictures_are_named_by_row():
    found, report = rows_of(CASES / "pq" / "nullimg.parquet")
    assert len(found) == 3 and report.missing_images == [("own-data/all/1", "None")]
    for name in ("case", "noext"):
        found, report = rows_of(CASES / "rad" / f"{name}.json")
        assert not found and [item for item, _ in report.missing_images] == ["0", "1"]


RECORDS = [
    {"Query": "Is it?", "Ground Truth": "Yes", "Image Path": "a.png", "age": "61"},
    {"Query": "Wo?", "Ground Truth": "links", "Image Path": "b.png", "age": "52"},
]
ROWS = [("own-data/all/0", "Is it?", "Yes", "closed"), ("own-data/all/1", "Wo?", "links", "open")]


def write(folder, name):
    """RECORDS in a form, by the name of the file or folder."""
    path, table = folder / name, datasets.Dataset.from_list(RECORDS)
    if path.suffix in (".csv", ".tsv"):
        writer = csv.DictWriter(text := io.StringIO(), RECORDS[0], delimiter={".tsv": "\t"}.get(path.suffix, ";"))
        writer.writeheader()
        writer.writerows(RECORDS)
        path.write_bytes(text.getvalue().encode("utf-16" if path.suffix == ".tsv" else "utf-8-sig"))
    elif name.endswith(".JSON"):
        path.write_text(json.dumps({"version": 1, "data": RECORDS}, indent=1))
    elif name == "saved":
        table.with_format("pandas", columns=["Query"]).save_to_disk(path)  # which does not matter
    elif name == "splits":
        datasets.DatasetDict({"only": table}).save_to_disk(path)
    else:
        (path / "data").mkdir(parents=True)
        table.to_parquet(path / "data" / "test-00000-of-00001.parquet")
    return path


@pytest.mark.parametrize("name", ["semicolons.csv", "excel.tsv", "UPPER.JSON", "saved", "splits", "repository"])
def test_forms_and_columns(tmp_path, name):
    for level, file in enumerate(("a.png", "b.png")):
        (tmp_path / file).write_bytes(picture(level))
    found, report = rows_of(write(tmp_path, name), image_folder=tmp_path)
    split = {"splits": "only", "repository": "test"}.get(name, "all")
    assert found == [(row[0].replace("all", split), *row[1:]) for row in ROWS]
    assert report.columns == {"question": ["Query"], "answer": ["Ground Truth"], "image": ["Image Path"]}
    assert report.unused_columns == ["age"] and report.other_languages == 0
    text = report.summary()
    assert "question from 'Query'" in text and "not used: 'age'" in text
    for claim in ("licence", "published", "train", "revision"):
        assert claim not in text
    assert report.as_dict()["licence"] == report.as_dict()["leakage"] == "not known"


def test_what_tables_mean_by_numbers(tmp_path):
    """0 is a class, and no answer to a question; 5.599999904632568 is the float32 of 5.6."""
    label = datasets.ClassLabel(names=["no", "yes"])
    features = {"question": datasets.Value("string"), "image": datasets.Image(), "label": label}
    rows = [{"question": "?", "image": {"bytes": picture()}, "label": each} for each in (1, 0, -1, None)]
    table = datasets.Dataset.from_list(rows, datasets.Features(features))
    table.to_parquet(tmp_path / "own.parquet")
    found, _ = rows_of(tmp_path / "own.parquet")
    assert [row[2:] for row in found] == [("yes", "closed"), ("no", "closed"), ("", "open"), ("", "open")]
    in_lists = datasets.Features({**features, "label": [label]})
    listed = table.map(lambda row: {"label": [row["label"]]}, features=in_lists)
    listed.select([0, 1]).to_parquet(tmp_path / "listed.parquet")
    assert [row[2] for row in rows_of(tmp_path / "listed.parquet")[0]] == ["yes", "no"]
    for dtype in ("float16", "float32", "float64"):
        numbers = table.select([0]).cast_column("label", datasets.Value(dtype)).map(lambda row: {"label": 5.6})
        numbers.to_parquet(tmp_path / f"{dtype}.parquet")
        assert rows_of(tmp_path / f"{dtype}.parquet")[0][0][2] == "5.6"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"frage": "?", "answer": "a", "image": "a"}, "none of its columns .*'frage'.* is its question; such"),
        ({"question": "?", "image": "a"}, "is its answer; such are called answer, answers, ground_truth"),
        ({"question": "?", "answer": "yes"}, "is its image; such are called image"),
    ],
)
def test_columns_that_are_missing(tmp_path, record, message):
    (tmp_path / "own.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=message):
        load_own_vqa(tmp_path / "own.json")


@pytest.mark.parametrize(
    ("answer", "answer_type"),
    [
        ("Yes.", "closed"), ("**No**", "closed"), ("no, it is normal", "closed"), ("No - normal", "closed"),
        ("FALSE", "closed"), ("Yes,it is", "closed"), ("no !", "closed"), ("\uff39\uff45\uff53", "closed"),
        ("No (normal)", "closed"), ("Yes\u060c left", "closed"), ("No.1", "open"),
        ("No evidence of disease", "open"), ("Yes/No", "open"), ("no-contrast CT", "open"),
        ("nodule", "open"), ("true lumen", "open"), ("", "open"),
    ],
)  # fmt: skip
def test_answer_types_that_are_not_given(answer, answer_type):
    assert derived_answer_type(answer) == answer_type


def test_pictures_in_other_places(tmp_path):
    """In images/, as a data URL, and in a zip archive."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(1))
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("b.png", picture(2))
    url = "data:image/png;base64," + base64.b64encode(picture(3)).decode()
    records = [{"question": "?", "answer": "1", "image": name} for name in ("a.png", url, "b.png")]
    (tmp_path / "own.json").write_text(json.dumps(records))
    dataset, report = load_own_vqa(tmp_path / "own.json")
    assert report.rows == report.images == 2 and len(dataset[0:2]["image_id"][1]) == 64
    assert load_own_vqa(tmp_path / "own.json", image_folder=tmp_path / "some.zip")[1].rows == 2


def test_splits(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    plain = [{"question": "?", "answer": str(number), "image": "a.png"} for number in range(3)]
    records = [{**each, "split": split} for each, split in zip(plain, ("train", "Test", "test"))]
    (tmp_path / "own.json").write_text(json.dumps(records))
    found, report = rows_of(tmp_path / "own.json", "test")
    assert [row[2] for row in found] == ["1", "2"] and report.other_splits == 1
    assert "1 records of other splits left out" in report.summary()
    (tmp_path / "plain.json").write_text(json.dumps(plain[:1]))
    (tmp_path / "wrapped.json").write_text(json.dumps({"train": plain[:1], "test": plain[1:2], "notes": []}))
    for data, split, count in (("own.json", None, 3), (".", "plain", 1), ("wrapped.json", "test", 1)):
        assert len(rows_of(tmp_path / data, split)[0]) == count
    with pytest.raises(ValueError, match=r"a folder with \['own.json', 'plain.json', .*\]; name one"):
        load_own_vqa(tmp_path)
    (tmp_path / "test.json").write_text(json.dumps(records[:2]))
    assert len(rows_of(tmp_path)[0]) == 2
    table = datasets.Dataset.from_list(plain)
    (tmp_path / "shard").mkdir()
    table.to_parquet(tmp_path / "shard" / "test-00000-of-00001.parquet")
    assert len(rows_of(tmp_path / "shard", "test", image_folder=tmp_path)[0]) == 3
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "saved")
    for data, split, message in (
        ("plain.json", "test", "The split 'test' is asked for, but .* has no column of that name"),
        ("saved", None, r"The split has to be chosen: .*saved' has \['a', 'b'\]"),
        ("none.json", None, "There is no file or folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_own_vqa(tmp_path / data, split)


def test_local_files_are_no_benchmark_because_they_are_called_so(shipped, tmp_path):
    """VQA-RAD's name, table and licence are not those of four questions of a user's."""
    dataset, report = load_vqa("vqa-rad", path=CASES / "pq" / "hf.parquet")
    summary = vqa.evaluate_vqa(*shipped, dataset, report, tmp_path, **SHORT)
    text = (tmp_path / "summary.md").read_text()
    assert "these are not the published questions of vqa-rad" in text
    for claim in ("table 2 of", "CC0", "202 of the 203"):
        assert claim not in text
    results = EvaluationResults.from_file(tmp_path / "summary.json")
    assert results.to_eval_results() == results.to_entries() == []
    assert results.title == "Own data, read as VQA-RAD (test)" and results.warning.startswith("Own data")
    assert results.protocol["test images in train"] == "not known" and summary["complete"]
