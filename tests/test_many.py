"""Questions about many pictures at once: the answers of one at a time, every file and row accounted for, and tables
that other programs read as they are meant."""

import base64
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from PIL import Image
from typer.testing import CliRunner

from lladamedv import LLaDAMedVForConditionalGeneration
from lladamedv.answer_table import write_table
from lladamedv.cli import app
from lladamedv.conversation import reply_to
from lladamedv.evaluation.answer_sets import answer_set
from lladamedv.many import ManyPictures, PictureAnswerer, answer_many
from lladamedv.processing.medical_images import read_medical_image
from lladamedv.processing.phantoms import PhantomVQA
from lladamedv.units import units_in_folder
from tests.dicom_files import SECRET, SECRET_UID, dataset, to_bytes
from tests.tiny import random_image, randomize, tiny_config, tiny_processor


QUESTIONS = ["Is there a lesion?", "Describe the image."]


def call(*words):
    return CliRunner().invoke(app, ["ask", *map(str, words)])


def read_csv(file):
    return pd.read_csv(file, dtype={"id": str}, keep_default_na=False, na_values=[""])


@pytest.fixture
def folder(tmp_path):
    """Six pictures in two folders, of which two are one; a note, a broken picture, and a link to a folder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, example in enumerate(PhantomVQA(9000, 5, ("description",))):
        example.image.save(folder / f"{'more/' * (number > 2)}p{number}.png")
    shutil.copy(folder / "p1.png", folder / "copy of p1.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes((folder / "p0.png").read_bytes()[:200])
    (folder / "linked").symlink_to(tmp_path)
    return folder


@pytest.fixture
def single(shipped):
    """What the model says about a file when it is asked about this alone."""
    return lambda file, question, **options: reply_to(*shipped, read_medical_image(file).image, question, **options)


def test_a_folder(folder, single, tmp_path):
    """Each row is the answer of a single call; what is no picture is named, what is broken is a row."""
    output = tmp_path / "answers.csv"
    result = call(folder, *QUESTIONS, "--output", output, "--batch-size", 5, "--abstention-threshold", 0.97)
    assert result.exit_code == 3, result.output
    table = read_csv(output)
    names = ["broken.png", "copy of p1.png", "more/p3.png", "more/p4.png", "p0.png", "p1.png", "p2.png"]
    assert table[["image", "question"]].values.tolist() == [[name, text] for name in names for text in QUESTIONS]
    for row in table[table["image"] != "broken.png"].itertuples():
        reply = single(folder / row.image, row.question, abstention_threshold=0.97)
        assert (row.answer, row.abstained) == (reply.text, reply.abstained)
        assert row.confidence == pytest.approx(reply.confidence, abs=1e-5)
    assert 0 < table["abstained"].sum() < len(table)
    broken = table[table["image"] == "broken.png"]
    assert broken["error"].str.contains("broken").all() and broken["answer"].isna().all()
    assert table["error"].notna().sum() == 2 and "14 rows, 2 of them with an error" in result.stdout
    assert "skipped 2 files that are no pictures: linked, notes.txt" in result.stderr
    assert "linked\ta link to a folder" in (tmp_path / "answers.csv.run/skipped.txt").read_text().splitlines()


def test_pictures_of_many_sizes_share_passes_and_are_encoded_once():
    """Prompts of unequal lengths, in any order and number at a time: the tokens of each alone."""
    model = randomize(LLaDAMedVForConditionalGeneration(tiny_config("anyres_max_4")))
    processor = tiny_processor("anyres_max_4")
    sizes = [(40, 30), (100, 30), (32, 32), (40, 30)]
    pictures = [random_image(*size, seed) for seed, size in enumerate(sizes)]
    questions = ["What?", "Is there a large lesion on the left side of the picture, or is there none?", "What?"]
    options = {"max_new_tokens": 8, "block_length": 4, "steps": 4, "suppress_tokens": [126081, 126348]}
    expected = [[reply_to(model, processor, each, text, **options).text for text in questions] for each in pictures]
    assert len({text for texts in expected for text in texts}) > 4
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    for batch_size, order in ((3, [3, 1, 0, 2]), (32, range(4))):
        many, encoded[:] = ManyPictures(model, processor, batch_size=batch_size, **options), []
        answers = many.ask([(pictures[place], questions) for place in order])
        assert [[row["answer"] for row in rows] for rows in answers] == [expected[place] for place in order]
        assert len(encoded) == len(pictures)
    hook.remove()
    (rows,) = ManyPictures(model, processor, **options).ask([(pictures[0], ["What?", "long " * 600])])
    assert rows[0]["answer"] == expected[0][0] and rows[1]["answer"] is None and "positions" in rows[1]["error"]


def test_a_table_from_a_spreadsheet(folder, single, tmp_path):
    """BOM, semicolons, quotes, line breaks, columns in other spellings, pictures twice, missing and at URLs."""
    nasty = 'Is there\na "lesion"; or not?'
    p0 = (folder / "p0.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(p0).decode()}"
    rows = [
        ("007", "p1.png", nasty, "yes"), ("=1+1", "more/p3.png", QUESTIONS[0], "no"), ("9", "gone.png", "What?", ""),
        ("10", "./p1.png", QUESTIONS[1], ""), ("11", "p1.png", nasty, ""), ("12", "p0.png", "", ""),
        ("13", url, QUESTIONS[0], ""),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["ID", "Image Path", "Question", "label"])
    table.to_csv(folder / "questions.csv", sep=";", index=False, encoding="utf-8-sig")
    result = call(folder / "questions.csv", "--output", tmp_path / "out.csv", "--output-image-reliance")
    assert result.exit_code == 3, result.output
    found = read_csv(tmp_path / "out.csv")
    assert found["id"].tolist() == ["007", "'=1+1", "9", "10", "11", "12", "13"]
    assert found["question"].tolist()[:5] == [row[2] for row in rows][:5]
    assert found["image"].tolist()[:6] == [row[1] for row in rows][:6]
    assert "1 texts that a spreadsheet would take for formulas" in result.stdout
    assert found["error"].dropna().tolist() == [
        "There is no such image file as 'gone.png'.", "The row cannot be used: its question is empty."
    ]  # fmt: skip
    for place, name in ((0, "p1.png"), (1, "more/p3.png"), (3, "p1.png"), (4, "p1.png"), (6, "p0.png")):
        reply = single(folder / name, found["question"][place], output_image_reliance=True)
        assert found["answer"].fillna("")[place] == reply.text
        assert found["image_reliance"][place] == pytest.approx(reply.image_reliance, abs=1e-4)


def test_tables_of_all_kinds_and_questions_here_and_there(folder, tmp_path):
    records = [{"image": f"p{number}.png", "id": number} for number in range(2)]
    pd.DataFrame(records).to_csv(folder / "a.tsv", sep="\t", index=False)
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stored = [{"image": {"bytes": (folder / each["image"]).read_bytes(), "path": each["image"]}} for each in records]
    stored = [{**each, "id": str(number)} for number, each in enumerate(stored)]
    Dataset.from_list(stored).to_parquet(folder / "a.parquet")
    found = []
    for name, output in (("a.tsv", "1.jsonl"), ("a.json", "2.csv"), ("a.jsonl", "3.parquet"), ("a.parquet", "4.jsonl")):
        result = call(folder / name, QUESTIONS[1], "--output", tmp_path / output)
        assert result.exit_code == 0, result.output
        reader = {".jsonl": lambda file: pd.read_json(file, lines=True, dtype={"id": str}), ".csv": read_csv}
        reader[".parquet"] = lambda file: pyarrow.parquet.read_table(file).to_pandas()
        table = reader[Path(output).suffix](tmp_path / output)
        found.append(table[["id", "image", "answer"]].values.tolist())
    assert found == [found[0]] * 4 and [row[:2] for row in found[0]] == [["0", "p0.png"], ["1", "p1.png"]]
    assert pyarrow.parquet.read_schema(tmp_path / "3.parquet").field("error").type == pyarrow.string()
    records = [{**record, "Prompt": "What?"} for record in records]
    (folder / "b.json").write_text(json.dumps(records))
    result = call(folder / "b.json", "What?", "--output", tmp_path / "b.csv")
    assert result.exit_code == 1 and "has questions of its own in its column 'Prompt'" in result.stderr
    result = call(folder / "a.json", "--output", tmp_path / "b.csv")
    assert result.exit_code == 1 and "has no column of questions" in result.stderr
    assert not (tmp_path / "b.csv.run").exists()


def test_cells(tmp_path):
    """Read by another reader: what a spreadsheet would run is marked in CSV alone, and all else is as it was."""
    texts = ["=SUM(A1)", "+1+1", "-2", "-1,5", "- no", "@x", "\t=1", 'a "b",\r\nc', "Läsion\u2028π", " =1", "", None]
    file, rows = tmp_path / "x.csv", [{"a": text, "b": 0.5} for text in texts]
    assert write_table(file, {"a": str, "b": float}, rows) == 5
    assert file.read_bytes().startswith(b"\xef\xbb\xbf") and not (tmp_path / ".x.csv.partial").exists()
    cells = [row[0] for row in csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=""))][1:]
    assert cells == [f"'{text}" if number in (0, 1, 4, 5, 6) else text or "" for number, text in enumerate(texts)]
    for name in ("x.jsonl", "x.parquet"):
        assert write_table(tmp_path / name, {"a": str, "b": float}, rows) == 0
    assert [json.loads(line)["a"] for line in (tmp_path / "x.jsonl").open(encoding="utf-8", newline="\n")] == texts
    assert pyarrow.parquet.read_table(tmp_path / "x.parquet")["a"].to_pylist() == texts


def test_what_is_done_is_not_done_again(folder, shipped, tmp_path, monkeypatch):
    """Cut in the middle of a record, the run goes on to the same file; then pictures go, come and change."""
    output, asked = tmp_path / "answers.csv", []
    ask = ManyPictures.ask

    def spy(self, pictures):
        asked.extend(pictures)
        return ask(self, pictures)

    monkeypatch.setattr(ManyPictures, "ask", spy)

    def run(**options):
        asked.clear()
        units, _ = units_in_folder(folder, QUESTIONS[:1])
        summary = answer_many(*shipped, units, output, command={"of": "a test"}, **options)
        return summary["errors"], len(asked)

    assert run() == (1, 6)
    whole, state = output.read_bytes(), tmp_path / "answers.csv.run"
    assert run() == (1, 0) and output.read_bytes() == whole
    lines = (state / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (state / "part-00000.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    (state / "predictions.jsonl").unlink()
    output.unlink()
    assert run() == (1, 6) and output.read_bytes() == whole

    (folder / "p0.png").unlink()
    shutil.copy(folder / "p1.png", folder / "p2.png")
    os.utime(folder / "p2.png", ns=(1, 1))
    random_image(64, 64).save(folder / "new.png")
    shutil.copy(folder / "p1.png", folder / "broken.png")
    assert run()[0] == 0
    table = read_csv(output).set_index("image")
    assert "p0.png" not in table.index and table["answer"]["p2.png"] == table["answer"]["p1.png"]
    assert table["answer"]["broken.png"] == table["answer"]["p1.png"] and table["answer"].notna().all()

    kept = output.read_bytes()
    with pytest.raises(ValueError, match=r"decoding.steps: .* there, 12 here"):
        run(steps=12)
    assert output.read_bytes() == kept


def test_what_is_refused_before_any_work(folder, tmp_path):
    (tmp_path / "mine.csv").write_text("a table of somebody")
    (tmp_path / "empty").mkdir()
    question, output = QUESTIONS[0], ["--output", tmp_path / "x.csv"]
    for words, code, message in (
        ([folder, question, "--output", tmp_path / "mine.csv"], 2, "is there, but no 'mine.csv.run' of its run"),
        ([folder, question, "--output", tmp_path / "x.xlsx"], 2, "its name must end in .csv or .jsonl or .parquet"),
        ([folder, question, "--output", tmp_path / "no/x.csv"], 2, "there is no folder"),
        ([folder, *output], 2, "QUESTION: missing; only a table may have the questions in it"),
        ([folder, " ", *output], 2, "QUESTION: it is empty"),
        ([folder, question], 2, "is a folder; it goes with --output"),
        ([folder / "p0.png", *QUESTIONS], 2, "2 given; several go with --output"),
        ([folder / "p0.png", question, "--batch-size", 4], 2, "--batch-size: 4; it goes with --output"),
        ([folder / "p0.png", question, "--montage", "4x3"], 2, "--montage: '4x3'; it goes with --output"),
        ([folder, question, *output, "--montage", "4"], 2, "'4'; allowed are COLUMNSxROWS, as 4x3"),
        ([folder, question, *output, "--where", tmp_path / "map.png"], 2, "it does not go with --output"),
        ([folder, question, *output, "--every", 2, "--frame", 1], 2, "--frame: 1; --every and --montage choose"),
        ([tmp_path / "gone", question, *output], 2, "there is no such file or folder"),
        ([tmp_path / "empty", question, *output], 1, "holds no pictures"),
    ):
        result = call(*words)
        assert result.exit_code == code and message in result.stderr, (words, result.output)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.csv", "empty", "pictures"}
    assert call(folder / "p0.png", question, *output).exit_code == 0
    result = call(folder / "p1.png", question, *output)
    assert result.exit_code == 1 and "holds a run with other settings (command.image" in result.stderr


@pytest.fixture
def studies(tmp_path):
    """A study of two series of CT slices in one folder, in no order by name, with a report; a volume; a film."""
    folder = tmp_path / "studies"
    (folder / "ct").mkdir(parents=True)
    for series in range(2):
        for place in range(5):
            pixels = np.full((8, 8 + 4 * series), 40 * place + 10 * series, np.uint16)
            data = dataset(pixels, ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 5.0 * place])
            data.SeriesInstanceUID, data.SeriesNumber = f"{SECRET_UID}.{series}", series
            data.WindowCenter, data.WindowWidth = 127.5, 256
            (folder / f"ct/{series}{(3 * place) % 5}.dcm").write_bytes(to_bytes(data))
    report = dataset(np.zeros((2, 2), np.uint8))
    for name in ("Rows", "Columns", "PixelData"):
        delattr(report, name)
    (folder / "ct/report.dcm").write_bytes(to_bytes(report))
    levels = np.broadcast_to(np.arange(7, dtype=np.float32), (6, 6, 7))
    nibabel.save(nibabel.Nifti1Image(levels, np.eye(4)), folder / "volume.nii.gz")
    frames = [Image.new("L", (8, 8), 60 * number) for number in range(4)]
    frames[0].save(folder / "film.tif", save_all=True, append_images=frames[1:])
    return folder


def test_slices(studies, tmp_path):
    """Every second slice, along the patient; the answer is that about the slice's own file."""
    result = call(studies, "What?", "--every", 2, "--output", tmp_path / "a.jsonl", "--window", "127.5/256")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert [(row["series"], row["image"], row["slice"]) for row in rows] == [
        *(("ct", f"ct/0{name}.dcm", place) for name, place in ((0, 0), (1, 2), (2, 4))),
        *(("ct (2)", f"ct/1{name}.dcm", place) for name, place in ((0, 0), (1, 2), (2, 4))),
        *(("film.tif", "film.tif", place) for place in (0, 2)),
        *(("volume.nii.gz", "volume.nii.gz", place) for place in (0, 2, 4, 6)),
    ]
    assert "ct/report.dcm\ta DICOM file without a picture" in (tmp_path / "a.jsonl.run/skipped.txt").read_text()
    for row in rows[4::3]:
        words = {"film.tif": ["--page", row["slice"]], "volume.nii.gz": ["--slice", row["slice"]]}.get(row["image"], [])
        alone = call(studies / row["image"], "What?", "--json", "--window", "127.5/256", *words)
        assert row["answer"] == json.loads(alone.stdout)["answer"]
    assert SECRET not in (tmp_path / "a.jsonl").read_text() + result.output


