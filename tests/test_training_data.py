"""Whatever a recipe names becomes the same rows, streamed or not; mixtures have the shares that were asked for."""

import json
import zipfile
from collections import Counter
from dataclasses import asdict

import datasets
import numpy as np
import pytest

from lladamedv.processing.datasets import ROW_FEATURES, SOURCES
from lladamedv.processing.phantoms import PhantomVQA
from lladamedv.trainers.data import DataSource, load_dataset_mixture
from tests.tiny import random_image


NAMES = [f"{number}.png" for number in range(6)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """Six images, their names and sizes by number."""
    path = tmp_path / "images"
    path.mkdir()
    for number, name in enumerate(NAMES):
        random_image(30 + number, 20, seed=number).save(path / name)
    return path


def qa(number, image=None):
    return {"question": f"Q{number}?", "answer": f"A{number}"} | ({"image": image} if image else {})


def chat(number, image=None, parts=False):
    question = [{"type": "image"}, {"type": "text", "text": f"Q{number}?"}] if parts else f"Q{number}?"
    answer = [{"type": "text", "text": f"A{number}"}] if parts else f"A{number}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"row {number}", "messages": messages} | ({"image": image} if image else {})


def llava(number, image=None):
    turns = [{"from": "human", "value": f"Q{number}?\n<image>"}, {"from": "gpt", "value": f"A{number}"}]
    return {"id": f"row {number}", "conversatons": turns} | ({"image": image} if image else {})


def write(path, content):
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in content) if lines else json.dumps(content))
    return str(path)


def load(*sources, **options):
    return load_dataset_mixture(list(sources), **options)[0]


def unstreamed(dataset):
    """Rows with their images as pixels, for comparisons."""
    return [{**row, "images": [np.asarray(image).tolist() for image in row["images"]]} for row in dataset]


def check_rows(dataset, numbers, ids=None):
    """Rows about these images, in this order, in the one form that all sources become."""
    rows = list(dataset)
    assert [row["images"][0].size for row in rows] == [(30 + number, 20) for number in numbers]
    for row, number in zip(rows, numbers):
        assert row["messages"] == [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"Q{number}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"A{number}"}]},
        ]
    assert [row["id"] for row in rows] == (ids or [f"row {number}" for number in numbers])


def embedded(folder, make):
    """Records whose images are in the data set, as on the Hub."""
    images = [{"bytes": (folder / name).read_bytes(), "path": name} for name in NAMES]
    table = datasets.Dataset.from_list([make(number, image) for number, image in enumerate(images)])
    return table.cast_column("image", datasets.Image())


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("make", [qa, chat, llava], ids=["vqa", "messages", "llava_med"])
def test_files_of_records(folder, tmp_path, make, suffix, streaming):
    file = write(tmp_path / f"data{suffix}", [make(number, name) for number, name in enumerate(NAMES)])
    dataset = load(DataSource(file, image_folder=str(folder)), streaming=streaming)
    assert dataset.features == ROW_FEATURES
    check_rows(dataset, range(6), [f"data/{number}" for number in range(6)] if make is qa else None)
    beside = write(folder / f"data{suffix}", [make(2, NAMES[2])])  # without `image_folder`, where the file lies
    check_rows(load(beside, streaming=streaming), [2], ["data/0"] if make is qa else None)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("make", [qa, chat, llava], ids=["vqa", "messages", "llava_med"])
@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "saved splits"])
def test_tables(folder, tmp_path, kind, make, streaming):
    table, path = embedded(folder, make), tmp_path / "data"
    if kind == "parquet":
        path = tmp_path / "data.parquet"
        table.to_parquet(path)
    elif kind == "folder":
        path.mkdir()
        table.to_parquet(path / "validation-00000.parquet")
    else:
        (table if kind == "saved" else datasets.DatasetDict({"validation": table})).save_to_disk(path)
    source = DataSource(str(path), split="validation")
    dataset = load(source, streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset) == streaming and dataset.features == ROW_FEATURES
    check_rows(dataset, range(6), [f"data/validation/{number}" for number in range(6)] if make is qa else None)
    if not streaming:
        assert list(load(source).data.column("messages")) == list(dataset.data.column("messages"))  # from the cache


