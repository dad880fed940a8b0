"""Miniature copies of every publication of the medical VQA benchmarks become the same rows; reports count by hand."""

import hashlib
import io
import json
import zipfile

import datasets
import pytest
from huggingface_hub import DatasetInfo, HfApi
from PIL import Image

from lladamedv.processing.datasets import (
    SOURCES,
    VQA_FEATURES,
    load_vqa,
    record_to_messages,
    record_to_row,
    shared_images,
    training_open_answers,
    vqa,
)
from lladamedv.processing.phantoms import PhantomVQA
from tests.tiny import random_image


pytestmark = pytest.mark.usefixtures("own_cache")
NEWEST = "0123456789abcdef0123456789abcdef01234567"
WHOLE_AND_STREAMED = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


def stored(image, kind="PNG"):
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


def png(number=0):
    """The bytes of a picture that is `30 + number` pixels wide."""
    return stored(random_image(30 + number, 20, seed=number))


def embedded(records):
    """A table as the Hub has them, with the pictures in it."""
    records = [{**each, "image": each["image"] and {"bytes": each["image"], "path": "image.png"}} for each in records]
    return datasets.Dataset.from_list(records).cast_column("image", datasets.Image())


def read(dataset):
    """What its rows say, and how wide their pictures are."""
    rows = list(dataset)
    said = [(row["id"], row["question"], row["answer"], row["answer_type"]) for row in rows]
    return said, [(row["image_id"], row["image"].size[0]) for row in rows]


def octomed(number, picture, answer, answer_type, **fields):
    record = {"qid": 100 + number, "image_name": f"synpic{picture}.jpg", "image_organ": "CHEST", "answer": answer}
    record |= {"answer_type": answer_type, "question_type": "PRES", "question": f" Q{number}? "}
    return record | {"phrase_type": "freeform", "image": png(picture), "image_hash": "0"} | fields


VQA_RAD = [
    octomed(0, 1, "Yes ", "CLOSED "), octomed(1, 1, "left lung", "OPEN"), octomed(2, 2, "left", "CLOSED"),
]  # fmt: skip


def plain(picture, answer, question="Is it so?"):
    return {"image": picture, "question": question, "answer": answer}


def slake(number, name, answer, answer_type, **fields):
    record = {"img_id": number, "img_name": name, "question": f"Q{number}?", "answer": answer, "q_lang": "en"}
    record |= {"location": "Lung", "modality": "X-Ray", "answer_type": answer_type, "base_type": "vqa"}
    return record | {"content_type": "Position", "triple": ["vhead", "_", "_"], "qid": number} | fields


SLAKE = [
    slake(0, "xmlab0/source.jpg", "Yes", "CLOSED"),
    slake(1, "xmlab0/source.jpg", "是", "CLOSED", q_lang="zh"),
    slake(2, "xmlab1/source.jpg", "Lung", "OPEN"),
    slake(3, "xmlab2/source.jpg", "Liver", "OPEN"),  # not in the archive
    slake(4, "../outside.jpg", "Liver", "OPEN"),
    slake(5, "/outside.jpg", "Liver", "OPEN"),
    slake(6, "xmlab3/source.jpg", "Left", "CLOSED"),  # damaged
    slake(7, "xmlab1/source.jpg", "", "OPEN"),
]
SLAKE_MISSING = [
    ("3", "xmlab2/source.jpg"), ("4", "../outside.jpg"), ("5", "/outside.jpg"), ("6", "xmlab3/source.jpg"),
]  # fmt: skip


@pytest.fixture(params=["imgs/", ""], ids=["with prefix", "without"])
def slake_folder(tmp_path, request):
    """A copy of the repository, whose archive has a damaged member and some that lead out of it."""
    folder = tmp_path / "SLAKE"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.json").write_text(json.dumps(SLAKE))
    with zipfile.ZipFile(folder / "imgs.zip", "w") as archive:
        for number in (0, 1, 3):
            archive.writestr(f"{request.param}xmlab{number}/source.jpg", png(number))
        for name in ("../outside.jpg", "imgs/../outside.jpg", "/outside.jpg"):
            archive.writestr(name, png(9))
    content = (folder / "imgs.zip").read_bytes()
    damaged = content.index(png(3)) + 60
    (folder / "imgs.zip").write_bytes(content[:damaged] + b"\0\0\0\0" + content[damaged + 4 :])
    return folder


