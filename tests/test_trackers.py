"""What arrives at TensorBoard, trackio and Weights & Biases, read back from their own files, without a network."""

import json
import math
import sqlite3
import struct
import subprocess
import sys

import pytest

from lladamedv.trainers import MaskedDiffusionSFTConfig, sft
from tests.test_train_command import flags


# What each method is watched by, as trackers call it.
METHODS = {
    "sft": ("phantoms:1:8", {"train/mean_token_accuracy"}, {"eval/mean_token_accuracy"}),
    "dpo": ("phantoms:1:8:closed", {"train/rewards/margins", "train/rewards/accuracies"}, {"eval/rewards/margins"}),
    "grpo": ("phantoms:1:8:closed", {"train/reward", "train/rewards/choice/mean", "train/kl"}, {"eval/reward"}),
}
# Logged once at the end, of which trackio keeps none.
AT_THE_END = {"train_runtime", "train_loss", "total_flos", "train_samples_per_second", "train_steps_per_second"}


def from_tensorboard(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = folder.glob("runs/*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return scalars, "".join(each for name in events.Tags()["tensors"] for event in events.Tensors(name)
                            for each in map(bytes.decode, event.tensor_proto.string_val))  # fmt: skip


def from_trackio(folder):
    (file,) = (folder / "trackio").glob("own*.db")
    rows = [json.loads(text) for (text,) in sqlite3.connect(file).execute("SELECT metrics FROM metrics ORDER BY id")]
    return collected(rows)


def from_wandb(folder):
    """W&B keeps an offline run in LevelDB's log format, a record in pieces of blocks of 32 KiB."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    import wandb

    wandb.teardown()  # waits until all is written
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, pieces, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # no room for a header
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)  # checksum, length, whole (1) or last (4) or not
        pieces, place = pieces + data[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):
            items, pieces = records.Record.FromString(pieces).history.item, b""
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return collected(rows)


def collected(rows):
    scalars, texts = {}, ""
    for name, value in (item for row in rows for item in row.items()):
        if isinstance(value, str):
            texts += value
        elif isinstance(value, (int, float)):
            scalars.setdefault(name, []).append(value)
    return scalars, texts


TRACKERS = {"tensorboard": from_tensorboard, "trackio": from_trackio, "wandb": from_wandb}
SLOW = pytest.mark.slow  # W&B starts a process of its own


@pytest.mark.parametrize(
    ("tracker", "method"),
    [("tensorboard", "grpo"), ("trackio", "dpo"), pytest.param("wandb", "sft", marks=SLOW)],
)
def test_what_arrives(tmp_path, monkeypatch, tracker, method):
    pytest.importorskip(tracker)
    if tracker == "trackio":  # which reads TRACKIO_DIR when it is imported, by whomever
        import trackio

        for name, module in [*sys.modules.items()]:
            if name.startswith(trackio.__name__) and hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    data, *names = METHODS[method]
    options = {"method": method, "train_data": data, "eval_data": data, "eval_strategy": "steps", "eval_steps": 1}
    if method == "grpo":
        options |= {"reward_funcs": ["choice"], "num_generations": 4, "max_completion_length": 8, "beta": 0.1}
    words = flags(**options, report_to=tracker, project="own", log_answers=2, output_dir=tmp_path)
    trainer, _ = sft.build_trainer(*sft.make_parser(method).parse_args_and_config(words))
    trainer.train()
    scalars, texts = TRACKERS[tracker](tmp_path)
    assert set.union(*names, {"train/loss", "train/learning_rate", "eval/loss", "eval/answer_accuracy"}) <= set(scalars)
    for name in {name for entry in trainer.state.log_history for name in entry} - AT_THE_END - {"step", "epoch"}:
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        shown = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        assert len(logged) == len(scalars[shown])
        assert all(math.isclose(*each, rel_tol=1e-5, abs_tol=1e-9) for each in zip(logged, scalars[shown]))
    # Answers as text; pictures stay on this machine.
    assert "| 2 | phantoms/1/0 |" in texts and "data:image" not in texts
    kinds = {file.suffix for file in tmp_path.rglob("*") if {"runs", "trackio", "wandb"} & set(file.parts)}
    assert not kinds & {".png", ".jpg", ".html"}


def test_nothing_is_reported_without_being_asked(tmp_path):
    assert MaskedDiffusionSFTConfig(str(tmp_path), use_cpu=True, bf16=False).report_to == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "--report_to is 'tensorbord'; allowed are none, all, .*tensorboard, trackio, wandb"),
        ("trackio", r"--report_to is 'trackio', whose package is not installed; .*pip install .lladamedv\[trackio\]"),
        ("comet_ml", "--report_to is 'comet_ml', whose package is not installed; .*pip install comet_ml"),
    ],
)
def test_a_tracker_that_is_not_there(tmp_path, monkeypatch, name, message):
    """Said before a model is looked for."""
    monkeypatch.setattr(sft, "get_available_reporting_integrations", list)
    options = {"train_data": "phantoms:1:8", "report_to": name, "model_name_or_path": "none/at-all"}
    with pytest.raises(SystemExit, match=message):
        sft.main(flags(**options, output_dir=tmp_path))


@pytest.mark.slow
def test_wandb_without_a_key(tmp_path):
    pytest.importorskip("wandb")
    words = flags(train_data="phantoms:1:8", report_to="wandb", model_name_or_path="none/at-all", output_dir=tmp_path)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "lladamedv.trainers.sft", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "--report_to is 'wandb', which is not logged in: no API key is known. Run wandb login" in result.stderr