TABLE = """\
image,question,answer,note
0.png,"Is it large, or small?",None,x
1.png,How many?,5,
2.png,"Say ""NA"".",NA,x

3.png,"What is
shown?",5.0,x
"""


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["csv", "csv of Excel", "semicolons", "tsv", "folder"])
def test_tables_of_texts(folder, kind, streaming):
    """What a cell says is what is learned: no number is made of it, and "None" and "NA" are answers."""
    path = folder / ("train.CSV" if kind == "csv" else "train.tsv" if kind == "tsv" else "train.csv")
    separator = {"tsv": "\t", "semicolons": ";"}.get(kind, ",")
    text = TABLE.replace(",", separator).replace(f"large{separator} or", "large, or")
    path.write_text(text, encoding="utf-8-sig" if kind == "csv of Excel" else "utf-8")
    rows = list(load(str(folder) if kind == "folder" else str(path), streaming=streaming))
    turns = [[message["content"][-1]["text"] for message in row["messages"]] for row in rows]
    assert turns == [
        ["Is it large, or small?", "None"], ["How many?", "5"], ['Say "NA".', "NA"], ["What is\nshown?", "5.0"],
    ]  # fmt: skip
    assert [row["images"][0].size[0] for row in rows] == [30, 31, 32, 33]


def test_columns_by_other_names(folder, caplog):
    (folder / "data.csv").write_text("Image Path,Query,Ground_Truth\n3.png,Is it?,No\n")
    (row,) = load(str(folder / "data.csv"))
    assert [message["content"][-1]["text"] for message in row["messages"]] == ["Is it?", "No"]
    assert row["images"][0].size == (33, 20)
    assert "question is read from 'Query', answer is read from 'Ground_Truth', image is read from" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,question,answer\n0.png,Is it large, or small?,No\n", "has 4 cells at line 2, and 3 columns"),
        ("image,question,answer\n0.png,Is it?\n", "has 2 cells at line 2"),
        ("image|question|answer\n0.png|Is it?|No\n", r"columns \['image\|question\|answer'\]; allowed"),
        ("image,answer\n0.png,No\n", r"columns \['answer', 'image'\]; allowed are messages, or conversations, or"),
        ("image,question,answer,answer\n", "of which two have one name"),
        ("image,question,answer\n", "which has no records"),
        ("image,question,answer\n0.png,Is it?,\n", "data/0 at line 2: `answer` is None; allowed are texts and numbers"),
        ('image,question,answer\n0.png,"Is it?,No\n', "cannot be read as CSV"),
    ],
)
def test_tables_of_texts_that_are_wrong(folder, text, message):
    (folder / "data.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(folder / "data.csv"))


def test_numbers_are_answers(folder, tmp_path):
    """A column of numbers with a gap holds floats, of which one was 5."""
    content = [qa(0, NAMES[0]) | {"answer": 5.0}, qa(1, NAMES[1]) | {"answer": None}, qa(2, NAMES[2]) | {"answer": 5.6}]
    datasets.Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.json", content), str(tmp_path / "a.parquet")):
        source = DataSource(path, image_folder=str(folder))
        rows, (report,) = load_dataset_mixture([source], invalid_records="skip")
        assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["5", "5.6"] and len(report.invalid) == 1


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_an_object_around_the_records(folder, tmp_path, streaming):
    for make in (qa, chat, llava):
        content = {"version": 1, "data": [make(number, name) | {"id": None} for number, name in enumerate(NAMES)]}
        (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
        rows = load(DataSource(str(tmp_path / "a.json"), image_folder=str(folder)), streaming=streaming)
        check_rows(rows, range(6), [f"a/{number}" for number in range(6)])


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_lines_that_cannot_be_read_are_left_out_when_asked(folder, tmp_path, streaming):
    (tmp_path / "a.csv").write_text("image,question,answer\n0.png,Q0?,A0\n1.png,large, or small?,No\n2.png,Q2?,A2\n")
    lines = [json.dumps(qa(number, NAMES[number])) for number in (0, 2)]
    (tmp_path / "a.jsonl").write_text(f'{lines[0]}\n{{"question": "Q\n{lines[1]}\n')
    for file, reason in (("a.csv", "it has 4 cells at line 3, and 3 columns"), ("a.jsonl", "it is no JSON")):
        source = DataSource(str(tmp_path / file), image_folder=str(folder))
        with pytest.raises(ValueError, match="at line"):
            list(load(source, streaming=streaming))
        dataset, (report,) = load_dataset_mixture([source], streaming=streaming, invalid_records="skip")
        check_rows(dataset, [0, 2], ["a/0", "a/2"])
        ((name, why),) = report.invalid
        assert report.rows == 2 and name == "a/1" and why.startswith(reason)


def test_chats_with_parts_and_lists_of_images(folder, tmp_path):
    content = [chat(number, parts=True) | {"images": [name]} for number, name in enumerate(NAMES)]
    check_rows(load(DataSource(write(tmp_path / "a.json", content), image_folder=str(folder))), range(6))
    two = chat(0) | {"images": NAMES[:2]}
    none = chat(1) | {"images": []}
    rows = list(load(DataSource(write(tmp_path / "b.jsonl", [two, none]), image_folder=str(folder))))
    assert [image.size[0] for image in rows[0]["images"]] == [30, 31] and rows[1]["images"] == []
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in rows[1]["messages"][0]["content"]] == ["text"]


def test_images_are_decoded_when_they_are_needed(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no picture")
    file = write(tmp_path / "a.json", [qa(0, NAMES[0]), qa(1, "broken.png")])
    dataset = load(DataSource(file, image_folder=str(folder)))
    assert len(dataset) == 2 and dataset[0]["images"][0].size == (30, 20)
    held = dataset.cast_column("images", datasets.List(datasets.Image(decode=False)))[1]["images"]
    assert held == [{"bytes": None, "path": str(folder / "broken.png")}]
    with pytest.raises(OSError):
        dataset[1]
    # … and what a table holds is taken over as it is.
    embedded(folder, qa).to_parquet(tmp_path / "a.parquet")
    held = load(str(tmp_path / "a.parquet")).cast_column("images", datasets.List(datasets.Image(decode=False)))[0]
    assert held["images"][0]["bytes"] == (folder / NAMES[0]).read_bytes()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_missing_images_cost_their_rows_only(folder, tmp_path, streaming):
    content = [qa(number, name) for number, name in enumerate(NAMES)]
    content[1:1] = [qa(8, "gone/8.png")]
    content.append(qa(9, "9.png"))
    file = write(tmp_path / "a.json", content)
    for source in (file, str(tmp_path / "a.parquet")):
        datasets.Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
        dataset, (report,) = load_dataset_mixture([DataSource(source, image_folder=str(folder))], streaming=streaming)
        names = "a" if source == file else "a/train"
        check_rows(dataset, range(6), [f"{names}/{number}" for number in (0, 2, 3, 4, 5, 6)])
        assert report.rows == 6
        assert report.missing_images == [(f"{names}/1", "gone/8.png"), (f"{names}/7", "9.png")]
    random_image(39, 20).save(folder / "9.png")  # nothing of an earlier run is remembered
    for source in (file, str(tmp_path / "a.parquet")):
        (report,) = load_dataset_mixture([DataSource(source, image_folder=str(folder))])[1]
        assert report.rows == 7 and len(report.missing_images) == 1


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_null_image_is_a_missing_one(folder, tmp_path, streaming):
    table = embedded(folder, qa)
    nothing = datasets.Dataset.from_dict({"question": ["Q"], "answer": ["A"], "image": [None]}, table.features)
    datasets.concatenate_datasets([nothing, table]).to_parquet(tmp_path / "a.parquet")
    dataset, (report,) = load_dataset_mixture([str(tmp_path / "a.parquet")], streaming=streaming)
    check_rows(dataset, range(6), [f"a/train/{number}" for number in range(1, 7)])
    assert report.missing_images == [("a/train/0", "None")]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_malformed_records_stop_or_are_counted(folder, tmp_path, streaming):
    content = [qa(0, NAMES[0]), qa(1, NAMES[1]) | {"answer": None}, qa(2, NAMES[2])]
    datasets.Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    for file, where in ((write(tmp_path / "a.jsonl", content), "a/1 at line 2"), ("a.parquet", "a/train/1")):
        source = DataSource(str(tmp_path / file), image_folder=str(folder))
        with pytest.raises(ValueError, match=f"invalid record, {where}: `answer` is None; allowed are"):
            list(load(source, streaming=streaming))
        dataset, (report,) = load_dataset_mixture([source], streaming=streaming, invalid_records="skip")
        assert len(list(dataset)) == report.rows == 2 and len(report.invalid) == 1


def test_every_record_has_a_form_of_its_own(folder):
    completed = {
        "id": "row 3",
        "prompt": chat(3)["messages"][:1],
        "completion": chat(3)["messages"][1:],
        "images": NAMES[3],
    }
    content = [chat(0, NAMES[0]), llava(1, NAMES[1]), qa(2, NAMES[2]) | {"id": "row 2"}, completed]
    dataset, (report,) = load_dataset_mixture(
        [write(folder / "a.jsonl", [*content, {"image": "0.png"}])], invalid_records="skip"
    )
    check_rows(dataset, range(4))
    assert [name for name, _ in report.invalid] == ["a/4"]
    file = write(folder / "b.json", [qa(0, 5)])
    with pytest.raises(ValueError, match="invalid record, b/0 at line 1: `image` is of type int; allowed are names"):
        load(file)


def test_phantoms():
    examples = PhantomVQA(7, 12, ("closed", "open"))
    dataset = load("phantoms:7:12:closed,open")
    streamed = load("phantoms:7:12:closed,open", streaming=True)
    assert unstreamed(dataset) == unstreamed(streamed) and len(dataset) == 12
    for row, example in zip(dataset, examples):
        question, answer = row["messages"]
        assert [part["text"] for part in question["content"]] == [None, example.question]
        assert answer["content"] == [{"type": "text", "text": example.answer}]
        assert np.array_equal(row["images"][0], example.image)
    assert {row["id"] for row in load("phantoms:7:3")} == {"phantoms/7/0", "phantoms/7/1", "phantoms/7/2"}


@pytest.fixture
def slake_folder(folder, tmp_path):
    """A copy of SLAKE's repository: English and Chinese questions, images in an archive, of which one is not there."""
    path = tmp_path / "SLAKE@home"
    path.mkdir()
    with zipfile.ZipFile(path / "imgs.zip", "w") as archive:
        for name in NAMES:
            archive.write(folder / name, f"imgs/{name}")
    records = [
        qa(number) | {"img_name": name, "qid": number} for number, name in enumerate([*NAMES, "6.png", NAMES[0]])
    ]
    records[-1]["q_lang"] = "zh"
    write(path / "train.json", records)
    write(path / "test.json", records[:2])
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_benchmarks(slake_folder, streaming):
    options = {"streaming": streaming, "image_folder": str(slake_folder / "imgs.zip")}
    dataset, (report,) = load_dataset_mixture([f"vqa:slake:train:{slake_folder}"], **options)
    assert isinstance(dataset, datasets.IterableDataset) == streaming and dataset.features == ROW_FEATURES
    check_rows(dataset, range(6), [str(number) for number in range(6)])
    assert report.rows == 6 and report.missing_images == [("6", "6.png")] and report.other_languages == 1
    assert json.loads(json.dumps(asdict(report)))["images"] == 6  # as the training command writes it
    source = DataSource(f"vqa:slake::{slake_folder}", split="test", name="OctoMed/SLAKE")
    dataset, (report,) = load_dataset_mixture([source], streaming=streaming)
    check_rows(dataset, range(2), ["0", "1"])
    assert report.published["questions"] == 1061
    mixture = load(f"vqa:slake:test:{slake_folder}", "vqa:phantoms:test:7:3", "phantoms:7:3", streaming=streaming)
    rows = unstreamed(mixture)
    phantoms = [[row for row in rows if row["id"].startswith("phantoms/7/")][number::2] for number in (0, 1)]
    assert len(rows) == 8 and phantoms[0] == phantoms[1] and len(phantoms[0]) == 3


def test_benchmarks_of_the_hub(folder, monkeypatch):
    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, options["split"], options["revision"]))
        return embedded(folder, qa)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = ["vqa:vqa-rad@abc", {"path": "vqa:slake:test", "name": "OctoMed/SLAKE"}, "vqa:path-vqa:validation"]
    _, reports = load_dataset_mixture(sources)
    pinned = SOURCES["path-vqa"]["flaviagiammarino/path-vqa"].revision
    assert asked == [
        ("OctoMed/VQA-RAD", "train", "abc"), ("OctoMed/SLAKE", "test", None),
        ("flaviagiammarino/path-vqa", "validation", pinned),
    ]  # fmt: skip
    assert [report.rows for report in reports] == [6, 6, 6] and reports[0].source == "OctoMed/VQA-RAD@abc"