def check_slake(dataset, report):
    assert read(dataset) == (
        [("0", "Q0?", "Yes", "closed"), ("2", "Q2?", "Lung", "open"), ("7", "Q7?", "", "open")],
        [(f"xmlab{number}/source.jpg", 30 + number) for number in (0, 1, 1)],
    )
    first = next(iter(dataset))
    stated = {"modality": "X-Ray", "location": "Lung", "content_type": "Position", "base_type": "vqa"}
    assert first["meta"] == stated | dict.fromkeys(("organ", "phrase_type", "question_type"))
    assert first["language"] == "en" and first["dataset"] == "slake" and dataset.features == VQA_FEATURES
    assert report.counts == {"images": 2, "questions": 3, "open": 2, "closed": 1}
    assert report.missing_images == SLAKE_MISSING and report.other_languages == 1
    assert report.empty_answers == ["7"] and not report.derived_answer_types


@WHOLE_AND_STREAMED
def test_slake_is_read_from_its_archive(slake_folder, streaming):
    before = sorted(slake_folder.rglob("*"))
    dataset, report = load_vqa("slake", path=slake_folder, streaming=streaming)
    check_slake(dataset, report)
    assert sorted(slake_folder.rglob("*")) == before
    held = next(iter(dataset.cast_column("image", datasets.Image(decode=False))))["image"]
    assert held["bytes"] is None and held["path"].endswith(f"xmlab0/source.jpg::{slake_folder / 'imgs.zip'}")


def test_slake_is_read_from_other_places(slake_folder):
    """An archive that is named, and unpacked images."""
    check_slake(*load_vqa("slake", path=slake_folder / "train.json", image_folder=slake_folder / "imgs.zip"))
    (slake_folder / "imgs.zip").unlink()
    for number in (0, 1):
        (slake_folder / f"imgs/xmlab{number}").mkdir(parents=True)
        (slake_folder / f"imgs/xmlab{number}/source.jpg").write_bytes(png(number))
    check_slake(*load_vqa("slake", path=slake_folder))


def test_slake_of_the_hub(slake_folder, monkeypatch):
    (slake_folder.parent / "outside.jpg").write_bytes(png(9))  # which a name in the file would lead to
    asked = []

    def hf_hub_download(repo_id, filename, *, repo_type, revision):
        asked.append((repo_id, filename, repo_type, revision))
        return str(slake_folder / filename)

    monkeypatch.setattr(vqa, "hf_hub_download", hf_hub_download)
    dataset, report = load_vqa("slake", "validation", revision="abc")
    check_slake(dataset, report)
    wanted = ("validation.json", "imgs.zip")
    assert asked == [("BoKelvin/SLAKE", name, "dataset", "abc") for name in wanted]
    assert report.source == "BoKelvin/SLAKE@abc" and report.revision == "abc" and "CC BY 4.0" in report.licence
    with pytest.raises(ValueError, match=r"`streaming` is True, but .* in one archive; allowed are streaming=False"):
        load_vqa("slake", streaming=True)


