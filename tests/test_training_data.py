"""Whatever a recipe names becomes the same rows, streamed or not; mixtures have the shares that were asked for."""

import json
from collections import Counter
from dataclasses import asdict

import datasets
import numpy as np
import pytest

from lladamedv.processing.datasets import ROW_FEATURES, SOURCES
from lladamedv.processing.datasets.messages import PAIR_FEATURES, PROMPT_FEATURES
from lladamedv.processing.phantoms import PhantomVQA
from lladamedv.trainers.data import DataSource, load_dataset_mixture
from tests.tiny import random_image


pytestmark = pytest.mark.usefixtures("own_cache")
NAMES = [f"{number}.png" for number in range(6)]
HEAD = "image,question,answer\n"
WHOLE_AND_STREAMED = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


@pytest.fixture
def folder(tmp_path):
    """Six images, their names and sizes by number."""
    path = tmp_path / "images"
    path.mkdir()
    for number, name in enumerate(NAMES):
        random_image(30 + number, 20, seed=number).save(path / name)
    return path


def named(record, image):
    return record | ({"image": image} if image else {})


def qa(number, image=None):
    return named({"question": f"Q{number}?", "answer": f"A{number}"}, image)


def chat(number, image=None, parts=False):
    question, answer = f"Q{number}?", f"A{number}"
    if parts:
        question, answer = [{"type": "image"}, {"type": "text", "text": question}], [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return named({"id": f"row {number}", "messages": messages}, image)


def llava(number, image=None):
    turns = [{"from": "human", "value": f"Q{number}?\n<image>"}, {"from": "gpt", "value": f"A{number}"}]
    return named({"id": f"row {number}", "conversatons": turns}, image)


def completion(number, image=None):
    question, answer = chat(number)["messages"]
    return named({"id": f"row {number}", "prompt": [question], "completion": [answer]}, image)


FORMS = pytest.mark.parametrize("make", [qa, chat, llava, completion], ids=["vqa", "messages", "llava_med", "trl"])


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


# Sources


@WHOLE_AND_STREAMED
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "wrapped.json"])
@FORMS
def test_files_of_records(folder, make, name, streaming):
    content = [make(number, image) for number, image in enumerate(NAMES)]
    file = write(folder / name, {"version": 1, "data": content} if name == "wrapped.json" else content)
    stem = name.partition(".")[0]
    dataset = load(file, streaming=streaming)
    assert dataset.features == ROW_FEATURES
    check_rows(dataset, range(6), [f"{stem}/{number}" for number in range(6)] if make is qa else None)


@WHOLE_AND_STREAMED
@FORMS
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
    dataset = load(DataSource(str(path), split="validation"), streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset) == streaming and dataset.features == ROW_FEATURES
    check_rows(dataset, range(6), [f"data/validation/{number}" for number in range(6)] if make is qa else None)


def test_every_record_has_a_form_of_its_own(folder):
    content = [make(number, NAMES[number]) for number, make in enumerate((chat, llava, completion))]
    file = write(folder / "a.jsonl", [*content, qa(3, NAMES[3]) | {"id": "row 3"}, {"image": "0.png"}])
    dataset, (report,) = load_dataset_mixture([file], invalid_records="skip")
    check_rows(dataset, range(4))
    assert [name for name, _ in report.invalid] == ["a/4"]


TABLE = """\
image,question,answer,note
0.png,"Is it large, or small?",None,x
1.png,How many?,5,
2.png,"Say ""NA"".",NA,x

3.png,"What is
shown?",5.0,x
"""


@WHOLE_AND_STREAMED
@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_tables_of_texts(folder, kind, streaming):
    """What a cell says is what is learned: no number is made of it, and "None" and "NA" are answers."""
    path = folder / ("train.CSV" if kind == "csv" else "train.csv")
    path.write_text(TABLE)
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


def test_chats_with_parts_and_lists_of_images(folder):
    content = [chat(number, parts=True) | {"images": [name]} for number, name in enumerate(NAMES)]
    check_rows(load(write(folder / "a.json", content)), range(6))
    two, none = chat(0) | {"images": NAMES[:2]}, chat(1) | {"images": []}
    rows = list(load(write(folder / "b.jsonl", [two, none])))
    assert [image.size[0] for image in rows[0]["images"]] == [30, 31] and rows[1]["images"] == []
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in rows[1]["messages"][0]["content"]] == ["text"]


