"""LLaVA-Med's records in all the shapes in which they are published, and what is wrong with some of them."""

import json

import pytest

from lladamedv.processing.datasets import (
    ImageFiles,
    InvalidRecordError,
    LoadReport,
    llava_med_rows,
    read_records,
    record_to_row,
    records,
    row_to_record,
)
from tests.tiny import random_image


QUESTION, ANSWER = "What is shown?", "A lung."


def turn(speaker, value):
    return {"from": speaker, "value": value}


def record(question=f"<image>\n{QUESTION}", key="conversations", number=0, turns=1, **fields):
    """A record of `turns` questions, as instruct (several) and alignment (one) have them."""
    first = [turn("human", question), turn("gpt", ANSWER)]
    later = [turn("human", "And the side?"), turn("gpt", "Left.")] * (turns - 1)
    return {"id": f"{number}_F1", "image": f"{number}_F1.jpg", key: first + later} | fields


def image_files(folder, numbers):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        random_image(seed=number).save(folder / f"{number}_F1.jpg")
    return folder


def write(path, content, lines=False):
    text = "".join(json.dumps(each) + "\n" for each in content) if lines else json.dumps(content, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
@pytest.mark.parametrize(
    "question",
    [f"<image>\n{QUESTION}", f"{QUESTION}\n<image>", f"<image>{QUESTION}", f"{QUESTION} <image>", QUESTION],
    ids=["in front", "behind", "in front, no newline", "behind, a space", "missing"],
)
def test_every_shape_becomes_the_same_row(key, question):
    assert record_to_row(record(question, key), "0") == {
        "id": "0_F1",
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
        "images": ["0_F1.jpg"],
    }


def test_images_stand_where_they_are_named():
    first = [turn("system", "Be brief."), *record(QUESTION)["conversations"]]
    later = [turn("human", "<image>\nAnd here?"), turn("gpt", "Left.")]
    row = record_to_row({"id": 7, "image": "a.jpg", "conversations": first + later}, "0")
    assert [[part["type"] for part in message["content"]] for message in row["messages"]] == [
        ["text"], ["text"], ["text"], ["image", "text"], ["text"],
    ]  # fmt: skip
    assert row["id"] == "7" and row["messages"][0]["role"] == "system"
    two = record_to_row(record(QUESTION, image=["a.jpg", "b.jpg"]), "0")
    assert [part["type"] for part in two["messages"][0]["content"]] == ["image", "image", "text"]
    none = record_to_row({"conversations": record(QUESTION)["conversations"]}, "file/3")
    assert none["images"] == [] and none["id"] == "file/3"
    assert [part["type"] for part in none["messages"][0]["content"]] == ["text"]


@pytest.mark.parametrize("answer", [" Two\nlines. ", "It is <image> here."])
def test_an_answer_stays_as_it_is(answer):
    row = record_to_row(record(QUESTION) | {"conversations": [turn("human", "Q"), turn("gpt", answer)]}, "0")
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    assert row["messages"][1]["content"] == [{"type": "text", "text": answer}]
    again = record_to_row(row_to_record(row), "0")
    assert again == row


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "a", "image": "a.jpg"}, r"no `conversations`, but \['id', 'image'\]"),
        ({"id": "a", "conversations": []}, "no `conversations`"),
        ({"id": "a", "conversations": [{"value": "x"}]}, "turn 0 has no `value` or is from None"),
        ({"id": "a", "conversations": [turn("human", "x"), turn("bard", "y")]}, "turn 1 .* 'bard'"),
        ({"id": "a", "conversations": [turn("human", "x"), turn("gpt", None)]}, "turn 1"),
    ],
)
def test_what_is_no_conversation_is_refused(bad, message):
    with pytest.raises(InvalidRecordError, match=message):
        record_to_row(bad, "0")


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_round_trip(tmp_path, lines):
    """Rows become records and the same rows again; what is written is spelt right, with `<image>` in front."""
    folder = image_files(tmp_path / "images", range(4))
    shapes = (f"<image>\n{QUESTION}", f"{QUESTION}\n<image>", QUESTION, f"<image>\n{QUESTION}")
    content = [
        record(shape, ("conversations", "conversatons")[number % 2], number, turns=1 + number)
        for number, shape in enumerate(shapes)
    ]
    report = LoadReport("a")
    rows = list(llava_med_rows(write(tmp_path / "a.json", content, lines), folder, report))
    assert report.rows == len(rows) == 4 and not report.missing_images and not report.invalid
    assert [len(row["messages"]) for row in rows] == [2, 4, 6, 8]
    written = [row_to_record(row, folder) for row in rows]
    assert written == [record(f"<image>\n{QUESTION}", "conversations", number, 1 + number) for number in range(4)]
    assert list(llava_med_rows(write(folder / "b.json", written, lines))) == rows