def test_an_archive_that_is_none(slake_folder):
    (slake_folder / "imgs.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"imgs.zip' cannot be read as a zip archive"):
        load_vqa("slake", path=slake_folder)


@WHOLE_AND_STREAMED
@pytest.mark.parametrize("with_features", [True, False])
def test_vqa_rad_from_a_table(tmp_path, with_features, streaming):
    without = datasets.Dataset.from_list([{**each, "image": {"bytes": each["image"]}} for each in VQA_RAD])
    (embedded(VQA_RAD) if with_features else without).to_parquet(tmp_path / "data.parquet")
    dataset, report = load_vqa("vqa-rad", path=tmp_path / "data.parquet", streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset) == streaming and dataset.features == VQA_FEATURES
    assert read(dataset) == (
        [("100", "Q0?", "Yes", "closed"), ("101", "Q1?", "left lung", "open"), ("102", "Q2?", "left", "closed")],
        [("synpic1.jpg", 31), ("synpic1.jpg", 31), ("synpic2.jpg", 32)],
    )
    meta = next(iter(dataset))["meta"]
    assert meta["organ"] == "CHEST" and meta["phrase_type"] == "freeform"
    assert report.counts == {"images": 2, "questions": 3, "open": 1, "closed": 2}
    assert report.differences == {"images": -201, "questions": -448, "open": -178, "closed": -270}
    text, as_dict = report.summary(), json.loads(json.dumps(report.as_dict()))
    for said in (
        "vqa-rad test: 2 images, 3 questions, 1 open, 2 closed",
        "here: -201 images, -448 questions, -178 open, -270 closed",
        "published for OctoMed/VQA-RAD: 203 images, 451 questions, 179 open, 272 closed",
        "these are not the published questions of vqa-rad",
    ):
        assert said in text
    for claim in ("derived", "CC0", "202 of the 203"):
        assert claim not in text
    assert as_dict["licence"] == as_dict["leakage"] == "not known" and not as_dict["is_published"]
    assert as_dict["questions"] == 3 and as_dict["differences"] == report.differences and as_dict["published"]


def test_what_was_loaded_can_be_saved_and_loaded(tmp_path):
    embedded(VQA_RAD).to_parquet(tmp_path / "data.parquet")
    first, report = load_vqa("vqa-rad", path=tmp_path / "data.parquet")
    first.save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    again, other = load_vqa("vqa-rad", path=tmp_path / "saved")
    assert sorted((tmp_path / "saved").iterdir()) == before, "nothing is written beside the user's files"
    assert first.remove_columns("image")[:] == again.remove_columns("image")[:] and report.counts == other.counts


@WHOLE_AND_STREAMED
def test_nothing_is_decoded_while_rows_are_counted(tmp_path, monkeypatch, streaming):
    """… of a table with CMYK pictures, as PathVQA's, one missing and one that cannot be decoded at all."""
    cmyk = stored(Image.new("CMYK", (1, 1), (0, 255, 0, 0)), "JPEG")
    pictures = [cmyk, png(), cmyk, None, b"no picture"]
    answers = ["yes", "in the lung", " No ", "yes", "yes it is"]
    table = embedded([plain(picture, answer) for picture, answer in zip(pictures, answers)])
    table.to_parquet(tmp_path / "test.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
        dataset, report = load_vqa("path-vqa", path=tmp_path / "test.parquet", streaming=streaming)
        rows = list(dataset.cast_column("image", datasets.Image(decode=False)))
        assert report.counts == {"images": 3, "questions": 4, "open": 2, "closed": 2}
        assert report.missing_images == [("path-vqa/test/3", "None")] and report.derived_answer_types == 4
        assert report.differences == {"questions": 4 - 6719}
        assert "answer types of 4 questions derived" in report.summary()
    assert [row["answer_type"] for row in rows] == ["closed", "open", "closed", "open"]
    assert [row["id"] for row in rows] == [f"path-vqa/test/{number}" for number in (0, 1, 2, 4)]
    assert [row["image_id"] for row in rows] == [
        hashlib.sha256(pictures[number]).hexdigest() for number in (0, 1, 2, 4)
    ]
    assert [row["image"]["bytes"] for row in rows] == [pictures[number] for number in (0, 1, 2, 4)]
    first = next(iter(dataset))["image"]
    assert report.images == 3  # a record that is read again counts once
    assert first.mode == "CMYK" and first.size == (1, 1) and first.convert("RGB").getpixel((0, 0))[1] < 60


def llava(number, answer, answer_type=None, question="Where is it?\n<image>", key="conversations", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record = {"id": 300 + number, "image": f"test/{number % 2}.png", key: turns} | fields
    return record | ({"answer_type": answer_type} if answer_type else {})


LLAVA = [
    llava(0, " urinary ", "OPEN", question_type="where"),
    llava(1, "yes", "CLOSED", "<image>\nWhere is it?", "conversatons"),
    llava(2, "lung", "other", "Where is it? <image>"),
    llava(3, "2", "number", "Where is it?"),
    llava(4, "no", "yes/no", "<image>Where is it?"),
    llava(5, "No"),
]


@WHOLE_AND_STREAMED
def test_llava_med_files(tmp_path, streaming):
    """Also conversations of several questions."""
    (tmp_path / "test").mkdir()
    for number in range(2):
        (tmp_path / f"test/{number}.png").write_bytes(png(number))
    several = llava(6, "yes", "CLOSED")
    several["conversations"] += [{"from": "human", "value": "And here?"}, {"from": "gpt", "value": "no"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*LLAVA, several]))
    for path in (tmp_path / "test.jsonl", tmp_path):
        dataset, report = load_vqa("path-vqa", path=path, streaming=streaming)
        answers = ["urinary", "yes", "lung", "2", "no", "No"]
        types = ["open", "closed", "open", "open", "closed", "closed"]
        assert read(dataset) == (
            [
                *((f"{300 + number}", "Where is it?", *each) for number, each in enumerate(zip(answers, types))),
                ("306/0", "Where is it?", "yes", "closed"), ("306/1", "And here?", "no", "closed"),
            ],
            [(f"test/{number}.png", 30 + number) for number in (0, 1, 0, 1, 0, 1, 0, 0)],
        )  # fmt: skip
        assert next(iter(dataset))["meta"]["question_type"] == "where" and report.derived_answer_types == 1
        assert report.reference == "llava-med" and report.published["closed"] == 3391
        assert report.counts == {"images": 2, "questions": 8, "open": 3, "closed": 5}


@WHOLE_AND_STREAMED
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": ["Yes", "No"]}, "`answer` holds 2 answers; allowed is one"),
        ({"answer": {"text": "Yes"}}, "`answer` is {'text': 'Yes'}; allowed are text, numbers and truth values"),
        ({"question": "<image> or <image>?"}, "its question is about 2 images; allowed is one"),
        ({"image": 5}, "`image` is of type int; allowed are names of files and bytes"),
        ({"question": " <image> "}, "`question` is ' <image> '"),
        ({"answer_type": "maybe"}, "`answer_type` is 'maybe', not one of"),
        ({"image": ["a.png", "a.png"]}, "it has 2 images; allowed is one"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "its turns are not questions and answers by turns"),
    ],
)
def test_malformed_records(tmp_path, changes, message, streaming):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "flat.json").write_text(json.dumps([plain("a.png", "Yes"), plain("a.png", "Yes") | changes]))
    options = {"path": tmp_path / "flat.json", "streaming": streaming}
    with pytest.raises(ValueError, match=f"vqa-rad/test/1 at record 2: {message}"):
        list(load_vqa("vqa-rad", **options)[0])
    dataset, report = load_vqa("vqa-rad", **options, invalid_records="skip")
    assert len(list(dataset)) == report.rows == 1 and len(report.invalid) == 1