def test_a_study_as_one_picture(studies, tmp_path, monkeypatch):
    """Pixel by pixel: the slices of both series in order, spread over as many cells as there are."""
    seen = []
    ask = ManyPictures.ask
    monkeypatch.setattr(ManyPictures, "ask", lambda self, pictures: seen.extend(pictures) or ask(self, pictures))
    result = call(studies / "ct", "What?", "--montage", "3x2", "--output", tmp_path / "a.csv")
    assert result.exit_code == 0, result.output
    (row,) = read_csv(tmp_path / "a.csv").itertuples()
    assert row.image == "." and row.image_steps.startswith("6 of 10 slices, 3 a row: 0, 2, 4, 5, 7, 9 (from 0)")
    ((sheet, _),) = seen
    levels = [0, 80, 160, 10, 90, 170]
    cells = np.zeros((2, 8, 3, 12), int)
    for number, level in enumerate(levels):
        row, column = divmod(number, 3)
        cells[row, :, column, slice(2, 10) if number < 3 else slice(None)] = level
    assert np.abs(np.asarray(sheet)[..., 0].astype(int) - cells.reshape(16, 36)).max() <= 1
    (studies / "ct/00.dcm").write_bytes((studies / "ct/00.dcm").read_bytes()[:-20])
    result = call(studies / "ct", "What?", "--montage", "3x2", "--output", tmp_path / "a.csv")
    assert result.exit_code == 3 and read_csv(tmp_path / "a.csv")["answer"].isna().all()


