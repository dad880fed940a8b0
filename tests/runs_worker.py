"""A run for the tests of `evaluation/runs.py`, to be started alone or as several processes, and killed.

    python tests/runs_worker.py FOLDER ITEMS BATCH_SIZE [SECONDS_PER_BATCH [PLACE_THAT_FAILS]]
"""

import os
import sys
import time
from pathlib import Path

from lladamedv.evaluation.runs import process_state, run_items


def main(folder: str, items: str, batch_size: str, seconds: str = "0", failing: str = "-1") -> None:
    def answer(places):
        if int(failing) in places:
            raise OSError(f"no answer to {failing}")
        time.sleep(float(seconds))
        with (Path(folder).parent / "asked.txt").open("a") as file:
            file.writelines(f"{place} {os.getpid()}\n" for place in places)
        return [{"id": f"item-{place}", "square": place**2} for place in places]

    records = run_items([f"item-{place}" for place in range(int(items))], answer, folder, {"a": 1}, int(batch_size))
    assert [record["square"] for record in records] == [place**2 for place in range(int(items))]
    process_state().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