def test_phantoms():
    dataset = load("phantoms:7:12:closed,open")
    assert unstreamed(dataset) == unstreamed(load("phantoms:7:12:closed,open", streaming=True)) and len(dataset) == 12
    for number, (row, example) in enumerate(zip(dataset, PhantomVQA(7, 12, ("closed", "open")))):
        texts = [part["text"] for message in row["messages"] for part in message["content"]]
        assert texts == [None, example.question, example.answer] and row["id"] == f"phantoms/7/{number}"
        assert np.array_equal(row["images"][0], example.image)


def preference(number, image=None, messages=True):
    texts = {"prompt": f"Q{number}?", "chosen": f"A{number}", "rejected": f"B{number}"}
    if messages:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        texts = {name: [{"role": roles[name], "content": text}] for name, text in texts.items()}
    return {"id": f"pair {number}", **texts, "images": [image] if image else []}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.parquet"])
def test_pairs(folder, tmp_path, name, messages, streaming):
    """TRL's columns of preferences, texts and messages, with names of images and without any."""
    file = folder / name
    records = [preference(number, NAMES[number] if number else None, messages) for number in range(3)]
    if name.endswith("parquet"):
        datasets.Dataset.from_list(records).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    dataset, (report,) = load_dataset_mixture([str(file)], form="pairs", streaming=streaming)
    found = list(dataset)
    assert dataset.features == PAIR_FEATURES and report.rows == 3
    for number, row in enumerate(found):
        texts = [row[name][0]["content"][-1]["text"] for name in ("prompt", "chosen", "rejected")]
        assert texts == [f"Q{number}?", f"A{number}", f"B{number}"] and row["id"] == f"pair {number}"
        assert [image.size for image in row["images"]] == ([(30 + number, 20)] if number else [])


def test_pairs_of_the_hub(folder, monkeypatch):
    """A Hub id with the columns and features of TRL's data sets of preferences about pictures."""
    content = datasets.List({"text": datasets.Value("string"), "type": datasets.Value("string")})
    turns = datasets.List({"content": content, "role": datasets.Value("string")})
    features = {"images": datasets.List(datasets.Image(decode=True)), "prompt": turns, "chosen": turns}
    records = [
        {"images": [{"bytes": (folder / name).read_bytes(), "path": None}]} | {
            column: [{"role": role, "content": [{"type": "image", "text": None}] * (role == "user")
                      + [{"type": "text", "text": f"{letter}{number}"}]}]
            for column, role, letter in (("prompt", "user", "Q"), ("chosen", "assistant", "A"),
                                         ("rejected", "assistant", "B"))
        } for number, name in enumerate(NAMES)
    ]  # fmt: skip
    table = datasets.Dataset.from_list(records, features=datasets.Features(features | {"rejected": turns}))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *args, **options: {"trl-lib/some": table}[path])
    dataset, (report,) = load_dataset_mixture(["trl-lib/some@abc"], form="pairs")
    assert (report.rows, report.source) == (6, "trl-lib/some@abc") and dataset.features == PAIR_FEATURES
    for number, row in enumerate(dataset):
        assert [row[name][0]["content"][-1]["text"] for name in ("prompt", "chosen", "rejected")] == [
            f"{letter}{number}" for letter in "QAB"
        ]
        assert row["images"][0].size == (30 + number, 20) and len(row["prompt"][0]["content"]) == 2


def test_pairs_of_phantoms():
    """Closed questions, about one picture each: the right answer is that of the phantom."""
    dataset, _ = load_dataset_mixture(["phantoms:5:40:new_closed,closed"], form="pairs")
    opposites = {("Yes", "No"), ("No", "Yes"), ("Axial", "Coronal"), ("Coronal", "Axial")}
    for row, example in zip(dataset, PhantomVQA(5, 40, ["new_closed", "closed"]), strict=True):
        chosen, rejected = (row[name][0]["content"][0]["text"] for name in ("chosen", "rejected"))
        assert chosen == example.answer and (chosen, rejected) in opposites
        if example.topic == "only_one":
            assert chosen == ("Yes" if len(example.lesions) == 1 else "No") and len(example.lesions)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["texts", "messages", "question", "conversation"])