def test_sets_of_answers(folder, shipped, tmp_path):
    (folder / "broken.png").unlink()
    output = tmp_path / "sets.parquet"
    result = call(folder, QUESTIONS[0], "--candidates", "Yes,No", "--output", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"rows": 6, "errors": 0, "marked": 0, "skipped": 2, "complete": True}
    for row in pyarrow.parquet.read_table(output).to_pylist():
        expected = answer_set(*shipped, read_medical_image(folder / row["image"]).image, QUESTIONS[0])
        assert (row["answer"], row["abstained"]) == (str(expected), expected.abstained)
        assert row["probability of Yes"] == pytest.approx(expected.probabilities["Yes"], abs=1e-6)
        assert row["warning"] == expected.warning


def test_a_class_for_batches_of_a_table(folder, single):
    """Without Ray: on a table of Arrow, and by `map` of `datasets`."""
    table = pyarrow.table({
        "image": ["p1.png", "gone.png", "more/p3.png", "p1.png"],
        "question": [QUESTIONS[0], "What?", QUESTIONS[1], QUESTIONS[1]], "patient": [1, 2, 3, 4],
    })  # fmt: skip
    answerer = PictureAnswerer(image_folder=folder, batch_size=3)
    found = answerer(table)
    assert found.select(table.column_names) == table
    mapped = Dataset(table).with_format("arrow").map(answerer, batched=True, batch_size=3).with_format(None)
    assert mapped["answer"] == found["answer"].to_pylist() and mapped["error"] == found["error"].to_pylist()
    for row in found.to_pylist():
        if row["image"] == "gone.png":
            assert row["answer"] is None and "no such image file" in row["error"]
        else:
            assert row["answer"] == single(folder / row["image"], row["question"]).text and row["error"] is None
    with pytest.raises(ValueError, match="is its question; such are called"):
        answerer(table.drop_columns("question"))
    with pytest.raises(ValueError, match=r"has columns \['answer'\], as the answers have"):
        answerer(table.append_column("answer", [["", "", "", ""]]))


