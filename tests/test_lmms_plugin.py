"""The lmms-eval plug-in: its options, its task files, and with lmms-eval itself a whole evaluation.

The last part is skipped unless lmms-eval is installed, which belongs into an environment of its own: it brings some 75
packages, an older python-dateutil, and a torchvision that must be built for the torch that is there. In that
environment `pip install -c constraints.txt ".[lmms,test]"`, then `python -m pytest tests/test_lmms_plugin.py`. (With a
torch for CPUs and a torchvision from PyPI: `pip uninstall torchvision timm`; neither is needed here.)
"""

import hashlib
import importlib
import io
from functools import partial
from pathlib import Path

import datasets
import evaluate
import pytest
import yaml
from PIL import Image

import lladamedv.demo
from lladamedv import LLaDAMedVGenerationConfig
from lladamedv.evaluation.lmms import TASKS, options, task_functions
from lladamedv.processing.phantoms import PhantomVQA


METRIC = Path(__file__).parents[1] / "evaluation" / "medical_vqa"
DEMO = f"pretrained={lladamedv.demo.DEMO_MODEL},max_new_tokens=24,block_length=8"


# Options


@pytest.mark.parametrize(
    "given, parsed",
    [({}, {"max_new_tokens": 64, "block_length": 64, "steps": 64}),
     ({"max_new_tokens": 32}, {"max_new_tokens": 32, "block_length": 32, "steps": 32}),
     ({"block_length": 16, "steps": 8}, {"max_new_tokens": 64, "block_length": 16, "steps": 8}),
     ({"steps": "32"}, {"steps": 32}), ({"steps": 32.0}, {"steps": 32}), ({"use_cache": "True"}, {"use_cache": True}),
     ({"stop_strings": "\n\n"}, {"stop_strings": "\n\n"}), ({"stop_strings": '"3"'}, {"stop_strings": "3"})],
)  # fmt: skip
def test_options_are_values_or_texts_and_by_default_the_papers(given, parsed):
    found = options.parse_generation_options(given)
    assert {name: (found[name], type(found[name])) for name in parsed} == {
        name: (value, type(value)) for name, value in parsed.items()
    }


@pytest.mark.parametrize(
    "name, value",
    [("gen_length", 64), ("return_dict_in_generate", True), ("steps", 0), ("steps", "many"), ("steps", 2.5)],
)
def test_refused_options(name, value):
    with pytest.raises(ValueError, match=f"{name}`? is .*allowed (are|is)") as error:
        options.parse_generation_options({name: value}, others=("pretrained",))
    if name == "gen_length":
        assert all(f"'{known}'" in str(error.value) for known in ("pretrained", *options.GENERATION_OPTIONS))


def test_every_option_of_generate_is_one_here_or_changes_no_answer():
    everything = {name for name in vars(LLaDAMedVGenerationConfig()) if not name.startswith("_")}
    assert everything - set(options.GENERATION_OPTIONS) == {
        "abstention_threshold", "compile_config", "confidence_temperature", "output_cache_drift", "output_history",
        "output_image_reliance", "return_dict_in_generate", "transformers_version",
    }  # fmt: skip


def test_generation_arguments_of_tasks_give_way():
    in_force = {"max_new_tokens": 64, "temperature": 0.0, "do_sample": False}
    arguments = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "top_p": None, "until": ["\n"]}
    assert options.ignored_arguments(arguments, in_force) == {"max_new_tokens": 16}
    assert options.ignored_arguments({"top_p": 0.9, "temperature": None}, in_force) == {"top_p": 0.9}
    with pytest.raises(ValueError, match=r"`steps` is 1 .*--model_args"):
        options.ignored_arguments({"steps": 1}, in_force)


@pytest.mark.parametrize(
    "until, expected",
    [(None, "Yes, it is.\nNo, no."), ([], "Yes, it is.\nNo, no."), ("\n", "Yes, it is."), (",", "Yes"),
     (["\n", ","], "Yes"), ([",", "\n"], "Yes"), (["", "Yes"], "")],
)  # fmt: skip
def test_until(until, expected):
    assert options.cut_at("Yes, it is.\nNo, no.", until) == expected


# Tasks


class _Loader(yaml.SafeLoader):
    pass


def _function(loader, node):
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)


_Loader.add_constructor("!function", _function)


def load_task(path: Path) -> dict:
    config = yaml.load(path.read_text(), _Loader)
    return (load_task(path.parent / config.pop("include")) if "include" in config else {}) | config


TASK_FILES = {path.stem: load_task(path) for path in sorted(TASKS.glob("*.yaml"))}
GROUP = TASK_FILES.pop("lladamedv_vqa")
METRICS = load_task(TASKS / "_medical_vqa_yaml")["metric_list"]
AGGREGATIONS = {metric["metric"]: metric["aggregation"] for metric in METRICS}