def test_prompts(folder, form, streaming):
    """What records ask, and what an answer is compared with."""
    asked, answered = ({"role": role, "content": text} for role, text in (("user", "Q?"), ("assistant", "A")))
    record = {
        "texts": {"prompt": "Q?", "answer": "A"}, "messages": {"prompt": [asked], "answer": "A"},
        "question": {"question": "Q?", "answer": "A", "candidates": ["A", "B"]},
        "conversation": {"messages": [asked, answered]},
    }[form]  # fmt: skip
    (folder / "prompts.json").write_text(json.dumps([record | {"image": NAMES[2]}] * 2))
    dataset, (report,) = load_dataset_mixture([str(folder / "prompts.json")], form="prompts", streaming=streaming)
    row, again = dataset
    assert dataset.features == PROMPT_FEATURES and report.rows == 2 and row["images"][0].size == (32, 20)
    assert [turn["role"] for turn in row["prompt"]] == ["user"] and row["prompt"][0]["content"][-1]["text"] == "Q?"
    assert row["answer"] == "A" and row["candidates"] == record.get("candidates") and again["answer"] == "A"


def test_prompts_of_phantoms():
    """All topics: the right answer is one of the candidates, but of descriptions."""
    dataset, _ = load_dataset_mixture(["phantoms:5:60:new_closed,closed,open,description,new"], form="prompts")
    assert {"description", "only_one", "free_side"} <= {each.topic for each in examples_of(60)}
    for row, example in zip(dataset, examples_of(60), strict=True):
        assert row["answer"] == example.answer and row["prompt"][0]["content"][-1]["text"] == example.question
        assert (row["candidates"] is None) == (example.topic == "description")
        assert example.answer in (row["candidates"] or [example.answer])


def examples_of(count):
    return PhantomVQA(5, count, ["new_closed", "closed", "open", "description", "new"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("phantoms:5:40:open", "has no one wrong answer; allowed are closed kinds"),
        ("vqa:slake", "a benchmark has questions and answers, and no pairs"),
        ("qa.json", r"the columns \['answer', 'image', 'question'\]; pairs have prompt, chosen, rejected"),
    ],
)
def test_sources_without_pairs(folder, source, message):
    (folder / "qa.json").write_text(json.dumps([qa(1, NAMES[1])]))
    source = str(folder / source) if source.endswith(".json") else source
    with pytest.raises(ValueError, match=message):
        load_dataset_mixture([source], form="pairs")


@WHOLE_AND_STREAMED
def test_benchmarks(folder, streaming):
    """A copy of SLAKE's repository, of which an image is missing. How it is read: tests/test_vqa_datasets.py."""
    home = folder.rename(folder.parent / "SLAKE@home")
    records = [qa(number) | {"img_name": name, "qid": number} for number, name in enumerate([*NAMES, "6.png"])]
    write(home / "train.json", records)
    write(home / "test.json", records[:2])
    dataset, (report,) = load_dataset_mixture([f"vqa:slake:train:{home}"], streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset) == streaming and dataset.features == ROW_FEATURES
    check_rows(dataset, range(6), [str(number) for number in range(6)])
    prompts, _ = load_dataset_mixture([f"vqa:slake:train:{home}"], streaming=streaming, form="prompts")
    assert prompts.features == PROMPT_FEATURES and [row["answer"] for row in prompts] == [f"A{n}" for n in range(6)]
    written = json.loads(json.dumps(asdict(report)))  # as the training command writes it
    assert written["rows"] == written["images"] == 6 and written["missing_images"] == [["6", "6.png"]]
    source = DataSource(f"vqa:slake::{home}", split="test", name="OctoMed/SLAKE")
    mixture, (report, _) = load_dataset_mixture([source, "vqa:phantoms:test:7:3"], streaming=streaming)
    assert report.published["questions"] == 1061
    assert [row["id"] for row in mixture] == ["0", "phantoms/7/0", "1", "phantoms/7/1", "phantoms/7/2"]


@pytest.mark.parametrize(
    ("source", "asked_for", "reported"),
    [
        ("me/data@abc", ("me/data", "train", "abc"), "me/data@abc"),
        ({"path": "me/data", "revision": "abc"}, ("me/data", "train", "abc"), "me/data@abc"),
        ("vqa:vqa-rad@abc", ("OctoMed/VQA-RAD", "train", "abc"), "OctoMed/VQA-RAD@abc"),
        ({"path": "vqa:slake:test", "name": "OctoMed/SLAKE"}, ("OctoMed/SLAKE", "test", None), "OctoMed/SLAKE"),
        (
            "vqa:path-vqa:validation",
            ("flaviagiammarino/path-vqa", "validation", SOURCES["path-vqa"]["flaviagiammarino/path-vqa"].revision),
            "flaviagiammarino/path-vqa@1685832883334b5bb5beaf4e4b333fdeecaa4ad9",
        ),
    ],
)
def test_hub_ids_are_asked_for_by_revision(folder, monkeypatch, source, asked_for, reported):
    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, options["split"], options["revision"]))
        return embedded(folder, qa)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset, (report,) = load_dataset_mixture([source])
    assert asked == [asked_for] and report.source == reported and len(dataset) == 6