# Processes of their own

COMMAND = [sys.executable, "-m", "lladamedv.cli", "ask"]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(folder, tmp_path):
    """Killed three times, then finished by two processes: the file is that of one undisturbed run."""
    for number, example in enumerate(PhantomVQA(1, 40, ("description",))):
        example.image.save(folder / f"q{number}.png")
    words = [str(folder), *QUESTIONS, "--batch-size", "2", "--output"]
    plain, killed = tmp_path / "plain.csv", tmp_path / "killed.csv"
    assert subprocess.run([*COMMAND, *words, plain], capture_output=True).returncode == 3
    state = tmp_path / "killed.csv.run"
    for seed in range(3):
        process = subprocess.Popen([*COMMAND, *words, killed], stderr=subprocess.DEVNULL)
        sizes = {path: path.stat().st_size for path in state.glob("part-*")}
        while {path: path.stat().st_size for path in state.glob("part-*")} == sizes and process.poll() is None:
            time.sleep(0.02)
        time.sleep(random.Random(seed).uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not killed.exists()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    result = subprocess.run([*launch, *COMMAND[2:], *words, killed], capture_output=True, text=True)
    assert killed.read_bytes() == plain.read_bytes(), result.stderr
    assert result.stderr.count("reading ") == 1


@pytest.mark.slow
def test_the_first_line_comes_before_pytorch(folder, tmp_path):
    program = (
        "import sys; from lladamedv import cli; real = cli.quiet\n"
        "cli.quiet = lambda: print('torch' in sys.modules, file=sys.stderr) or real()\n"
        "cli.app(sys.argv[1:])"
    )
    words = ["ask", folder, "What?", "--output", tmp_path / "x.csv"]
    result = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True)
    assert result.stderr.splitlines()[:2] == [f"reading {folder}", "False"]