@pytest.mark.parametrize("name", TASK_FILES)
def test_task_files(name):
    task = TASK_FILES[name]
    assert name in GROUP["task"] and len(GROUP["task"]) == len(TASK_FILES)
    assert task["task"] == name and task["test_split"] == "test" and "/" in task["dataset_path"]
    scores = [score for scores in task_functions.SCORES.values() for score in scores]
    assert sorted(metric["metric"] for metric in task["metric_list"]) == sorted([*scores, *task_functions.COUNTS])
    assert all(callable(metric["aggregation"]) for metric in task["metric_list"])
    assert task["process_docs"] is task_functions.process_docs
    assert task["process_results"] is task_functions.process_results
    assert task["generation_kwargs"]["until"] == []  # left out, lmms-eval would end answers at a blank line
    assert options.ignored_arguments(task["generation_kwargs"], options.parse_generation_options({}) | {
        "temperature": 0.0, "do_sample": False}) == {}  # fmt: skip


def scores_of(items) -> dict:
    """What lmms-eval makes of `(prediction, answer, answer_type)`."""
    results = [
        task_functions.process_results({"answer": answer, "answer_type": kind, "image_id": "a"}, [prediction])
        for prediction, answer, kind in items
    ]
    assert all(result.keys() == AGGREGATIONS.keys() for result in results)
    return {name: aggregate([result[name] for result in results]) for name, aggregate in AGGREGATIONS.items()}


def test_each_score_is_about_its_own_questions():
    scores = scores_of(
        [("left left left", "left lung", "open"), ("Yes", "yes", "closed"), ("liver", "liver", "open"),
         (" \n", "no", "closed"), ("Yes", "no", "closed")]
    )  # fmt: skip
    assert scores["open_recall"] == (0.5 + 1) / 2 and scores["open_recall_llava_med"] == (0.75 + 1) / 2
    assert scores["closed_accuracy"] == 1 / 3 and [scores[name] for name in task_functions.COUNTS] == [2, 3, 1]
    scores = scores_of([("The right lower lobe", "Right lower lobe", "open")])
    assert scores["open_exact_match"] == 1 and {scores[name] for name in scores if name[:6] == "closed"} == {None}


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def table(**columns) -> datasets.Dataset:
    columns = {"question": [" Where? "] * 3, "answer": ["Liver ", "No", "yes"], **columns}
    files = [{"bytes": png(color), "path": None} for color in ("red", "blue", "red")]
    return datasets.Dataset.from_dict({"image": files, **columns}).cast_column("image", datasets.Image())


def test_docs_of_tables_with_and_without_types_and_names():
    docs = task_functions.process_docs(table(answer_type=["OPEN", "OPEN ", "CLOSED"], img_id=[7, 8, 7]))
    assert docs["question"][0] == "Where?" and docs["answer"][0] == "Liver"
    assert list(docs["answer_type"]) == ["open", "open", "closed"] and list(docs["image_id"]) == ["7", "8", "7"]
    assert docs[1]["image"].getpixel((0, 0)) == (0, 0, 255)
    docs = task_functions.process_docs(table())
    assert list(docs["answer_type"]) == ["open", "closed", "closed"]
    assert list(docs["image_id"]) == [hashlib.sha256(png(color)).hexdigest() for color in ("red", "blue", "red")]


@pytest.mark.parametrize(
    "columns, message",
    [({"answer": ["a", " ", "b"]}, "row 1 has no answer"), ({"answer": ["a", "b", None]}, "row 2 has no answer"),
     ({"question": ["a", "b", ""]}, "row 2 has no question"),
     ({"answer_type": ["OPEN", "CLOSED", "other"]}, "row 2 has no answer type")],
)  # fmt: skip
def test_incomplete_docs(columns, message):
    with pytest.raises(ValueError, match=message):
        task_functions.process_docs(table(**columns))