# What cannot become a row


@WHOLE_AND_STREAMED
def test_lines_that_cannot_be_read_are_left_out_when_asked(folder, streaming):
    (folder / "a.csv").write_text("image,question,answer\n0.png,Q0?,A0\n1.png,large, or small?,No\n2.png,Q2?,A2\n")
    lines = [json.dumps(qa(number, NAMES[number])) for number in (0, 2)]
    (folder / "a.jsonl").write_text(f'{lines[0]}\n{{"question": "Q\n{lines[1]}\n')
    for file, reason in (("a.csv", "it has 4 cells at line 3, and 3 columns"), ("a.jsonl", "it is no JSON")):
        with pytest.raises(ValueError, match="at line"):
            list(load(str(folder / file), streaming=streaming))
        dataset, (report,) = load_dataset_mixture([str(folder / file)], streaming=streaming, invalid_records="skip")
        check_rows(dataset, [0, 2], ["a/0", "a/2"])
        ((name, why),) = report.invalid
        assert report.rows == 2 and name == "a/1" and why.startswith(reason)


@WHOLE_AND_STREAMED
def test_missing_images_cost_their_rows_only(folder, tmp_path, streaming):
    content = [qa(number, name) for number, name in enumerate(NAMES)]
    content[1:1] = [qa(8, "gone/8.png")]
    content.append(qa(9, "9.png"))
    datasets.Dataset.from_list(content).to_parquet(tmp_path / "a.parquet")
    files = {"a": write(tmp_path / "a.json", content), "a/train": str(tmp_path / "a.parquet")}
    for names, file in files.items():
        dataset, (report,) = load_dataset_mixture([DataSource(file, image_folder=str(folder))], streaming=streaming)
        check_rows(dataset, range(6), [f"{names}/{number}" for number in (0, 2, 3, 4, 5, 6)])
        assert list(dataset) and report.rows == 6, "what is read again counts once"
        assert report.missing_images == [(f"{names}/1", "gone/8.png"), (f"{names}/7", "9.png")]
    random_image(39, 20).save(folder / "9.png")  # nothing of an earlier run is remembered
    for file in files.values():
        (report,) = load_dataset_mixture([DataSource(file, image_folder=str(folder))])[1]
        assert report.rows == 7 and len(report.missing_images) == 1


@WHOLE_AND_STREAMED
def test_malformed_records_stop_or_are_counted(folder, streaming):
    content = [qa(0, NAMES[0]), qa(1, NAMES[1]) | {"answer": None}, qa(2, NAMES[2])]
    datasets.Dataset.from_list(content).to_parquet(folder / "a.parquet")
    for file, where in ((write(folder / "a.jsonl", content), "a/1 at line 2"), ("a.parquet", "a/train/1")):
        file = str(folder / file)
        with pytest.raises(ValueError, match=f"invalid record, {where}: `answer` is None; allowed are"):
            list(load(file, streaming=streaming))
        dataset, (report,) = load_dataset_mixture([file], streaming=streaming, invalid_records="skip")
        assert len(list(dataset)) == report.rows == 2 and len(report.invalid) == 1


@WHOLE_AND_STREAMED
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "--train_data is empty"),
        (["none.json"], "'none.json', of which train cannot be loaded: no such file or folder; allowed are a Hub id"),
        (["me/none@abc"], "'me/none@abc', of which train cannot be loaded: .*me/none"),
        ([{"path": "a.json", "wieght": 1}], "--train_data holds .*'wieght'.*; allowed are `path` and"),
        ([{"path": "phantoms:1:2", "weight": 0}], r"`weight` of --train_data is \[0\]; allowed are numbers above 0"),
        (["phantoms:1:2", {"path": "phantoms:1:2", "weight": 1}], r"`weight` of --train_data is \[None, 1\]"),
        (["phantoms:1:x"], "'phantoms:1:x', which cannot be loaded: allowed is SEED:COUNT,"),
        (["phantoms:1:2:moving"], "'phantoms:1:2:moving'.*'closed', 'open', 'description'"),
        (["vqa:slke"], "--train_data holds 'vqa:slke', which cannot be loaded: `benchmark` is 'slke'; allowed are"),
    ],
)
def test_sources_that_are_none(sources, message, streaming):
    with pytest.raises(ValueError, match=message):
        load(*sources, streaming=streaming, argument="--train_data")