@pytest.mark.slow
def test_on_ray(folder, single, tmp_path):
    """A local Ray: partitions that are there are not done again, and all rows have the answers of single calls."""
    pytest.importorskip("ray")
    questions, answers = tmp_path / "questions", tmp_path / "answers"
    questions.mkdir()
    stored = {"bytes": (folder / "p0.png").read_bytes(), "path": "p0.png"}
    tables = [[{"image": stored, "question": text} for text in QUESTIONS], [{"image": stored, "question": "What?"}] * 3]
    for number, rows in enumerate(tables):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), questions / f"part{number}.parquet")
    script = Path(__file__).parents[1] / "examples" / "ray_data.py"
    command = [sys.executable, str(script), str(questions), str(answers)]
    environment = os.environ | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AUTH_MODE": "disabled"}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.endswith("2 partitions, 5 rows, 0 of them with an error instead of an answer\n")
        found = [pyarrow.parquet.read_table(answers / f"part{number}").to_pylist() for number in range(2)]
        for row in (row for rows in found for row in rows):
            assert row["answer"] == single(folder / "p0.png", row["question"]).text
        kept = answers / "part0"
        stamp = kept.stat().st_mtime_ns
        shutil.rmtree(answers / "part1", ignore_errors=True)
    assert kept.stat().st_mtime_ns == stamp and len(found[0]) == 2
    refused = subprocess.run([*command, "--batch-size", "2"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "holds answers with other settings" in refused.stderr