# With lmms-eval


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A folder with a task about 11 phantoms, and their answers as given and scored without lmms-eval."""
    pytest.importorskip("lmms_eval")
    folder = tmp_path_factory.mktemp("tasks")
    examples = list(PhantomVQA(9_001, 11, kinds=("closed", "open")))
    rows = [{"image": example.image, "question": example.question, "answer": example.answer,
             "answer_type": example.kind.upper(), "image_name": f"{number // 2}.png"}
            for number, example in enumerate(examples)]  # fmt: skip
    features = {name: datasets.Value("string") for name in rows[0]} | {"image": datasets.Image()}
    datasets.Dataset.from_list(rows, datasets.Features(features)).to_parquet(folder / "phantoms.parquet")
    task = {
        "include": str(TASKS / "_medical_vqa_yaml"), "task": "phantoms", "dataset_path": "parquet",
        "test_split": "test", "dataset_kwargs": {"data_files": {"test": str(folder / "phantoms.parquet")},
        "cache_dir": str(folder)},
    }  # fmt: skip
    (folder / "phantoms.yaml").write_text(yaml.dump(task))
    model, processor = lladamedv.demo.load_model()
    ask = partial(lladamedv.demo.answer, model, processor, max_new_tokens=24, block_length=8, steps=3)
    answers = [ask([example.messages()])[0] for example in examples]
    metric = evaluate.load(str(METRIC), cache_dir=str(folder))
    return folder, answers, metric.compute(predictions=answers, references=rows)


@pytest.fixture
def run(phantoms):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def run(model_args: str = f"{DEMO},steps=3", **arguments) -> dict:
        manager = TaskManager(include_path=str(phantoms[0]), include_defaults=False)
        return simple_evaluate(
            "llada_medv", model_args, tasks=["phantoms"], task_manager=manager, device="cpu", **arguments
        )

    return run


@pytest.fixture
def asked(run, monkeypatch):
    """The numbers of questions of the batches that the model was asked."""
    from lladamedv.evaluation.lmms import model

    batches, answer_batch = [], model.answer_batch

    def counted(model, processor, chats, **arguments):
        batches.append(len(chats))
        return answer_batch(model, processor, chats, **arguments)

    monkeypatch.setattr(model, "answer_batch", counted)
    return batches


def test_lmms_eval_gives_the_same_answers_and_scores(phantoms, run, asked):
    _, answers, expected = phantoms
    results = run(batch_size=4)
    assert asked == [4, 4, 3]
    samples = sorted(results["samples"]["phantoms"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == [[answer] for answer in answers]
    scores = results["results"]["phantoms"]
    assert 0 < expected["num_open"] and 0 < expected["num_closed"]
    for name in AGGREGATIONS:
        scale = 1 if name.startswith("num_") else 100
        assert scale * scores[f"{name},none"] == pytest.approx(expected[name]), name


def test_the_response_cache_tells_numbers_of_steps_apart(run, asked, tmp_path):
    """As model arguments; among generation arguments, which it does not look at, they are refused."""
    cache = partial(run, use_cache=str(tmp_path), batch_size=8)
    cache()
    cache()
    assert sum(asked) == 11
    cache(f"{DEMO},steps=6")
    assert sum(asked) == 22
    with pytest.raises(ValueError, match="`steps` is 6"):
        run(gen_kwargs="steps=6")
    assert sum(asked) == 22


@pytest.fixture
def lmms_model(phantoms):
    from lladamedv.evaluation.lmms.model import LLaDAMedV

    model = LLaDAMedV.create_from_arg_string(f"{DEMO},steps=3", {"device": "cpu", "batch_size": "2"})
    docs = datasets.load_dataset("parquet", data_files=str(phantoms[0] / "phantoms.parquet"), cache_dir=phantoms[0])
    model.task_dict = {"phantoms": {"test": docs["train"]}}
    return model


def request(number: int, kind: str = "image", **generation_arguments):
    from lmms_eval.api.instance import Instance

    def messages(doc):
        content = [{"type": kind, "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": content}]

    arguments = ("", messages, generation_arguments, number, "phantoms", "test")
    return Instance("generate_until", arguments, 0, {"task": "phantoms", "doc_id": number, "repeats": 1})


def test_requests_are_answered_in_their_order_and_model_arguments_win(phantoms, lmms_model):
    from loguru import logger

    warnings = []
    sink = logger.add(warnings.append, level="WARNING")
    order = [5, 0, 9, 2, 7]
    requests = [request(number, max_new_tokens=1, temperature=0) for number in order]
    requests[0].args[2]["until"] = phantoms[1][5][1]
    results = lmms_model.generate_until(requests)
    logger.remove(sink)
    assert [result.text for result in results] == [phantoms[1][5][0], *(phantoms[1][number] for number in order[1:])]
    assert all(result.token_counts.output_tokens > 0 for result in results)
    assert sum("{'max_new_tokens': 1}" in warning for warning in warnings) == 1


def test_questions_about_videos_are_refused(lmms_model):
    with pytest.raises(ValueError, match=r"`phantoms` asks about .*video"):
        lmms_model.generate_until([request(0, kind="video")])


@pytest.mark.parametrize("argument", ["gen_length=64", "dtype=int8", "batch_size=auto", "batch_size=0", "steps=0"])
def test_model_arguments_are_checked_before_anything_is_loaded(argument):
    pytest.importorskip("lmms_eval")
    from lladamedv.evaluation.lmms.model import LLaDAMedV

    with pytest.raises(ValueError, match=f"`{argument.partition('=')[0]}` is .*allowed"):
        LLaDAMedV.create_from_arg_string(f"pretrained=nowhere,{argument}")
