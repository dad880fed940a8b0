"""`lladamedv ask FOLDER --output …` against one process per picture, in one run: pictures a second, and CPU seconds.

    python benchmarks/many_pictures.py --pictures 400 --alone 6 --repeats 3 --json results.json

Both ask the demo model the same question about the same phantoms, with all that it takes: start, loading, reading,
answers and table. They take turns. The answers must be the same. A third command asks three questions about each
picture; then the answers of pictures that are already in memory, without a process, for some batch sizes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lladamedv.loading import load_model
from lladamedv.many import ManyPictures
from lladamedv.processing.phantoms import PhantomVQA


ASK = [sys.executable, "-m", "lladamedv.cli", "ask"]
QUESTIONS = ["Describe the image.", "Is there a lesion?", "Which modality is this?"]


def timed(command: list) -> tuple[str, float, float]:
    """What a command prints, and its wall and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    printed = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return printed, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(folder: Path, pictures: list[Path], alone: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds a picture of each way, once in turns."""
    output = folder.parent / "answers.jsonl"
    single = [timed([*ASK, picture, QUESTIONS[0], "--json"]) for picture in pictures[:alone]]
    result = {"one process per picture": tuple(sum(each) / alone for each in list(zip(*single))[1:])}
    for name, questions in (("one command", QUESTIONS[:1]), ("one command, three questions", QUESTIONS)):
        _, *seconds = timed([*ASK, folder, *questions, "--output", output, "--batch-size", 32])
        result[name] = tuple(each / len(pictures) for each in seconds)
        answers = [json.loads(line)["answer"] for line in output.open()][:: len(questions)]
        assert answers[:alone] == [json.loads(printed)["answer"] for printed, *_ in single]
        output.unlink()
        for file in (folder.parent / "answers.jsonl.run").iterdir():
            file.unlink()
    return result


def in_memory(examples, batch_sizes: list[int]) -> dict[str, tuple[float, float]]:
    """The same of answers alone."""
    model, processor = load_model()
    asked, result = [(example.image, QUESTIONS[:1]) for example in examples], {}
    ManyPictures(model, processor).ask(asked[:4])
    for batch_size in batch_sizes:
        wall, cpu = time.perf_counter(), time.process_time()
        ManyPictures(model, processor, batch_size=batch_size).ask(asked)
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        result[f"in memory, batches of {batch_size}"] = tuple(each / len(asked) for each in seconds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--alone", type=int, default=6, help="of them, asked about by a process each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    examples = list(PhantomVQA(9_000, args.pictures, ("description",)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        pictures = [folder / f"{number:05}.png" for number in range(len(examples))]
        for example, picture in zip(examples, pictures):
            example.image.save(picture)
        runs = [
            compare(folder, pictures, args.alone) | in_memory(examples, args.batch_sizes) for _ in range(args.repeats)
        ]
    print(f"{'':32}{'pictures/s':>12}{'wall s each':>13}{'CPU s each':>12}")
    for name in runs[0]:
        wall, cpu = (statistics.median(run[name][place] for run in runs) for place in (0, 1))
        print(f"{name:32}{1 / wall:12.2f}{wall:13.3f}{cpu:12.3f}")
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