@WHOLE_AND_STREAMED
def test_ids_that_are_not_unique(tmp_path, streaming):
    embedded([VQA_RAD[0], VQA_RAD[1] | {"qid": 100}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"two questions of the id '100'; ids must differ. 'qid' is read as"):
        list(load_vqa("vqa-rad", path=tmp_path / "a.parquet", streaming=streaming, invalid_records="skip")[0])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("vqarad",), {}, r"`benchmark` is 'vqarad'; allowed are vqa-rad, slake, path-vqa, phantoms"),
        (("slake", "dev"), {}, r"`split` is 'dev'; allowed for BoKelvin/SLAKE are train, validation, test"),
        (("vqa-rad", "validation"), {}, r"`split` is 'validation'; allowed for OctoMed/VQA-RAD are train, t"),
        (("slake",), {"source": "me/slake"}, "`source` is 'me/slake'; allowed for slake are .*, OctoMed/SLAKE"),
        (("slake",), {"source": "llava-med"}, "`source` is 'llava-med', which is not on the Hub; `path` must name"),
        (("slake",), {"path": "/none/at/all"}, "`path` is '/none/at/all'; no such file or folder"),
        (("slake",), {"path": "/", "revision": "a"}, "`revision` is 'a', but `path` names local data"),
        (("slake",), {"path": "/", "image_folder": "/none"}, "`image_folder` is '/none'; no such folder or zip"),
        (("vqa-rad",), {"invalid_records": "drop"}, "`invalid_records` is 'drop'; allowed are"),
        (("phantoms", "train"), {}, r"`split` is 'train'; allowed for phantoms are test"),
        (("phantoms",), {"path": "7"}, "`path` is '7'; for phantoms allowed is SEED:COUNT"),
    ],
)
def test_values_that_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        load_vqa(*arguments, **options)