@WHOLE_AND_STREAMED
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", f"{HEAD}0.png,Is it?\n", "has 2 cells at line 2"),
        ("a.csv", "image|question|answer\n0.png|Is it?|No\n", r"columns \['image\|question\|answer'\]; allowed"),
        ("a.csv", "image,answer\n0.png,No\n", r"columns \['answer', 'image'\]; allowed are messages, or conversations"),
        ("a.csv", "image,question,answer,answer\n", "of which two have one name"),
        ("a.csv", HEAD, "which has no records"),
        ("a.csv", f'{HEAD}0.png,"Is it?,No\n', "cannot be read as CSV"),
        ("a.csv", f"{HEAD}0.png,Is it?,\udcff\n", "is not in UTF-8"),
        ("a.txt", "x", "a file whose name ends on none of"),
        ("a.json", "[]", "which has no records"),
        ("a.json", [{"caption": "x", "image": "y"}], r"columns \['caption', 'image'\]; allowed are messages, or"),
        ("a.json", [qa(0, 5)], "invalid record, a/0 at record 1: `image` is of type int; allowed are names of files"),
        ("a.json", [qa(0, "0.png") | {"images": ["1.png"]}], "at record 1: it has both `image` and `images`"),
        ("a.json", [chat(0) | {"messages": "hello"}], "its messages cannot be read: `messages` is 'hello'"),
        ("a.parquet", "x", "cannot be loaded"),
        ("a.parquet", {"text": ["x"]}, r"columns \['text'\]; allowed are messages, or conversations, or"),
        ("a.parquet", {"question": [], "answer": [], "image": []}, "which has no records|corresponds to no data"),
    ],
)  # fmt: skip
def test_files_that_are_no_data(folder, name, content, message, streaming):
    if isinstance(content, dict):
        datasets.Dataset.from_dict(content).to_parquet(folder / name)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        list(load(str(folder / name), streaming=streaming))


def test_other_values_that_are_refused(tmp_path):
    file = write(tmp_path / "a.json", [qa(number, f"{number}.png") for number in range(3)])
    with pytest.raises(ValueError, match=r"without a row to train on: .*0 rows; 3 missing images: a/0 \(0.png\)"):
        load(file)
    with pytest.raises(ValueError, match="`image_folder` is '/none'; no such folder or zip archive"):
        load(DataSource(file, image_folder="/none"))
    with pytest.raises(ValueError, match="`stopping_strategy` is 'soon'; allowed are"):
        load("phantoms:1:2", stopping_strategy="soon")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([qa(0)])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`split` is 'train'; allowed are \['test'\]"):
        load(str(tmp_path / "saved"))


# Mixtures


def numbered(tmp_path, name, count, **options):
    content = [chat(number) | {"id": name} for number in range(count)]
    return {"path": write(tmp_path / f"{name}.json", content), **options}


def shares(dataset):
    return Counter(row["id"] for row in dataset)


def test_mixtures_in_which_every_row_comes_once(tmp_path):
    sources = [numbered(tmp_path, "a", 5), numbered(tmp_path, "b", 20)]
    whole = load(*sources)
    assert shares(whole) == {"a": 5, "b": 20} and list(whole) == list(load(*sources, streaming=True))
    assert [row["id"] for row in whole][:6] == ["a", "b", "a", "b", "a", "b"]
    sources = [numbered(tmp_path, "a", 50, weight=9), numbered(tmp_path, "b", 50, weight=1)]
    whole = load(*sources, stopping_strategy="all_exhausted_without_replacement")
    assert shares(whole) == {"a": 50, "b": 50} and shares(whole.select(range(40)))["a"] > 28


@pytest.mark.parametrize(("strategy", "all_of"), [("first_exhausted", ("a", 400)), ("all_exhausted", ("b", 1000))])
def test_a_weighted_mixture(tmp_path, strategy, all_of):
    """Shares are the weights, within four standard errors; streaming draws the same rows in the same order."""
    sources = [numbered(tmp_path, "a", 400, weight=3), numbered(tmp_path, "b", 1000, weight=1)]
    options = {"seed": 3, "stopping_strategy": strategy}
    whole = load(*sources, **options)
    count = shares(whole)
    assert abs(count["a"] / len(whole) - 0.75) < 4 * (0.75 * 0.25 / len(whole)) ** 0.5
    assert count[all_of[0]] == all_of[1]
    assert (
        list(whole) == list(load(*sources, **options, streaming=True)) != list(load(*sources, **options | {"seed": 4}))
    )