def numbered(tmp_path, name, count, **options):
    content = [chat(number) | {"id": name} for number in range(count)]
    return {"path": write(tmp_path / f"{name}.json", content), **options}


def shares(dataset):
    return Counter(row["id"] for row in dataset)


def test_a_mixture_without_weights_holds_every_row_once(tmp_path):
    sources = [numbered(tmp_path, "a", 5), numbered(tmp_path, "b", 20)]
    whole = load(*sources)
    assert shares(whole) == {"a": 5, "b": 20} and list(whole) == list(load(*sources, streaming=True))
    assert [row["id"] for row in whole][:6] == ["a", "b", "a", "b", "a", "b"]


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_a_weighted_mixture(tmp_path, strategy):
    """Shares are the weights, within four standard errors; streaming draws the same rows in the same order."""
    sources = [numbered(tmp_path, "a", 400, weight=3), numbered(tmp_path, "b", 1000, weight=1)]
    options = {"seed": 3, "stopping_strategy": strategy}
    whole = load(*sources, **options)
    count = shares(whole)
    error = (0.75 * 0.25 / len(whole)) ** 0.5
    assert abs(count["a"] / len(whole) - 0.75) < 4 * error
    if strategy == "first_exhausted":
        assert count["a"] == 400 and count["b"] < 1000
        questions = [(row["id"], row["messages"][0]["content"][0]["text"]) for row in whole]
        assert len(set(questions)) == len(questions)
    else:
        assert count["b"] == 1000 and count["a"] > 400
    assert list(whole) == list(load(*sources, **options, streaming=True))
    assert list(whole) == list(load(*sources, **options)) != list(load(*sources, **options | {"seed": 4}))


