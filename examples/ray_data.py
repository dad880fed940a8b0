"""Questions about many pictures on one machine or many, with Ray Data: Parquet in, Parquet out, resumable by partition.

    pip install "lladamedv[ray]"
    python examples/ray_data.py questions answers --model path/or/hub-id --workers 8

`questions` is a folder of .parquet files with columns of images (bytes as `datasets` stores them, or names of files in
the folder) and of questions. Each file becomes a folder of its name in `answers`, with the answers behind its columns.
A file whose folder is there is done: stopped at any moment, the same command goes on with the others. On a cluster,
where `ray job submit` runs it, all machines must share both folders.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import ray

from lladamedv.many import PictureAnswerer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--batch-size", type=int, default=8, help="questions in work at a time, in each worker")
    parser.add_argument("--options", type=json.loads, default={}, help="of generate, as a JSON object")
    args = parser.parse_args()
    files = sorted(args.questions.absolute().glob("*.parquet"))
    if not files:
        parser.error(f"{str(args.questions)!r} holds no .parquet files.")
    args.answers.mkdir(parents=True, exist_ok=True)
    own = {"model": args.model, "batch_size": args.batch_size, "image_folder": str(args.questions.absolute())}
    own |= args.options
    settings, file = json.dumps(own), args.answers / "settings.json"
    if file.exists() and file.read_text() != settings:
        parser.error(f"{str(args.answers)!r} holds answers with other settings: {file.read_text()}")
    file.write_text(settings)
    for partition in files:
        done, unfinished = args.answers.absolute() / partition.stem, args.answers.absolute() / f".{partition.stem}"
        if done.exists():
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        answered = ray.data.read_parquet(str(partition)).map_batches(
            PictureAnswerer, fn_constructor_kwargs=own, batch_format="pyarrow", batch_size=16 * args.batch_size,
            num_gpus=args.gpus, compute=ray.data.ActorPoolStrategy(size=args.workers),
        )  # fmt: skip
        answered.write_parquet(str(unfinished))
        unfinished.replace(done)
    errors = ray.data.read_parquet([str(args.answers / each.stem) for each in files], columns=["error"])
    failed = errors.filter(lambda row: row["error"] is not None).count()
    print(f"{len(files)} partitions, {errors.count()} rows, {failed} of them with an error instead of an answer")


if __name__ == "__main__":
    main()