def test_missing_images_are_counted_and_listed(tmp_path, caplog):
    folder = image_files(tmp_path / "images", [0, 2])
    content = [record(number=number) for number in range(10)] + [record(number=2, id="again")]
    content += [record(number=11, image=["0_F1.jpg", "gone/11.jpg"]), {"id": "text", **record(QUESTION, image=None)}]
    report = LoadReport("file")
    rows = list(llava_med_rows(write(tmp_path / "a.json", content), folder, report))
    assert [row["id"] for row in rows] == ["0_F1", "2_F1", "again", "0_F1"]
    assert rows[0]["images"] == [str(folder / "0_F1.jpg")]  # its own, and no other
    lost = [(f"{number}_F1", f"{number}_F1.jpg") for number in (1, 3, 4, 5, 6, 7, 8, 9)]
    assert report.missing_images == [*lost, ("11_F1", "gone/11.jpg")]
    assert report.rows + len(report.missing_images) == len(content)
    assert report.summary().startswith("file: 4 rows; 9 missing images: 1_F1 (1_F1.jpg), 3_F1")
    assert report.summary().endswith(", …")
    assert len(caplog.records) == 5 and "1_F1 left out, no such image file as 1_F1.jpg" in caplog.text


def test_invalid_records_stop_or_are_counted(tmp_path):
    content = [record(number=0), {"id": "bad", "image": "0_F1.jpg"}, record(number=0)]
    path = write(image_files(tmp_path, [0]) / "a.jsonl", content, lines=True)
    with pytest.raises(ValueError, match=r"a\.jsonl' has an invalid record, bad at line 2: no `conversations`"):
        list(llava_med_rows(path))
    report = LoadReport("a", "skip")
    assert len(list(llava_med_rows(path, report=report))) == 2
    assert report.invalid == [("bad", "no `conversations`, but ['id', 'image']")]
    assert len(list(llava_med_rows(path, report=report))) == report.rows == 2 and len(report.invalid) == 1
    with pytest.raises(ValueError, match="`invalid_records` is 'drop'; allowed are 'error' and 'skip'"):
        LoadReport("a", "drop")


def test_image_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    files = ImageFiles(tmp_path)
    assert files.find("sub/a.jpg") == files.find(str(tmp_path / "sub" / "a.jpg")) == str(tmp_path / "sub" / "a.jpg")
    assert files.find("https://somewhere/a.jpg") == "https://somewhere/a.jpg"
    for name in ("b.jpg", "sub/b.jpg", "other/a.jpg", "folder.jpg", "sub"):
        with pytest.raises(InvalidRecordError, match=name):
            files.find(name)


def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    """The same records whatever the pieces are; each knows its line."""
    content = [{"number": number, "text": 'brackets ]}, "quotes" and ü\n' * number} for number in range(20)]
    expected = [(2 + 4 * number, each) for number, each in enumerate(content)]
    path = write(tmp_path / "a.json", content)
    for size in (1, 2, 7, 64, 2**20):
        monkeypatch.setattr(records, "_CHUNK", size)
        assert list(read_records(path)) == expected
    path.write_text("\ufeff \n[]\n", encoding="utf-8")
    assert list(read_records(path)) == []
    path.write_text("")
    assert list(read_records(path)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": }\n', "no JSON at line 3: Expecting value"),
        ('[\n{"a": 1},\n{"a": }\n]', "no JSON at line 3: Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "no JSON at line 3: expected ',' or ']'"),
        ('[{"a": 1},\n{"a":\n\n 2', "no JSON at line 4"),
        ('[{"a": 1}', "no JSON at line 1: expected ',' or ']'"),
        ('[{"a": 1}]\n[{"a": 1}]', "no JSON at line 2: more follows"),
        ('[{"a": 1},]', "no JSON at line 1: Expecting value"),
        ("nothing\n", "no JSON at line 1"),
        ('{"a": 1}\n[1]\n', "has a list at line 2"),
        ('["a"]', "has a str at line 1; allowed are a list of objects"),
    ],
)
def test_what_is_no_json_is_named_by_its_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message.replace("]'", r"\]'")):
        list(read_records(tmp_path / "a.json"))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        list(read_records(tmp_path / "none.json"))
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="is not in UTF-8"):
        list(read_records(tmp_path / "a.json"))


def test_only_paths_can_be_written():
    with pytest.raises(ValueError, match="`images` of row 'a' holds a Image; allowed are paths"):
        row_to_record({"id": "a", "messages": [], "images": [random_image()]})