def test_each_row_once_in_a_weighted_order(tmp_path):
    sources = [numbered(tmp_path, "a", 50, weight=9), numbered(tmp_path, "b", 50, weight=1)]
    dataset = load(*sources, stopping_strategy="all_exhausted_without_replacement")
    assert shares(dataset) == {"a": 50, "b": 50}
    assert shares(dataset.select(range(40)))["a"] > 28


@pytest.mark.parametrize(
    "source", ["me/data@abc", {"path": "me/data", "revision": "abc"}, DataSource("me/data", revision="abc")]
)
def test_hub_ids_are_asked_for_by_revision(folder, monkeypatch, source):
    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, name, options))
        return embedded(folder, qa)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset, (report,) = load_dataset_mixture([source])
    assert asked == [("me/data", None, {"revision": "abc", "split": "train", "streaming": False})]
    assert report.source == "me/data@abc"
    check_rows(dataset, range(6), [f"data/train/{number}" for number in range(6)])


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "`train_data` is empty"),
        (["none.json"], "'none.json', which cannot be loaded: no such file or folder. Allowed are a Hub id"),
        (["/none/at/all"], "cannot be loaded: no such file or folder"),
        (["me/none"], "'me/none', which cannot be loaded: .*me/none"),
        (["me/none@abc"], "'me/none@abc', which cannot be loaded"),
        ([{"path": "a.json", "wieght": 1}], "`train_data` holds .*'wieght'.*; allowed are `path` and"),
        ([{"name": "a"}], "allowed are `path` and"),
        ([{"path": "phantoms:1:2", "weight": 0}], r"`weight` of `train_data` is \[0\]; allowed are numbers above 0"),
        (["phantoms:1:2", {"path": "phantoms:1:2", "weight": 1}], r"`weight` of `train_data` is \[None, 1\]"),
        (["phantoms:1"], "'phantoms:1', which cannot be loaded: allowed is SEED:COUNT,"),
        (["phantoms:1:x"], "allowed is SEED:COUNT"),
        (["vqa:slke"], "`train_data` holds 'vqa:slke', which cannot be loaded: `benchmark` is 'slke'; allowed are"),
        (["vqa:slake:dev"], "'vqa:slake:dev', which cannot be loaded: `split` is 'dev'; allowed for BoKelvin/SLAKE"),
        ([{"path": "vqa:slake", "name": "me/a"}], "`source` is 'me/a'; allowed for slake are"),
        (["vqa:slake:test:/none"], "`path` is '/none'; no such file or folder"),
        (["phantoms:1:2:moving"], "'phantoms:1:2:moving'.*'closed', 'open', 'description'"),
    ],
)
def test_sources_that_are_none(sources, message, streaming):
    with pytest.raises(ValueError, match=message):
        load(*sources, streaming=streaming, argument="train_data")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_files_that_are_no_data(tmp_path, streaming):
    cases = [
        ("a.txt", "x", "a file whose name ends on none of"),
        ("a.json", "", "'.*a.json', which has no records"),
        ("b.json", "[]", "which has no records"),
        ("c.jsonl", '{"messages": []}\n{"mess', "is no JSON at line 2"),
        ("d.json", '[{"caption": "x", "image": "y"}]', r"columns \['caption', 'image'\]; allowed are messages, or"),
        ("e.parquet", "x", "cannot be loaded"),
    ]
    for name, text, message in cases:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            list(load(str(tmp_path / name), streaming=streaming))
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "f.parquet")
    with pytest.raises(ValueError, match=r"columns \['text'\]; allowed are messages, or conversations, or"):
        load(str(tmp_path / "f.parquet"), streaming=streaming)
    datasets.Dataset.from_dict({"question": [], "answer": [], "image": []}).to_parquet(tmp_path / "g.parquet")
    with pytest.raises(ValueError, match=r"which has no records|corresponds to no data"):
        load(str(tmp_path / "g.parquet"), streaming=streaming)


def test_a_source_whose_images_are_all_missing(tmp_path):
    file = write(tmp_path / "a.json", [qa(number, f"{number}.png") for number in range(3)])
    with pytest.raises(ValueError, match=r"without a row to train on: .*0 rows; 3 missing images: a/0 \(0.png\)"):
        load(file)


def test_other_values_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`stopping_strategy` is 'soon'; allowed are"):
        load("phantoms:1:2", stopping_strategy="soon")
    with pytest.raises(ValueError, match="`invalid_records` is 'drop'"):
        load("phantoms:1:2", invalid_records="drop")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([qa(0)])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`split` is 'train'; allowed are \['test'\]"):
        load(str(tmp_path / "saved"))