@pytest.mark.parametrize(("revision", "asked_for"), [(None, NEWEST), ("abc", "abc")])
def test_hub_ids_are_asked_for_by_revision(monkeypatch, revision, asked_for):
    """Revisions that are pinned: tests/test_training_data.py."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *path, **more: asked.append((path, more)) or embedded(VQA_RAD))
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, hub_id: DatasetInfo(id=hub_id, sha=NEWEST))
    dataset, report = load_vqa("vqa-rad", "train", revision=revision)
    assert asked == [(("OctoMed/VQA-RAD", None), {"revision": asked_for, "split": "train", "streaming": False})]
    assert report.source == f"OctoMed/VQA-RAD@{asked_for}" and report.revision == asked_for and len(dataset) == 3
    newest = "" if revision else ", the newest when it was loaded: no revision is pinned"
    assert f"revision: {asked_for}{newest}\n" in report.summary() and report.published["questions"] == 3064


def test_published_counts_add_up():
    for _, questions, open_, closed in (
        counts for sources in SOURCES.values() for source in sources.values() for counts in source.published.values()
    ):
        assert None in (open_, closed) or open_ + closed == questions


@WHOLE_AND_STREAMED
def test_phantoms(streaming):
    """Drawn as tests/test_training_data.py sees them; here, what the report counts."""
    dataset, report = load_vqa("phantoms", "train", path="7:40", streaming=streaming)
    assert {row["split"] for row in dataset} == {"train"} and dataset.features == VQA_FEATURES
    closed = sum(example.kind == "closed" for example in PhantomVQA(7, 40))
    assert report.counts == {"images": 40, "questions": 40, "open": 40 - closed, "closed": closed}
    assert report.source == "phantoms:7:40" and report.published == {}
    report = load_vqa("phantoms")[1]
    assert report.rows == 300 and report.differences == {} and "here: no difference" in report.summary()


def test_images_of_two_splits(slake_folder, tmp_path):
    """Two of three test pictures are known: one by its name, though its bytes differ, one by its bytes."""
    train = [octomed(0, 1, "yes", "CLOSED"), octomed(1, 2, "no", "CLOSED"), octomed(2, 2, "no", "CLOSED")]
    test = [octomed(0, 1, "yes", "CLOSED", image=png(7)), octomed(1, 3, "a", "OPEN", image=png(2))]
    test += [octomed(2, 4, "a", "OPEN"), octomed(3, 4, "b", "OPEN")]
    for name, records in (("train", train), ("test", test)):
        embedded(records).to_parquet(tmp_path / f"{name}.parquet")
    parts = [
        load_vqa("vqa-rad", name, path=tmp_path / f"{name}.parquet", streaming=name == "train")[0]
        for name in ("train", "test")
    ]
    assert len(shared_images(parts[1], parts[0])) == 2 and len(shared_images(parts[1], parts[1])) == 3
    archived = [load_vqa("slake", split, path=slake_folder)[0] for split in ("train", "test")]
    assert len(shared_images(archived[1], archived[0])) == 2 and len(shared_images(parts[0], archived[0])) == 1


def test_candidate_answers(slake_folder):
    answers = [("Left Lung", "OPEN"), ("Yes", "CLOSED"), ("heart", "OPEN"), ("left lung", "OPEN"), ("", "OPEN")]
    records = [slake(number, "xmlab0/source.jpg", *each) for number, each in enumerate(answers)]
    (slake_folder / "train.json").write_text(json.dumps(records))
    assert training_open_answers(load_vqa("slake", "train", path=slake_folder)[0]) == ["left lung", "heart"]


def test_rows_as_messages():
    record = {"id": "7", "image": "a.png", "question": "Where?", "answer": "Left"}
    assert record_to_messages(record) == record_to_row(record, "0")
