"""LLaVA-Med's records in all the shapes in which they are published, and files that cannot be read."""

import json

import pytest

from lladamedv.processing.datasets import ImageFiles, InvalidRecordError, LoadReport, read_records, record_to_row


QUESTION, ANSWER = "What is shown?", "A lung."


def turn(speaker, value):
    return {"from": speaker, "value": value}


def record(question=f"<image>\n{QUESTION}", key="conversations", **fields):
    return {"id": "F1", "image": "F1.jpg", key: [turn("human", question), turn("gpt", ANSWER)]} | fields


def shapes(row):
    return [[part["type"] for part in message["content"]] for message in row["messages"]]


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
@pytest.mark.parametrize(
    "question",
    [f"<image>\n{QUESTION}", f"{QUESTION}\n<image>", f"<image>{QUESTION}", f"{QUESTION} <image>", QUESTION],
    ids=["in front", "behind", "in front, no newline", "behind, a space", "missing"],
)
def test_every_shape_becomes_the_same_row(key, question):
    assert record_to_row(record(question, key), "0") == {
        "id": "F1",
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
        "images": ["F1.jpg"],
    }


def test_images_stand_where_they_are_named():
    first = [turn("system", "Be brief."), *record(QUESTION)["conversations"]]
    later = [turn("human", "<image>\nAnd here?"), turn("gpt", " Two\nlines, <image>. ")]
    row = record_to_row({"id": 7, "image": "a.jpg", "conversations": first + later}, "0")
    assert shapes(row) == [["text"], ["text"], ["text"], ["image", "text"], ["text"]]
    assert row["id"] == "7" and row["messages"][0]["role"] == "system"
    assert row["messages"][-1]["content"][0]["text"] == " Two\nlines, <image>. "  # an answer stays as it is
    assert shapes(record_to_row(record(QUESTION, image=["a.jpg", "b.jpg"]), "0"))[0] == ["image", "image", "text"]
    none = record_to_row({"conversations": record(QUESTION)["conversations"]}, "file/3")
    assert none["images"] == [] and none["id"] == "file/3" and shapes(none)[0] == ["text"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "a", "image": "a.jpg", "conversations": []}, "none of its columns .* is its question"),
        ({"id": "a", "conversations": "hello"}, "`conversations` is of type str; allowed are lists"),
        ({"id": "a", "conversations": [{"value": "x"}]}, "turn 0 has no `value` or is from None"),
        ({"id": "a", "conversations": [turn("human", "x"), turn("bard", "y")]}, "turn 1 .* 'bard'"),
        ({"id": "a", "conversations": [turn("human", "x"), turn("gpt", None)]}, "turn 1"),
    ],
)
def test_what_is_no_conversation_is_refused(bad, message):
    with pytest.raises(InvalidRecordError, match=message):
        record_to_row(bad, "0")


def test_a_report_names_the_first_few_records(caplog):
    report = LoadReport("file", "skip")
    for number in range(7):
        report.begin(number)
        report.leave_out(f"{number}", InvalidRecordError("no\n`image`"))
    assert report.summary().startswith("file: 0 rows; 7 invalid records: 0 (no `image`), 1 (no `image`), ")
    assert report.summary().endswith(", …") and len(caplog.records) == 5
    report.begin(0)
    report.leave_out("0", InvalidRecordError("no `image`"))
    assert len(report.invalid) == 7, "a record that is read again counts once"
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


@pytest.mark.parametrize("indent", [None, 1])
def test_the_records_of_a_list(tmp_path, indent):
    content = [{"number": number, "text": 'brackets ]}, "quotes" and ü\n' * number} for number in range(20)]
    (tmp_path / "a.json").write_text("\ufeff \n" + json.dumps(content, indent=indent), encoding="utf-8")
    places = [f"record {number}" for number in range(1, 21)]
    assert list(read_records(tmp_path / "a.json")) == list(zip(places, content))
    for text in ("\ufeff \n[]\n", ""):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert list(read_records(tmp_path / "a.json")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": }\n', "is no JSON at line 3: Expecting value"),
        ('[\n{"a": 1},\n{"a": }\n]', "is no JSON at line 3: Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "is no JSON at line 3: Expecting ',' delimiter"),
        ('[{"a": 1},\n{"a":\n\n 2', "is no JSON at line 4"),
        ('[{"a": 1}', "is no JSON at line 1: Expecting ',' delimiter"),
        ('[{"a": 1}]\n[{"a": 1}]', "is no JSON at line 2: Extra data"),
        ('[{"a": 1},]', "is no JSON at line 1: (Expecting value|Illegal trailing comma)"),
        ('[\n{"a": "\\ud800"}]', "has a lone surrogate, which is no character, at record 1"),
        ('{"a": "\\ud83e\\udebb"}\n{"a": "\\uDFFF"}', "has a lone surrogate, which is no character, at line 2"),
        ("nothing\n", "is no JSON at line 1"),
        ('[{"a": ' + "9" * 5000 + "}]", "is no JSON at line 1: Exceeds the limit"),
        ("[" * 100_000, "is no JSON at line 1: it is nested too deeply"),
        ('{"a": 1}\n[1]\n', "has a list at line 2"),
        ('["a"]', "has a str at record 1; allowed are a list of objects"),
        ('{"a": "\udcff"}', "is not in UTF-8"),
        (None, "cannot be read as JSON"),
    ],
)
def test_what_is_no_json_is_named_by_its_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message.replace("]'", r"\]'")):
        list(read_records(tmp_path / "a.json"))
