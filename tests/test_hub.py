"""Pushing models, adapters and data sets to a Hub over HTTP, and loading them from there without this package."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lladamedv import LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv.cli import app
from lladamedv.demo import DEMO_MODEL, load_model
from lladamedv.hub_cards.push import push_dataset, push_folder
from lladamedv.processing.datasets import load_vqa
from lladamedv.trainers import MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer
from lladamedv.trainers.data import DataSource, load_dataset_mixture
from tests.hub_folders import contents, state, write_adapter, write_card, write_model
from tests.hub_stub import running_hub, take_for_the_hub
from tests.stranger import run_as_stranger
from tests.tiny import image_prompt, random_image


ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"


def quiet(line):
    pass


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A model's folder; do not change it."""
    return write_model(tmp_path_factory.mktemp("complete") / "model")


@pytest.fixture
def folder(tmp_path, complete):
    """A model's folder to change."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name, data in contents(complete).items():
        (copy / name).write_bytes(data)
    return copy


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as hub:
        take_for_the_hub(hub, monkeypatch, tmp_path / "home")
        yield hub


def push(folder, repo="me/model", **options):
    return push_folder(folder, repo, report=quiet, **options)


# Models


def test_a_folder_becomes_one_private_commit(hub, complete):
    before, lines = state(complete), []
    plan = push_folder(complete, "model", report=lines.append)  # without an owner it is one's own
    assert plan.repo == "me/model" and plan.kind == "model" and plan.url.endswith(hub.commit("me/model"))
    assert hub.repos["me/model"] == contents(complete) and hub.private["me/model"] is True
    assert hub.commits == ["me/model"] and len(hub.uploads) == 1
    assert plan.files == {name: len(data) for name, data in contents(complete).items()}
    assert lines[-1].startswith(f"pushed to {hub.url}/me/model: model me/model: {len(plan.files)} files")
    assert state(complete) == before

    again = push(complete)
    assert hub.commits == ["me/model"] and len(hub.uploads) == 1, "what is there is not sent again"
    assert again.url == plan.url


def test_a_dry_run_lists_and_makes_no_request(hub, complete):
    lines = []
    plan = push_folder(complete, "me/model", dry_run=True, report=lines.append)
    assert not hub.requests and plan.url is None
    size = (complete / WEIGHTS).stat().st_size
    assert f"{size:>14,}  {WEIGHTS}" in lines and "nothing was sent" in lines[-1]
    assert f"{sum(plan.files.values()) / 1e6:.1f} MB" in lines[-1]


def test_stale_files_go_in_the_same_commit(hub, complete, tmp_path):
    """One file of weights left beside new shards would be loaded instead of them."""
    shards = write_model(tmp_path / "shards", max_shard_size="2MB")
    push(complete)
    hub.repos["me/model"] |= {"old_lladamedv.py": b"", "figure.webp": b"theirs", ".gitattributes": b"theirs"}
    push(shards)
    assert len(hub.commits) == 2
    theirs = {"figure.webp": b"theirs", ".gitattributes": b"theirs"}
    assert hub.repos["me/model"] == contents(shards) | theirs
    push(complete)
    assert hub.repos["me/model"] == contents(complete) | theirs


def test_a_branch(hub, complete):
    push(complete)
    main = dict(hub.repos["me/model"])
    hub.repos["me/model"] |= {"README.md": b"---\nlicense: mit\n---\nOther"}
    main["README.md"] = hub.repos["me/model"]["README.md"]
    push(complete, revision="v2")
    assert hub.repos["me/model"] == main and hub.branches["me/model"]["v2"] == contents(complete)


def test_repositories_of_another_kind(hub, complete, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", "me/model")
    hub.repos |= {
        "me/bert": {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"1", ".gitattributes": b"2"},
        "me/notes": {"notes.csv": b"3"},
        "me/new": {"README.md": b"---\nlicense: mit\n---\n", ".gitattributes": b"4"},
    }
    hub.private |= dict.fromkeys(hub.repos, True)
    push(complete)
    before = {name: dict(files) for name, files in hub.repos.items()}
    for repo, pushed, there in (
        ("me/model", adapter, "holds model, not adapter"),
        ("me/bert", complete, "holds a model of type 'bert', not model"),
        ("me/notes", complete, "holds other files, not model"),
    ):
        with pytest.raises(ValueError, match=rf"`repo` is '{repo}', which {there}; `replace` deletes"):
            push(pushed, repo)
    assert hub.repos == before and hub.commits == ["me/model"]
    push(complete, "me/new")
    push(complete, "me/bert", replace=True)
    assert hub.repos["me/bert"] == contents(complete) | {".gitattributes": b"2"}


def test_nothing_private_becomes_public_by_mistake(hub, complete):
    hub.repos["me/model"], hub.private["me/model"] = {}, False
    with pytest.raises(ValueError, match=r"'me/model', which is public; allowed with `private=False` \(--public\)"):
        push(complete)
    assert hub.repos["me/model"] == {} and not hub.commits
    push(complete, private=False)
    push(complete, "me/open", private=False)
    assert hub.private["me/open"] is False and hub.repos["me/model"] == hub.repos["me/open"]


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


def drop_auto_class(folder, name):
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    edit_json(folder / "config.json", auto_map={key: value for key, value in auto_map.items() if key != name})


TOKEN = "hf_" + "aB3" * 12
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "README.md").unlink(), "README.md is missing"),
        (lambda f: (f / "README.md").write_text("# No front matter"), "README.md is no card"),
        (lambda f: drop_auto_class(f, "AutoModel"), "config.json lacks AutoModel"),
        (lambda f: edit_json(f / "processor_config.json", auto_map={}), "processor_config.json lacks AutoProcessor"),
        (lambda f: edit_json(f / "config.json", model_type="llava_llada"), "a model of type 'llava_llada'"),
        (lambda f: (f / "modeling_lladamedv.py").unlink(), "names modeling_lladamedv.py, which is missing"),
        (lambda f: (f / "modeling_lladamedv.py").write_text("X = 1"), "which modeling_lladamedv.py has not"),
        (lambda f: (f / "repetition_lladamedv.py").unlink(), "imports repetition_lladamedv.py, which is missing"),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is no JSON"),
        (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config.json is no JSON object"),
        (lambda f: edit_json(f / "config.json", auto_map=["x"]), "`auto_map` in config.json lacks AutoConfig"),
        (lambda f: edit_json(f / "config.json", auto_map={"AutoModel": ["x"]}), "in config.json lacks AutoModel"),
        (lambda f: edit_json(f / "processor_config.json", auto_map=5), "in processor_config.json lacks AutoProcessor"),
        (lambda f: (f / INDEX).write_text('{"metadata": [1], "weight_map": {}}'), f"`metadata` in {INDEX} is no JSON"),
        (lambda f: (f / "notes.txt").write_bytes(b"\xff"), "notes.txt is not UTF-8"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]), "cannot be read: cut off"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"0"), "cannot be read: cut off"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no weights"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is a pickle"),
        (lambda f: (f / "config.json.new").write_text("{}"), "config.json.new is left over"),
        (lambda f: (f / ".env").write_text("X"), ".env is hidden"),
        (lambda f: (f / "patients.csv").write_text("X"), "patients.csv is no part of a model"),
        (lambda f: (f / "notes.txt").symlink_to("/etc/hostname"), "notes.txt is a link to what is outside"),
        (lambda f: (f / "gone.txt").symlink_to(f / "nothing"), "gone.txt is no file"),
        (lambda f: (f / "notes.txt").write_text(f"use {TOKEN}"), "notes.txt holds what looks like a token"),
        (lambda f: (f / "notes.txt").write_text("key: sk-proj-" + "Ab1" * 12), "notes.txt holds what looks like a tok"),
        (lambda f: (f / "notes.txt").write_text("my hf_test"), "notes.txt holds what looks like a token"),
        (lambda f: edit_json(f / "config.json", _name_or_path="C:\\Users\\jane\\x"), "config.json holds the path 'C:"),
        (lambda f: (f / "notes.txt").write_text("from file:///x"), "notes.txt holds the path 'file://"),
        (lambda f: (f / "notes.txt").write_text("base:/home/jane/out"), "notes.txt holds the path '/home/jane/out'"),
    ],
)
def test_what_is_refused_before_anything_is_asked(hub, folder, change, message):
    change(folder)
    before = state(folder)
    with pytest.raises(ValueError) as caught:
        push(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert not hub.requests and state(folder) == before


def test_a_token_in_the_header_of_weights(hub, folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "from": "/home/jane/run"})
    with pytest.raises(ValueError, match=r"model\.safetensors holds the path '/home/jane/run'"):
        push(folder)


def test_addresses_are_no_paths(hub, folder):
    """Neither are words with a slash, special tokens, or what serves a model."""
    text = "https://example.org/home/jane/x, and/or/so, </s>, POST /v1/chat/completions, 1/2/3, ../model/x"
    (folder / "notes.txt").write_text(text)
    assert push(folder, dry_run=True)


def test_shards(hub, tmp_path):
    folder = write_model(tmp_path / "model", max_shard_size="2MB")
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    assert push(folder, dry_run=True)

    def refused(message):
        with pytest.raises(ValueError, match=message):
            push(folder, dry_run=True)

    moved = dict(index["weight_map"])
    key = next(key for key, name in moved.items() if name == first.name)
    index_file.write_text(json.dumps(index | {"weight_map": moved | {key: second.name}}))
    refused(f"1 weights are not where the index of .* says, as {key}")
    index_file.write_text(json.dumps(index | {"metadata": {"total_size": 7}}))
    refused("bytes, but model.safetensors.index.json says 7")
    index_file.write_text(json.dumps(index))
    second.rename(folder / "model-other.safetensors")
    refused("model-other.safetensors is no part of a model")
    (folder / "model-other.safetensors").rename(second)
    index_file.unlink()
    refused("holds model-00001-of-.* without model.safetensors.index.json, which says whether")


def test_what_is_left_out(hub, folder):
    for name in (".env", "weights.bin"):
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=r"\.env is hidden; weights.bin is a pickle, .*named in `leave_out`"):
        push(folder)
    plan = push(folder, leave_out=["*.bin", ".env"])
    assert plan.left_out == (".env", "weights.bin")
    assert set(hub.repos["me/model"]) == set(plan.files) == set(contents(folder)) - set(plan.left_out)


def test_what_a_training_leaves_is_pushed_as_it_is(hub, tmp_path):
    """Written by the trainer itself: its own states and reports are left out, told of, and stay on this machine."""
    model, processor = load_model()
    data, _ = load_dataset_mixture([DataSource("phantoms:1:4")])
    arguments = MaskedDiffusionSFTConfig(
        str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", eval_strategy="steps", eval_steps=2, log_answers=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = MaskedDiffusionSFTTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=processor
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("run")
    folder = tmp_path / "run"
    (folder / "data_report.json").write_text('{"source": "/home/me/secret.json"}')
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1").write_bytes(b"x")
    before, said = state(folder), []
    plan = push_folder(folder, "me/model", report=said.append)
    assert state(folder) == before
    own = {"answers.jsonl", "training_args.bin", "data_report.json", "runs/events.out.tfevents.1"}
    assert own | {"checkpoint-1/optimizer.pt", "checkpoint-2/model.safetensors"} < set(plan.left_out)
    assert set(hub.repos["me/model"]) == set(contents(folder)) - set(plan.left_out) > {WEIGHTS, "config.json"}
    assert said[0] == f"left out: {', '.join(plan.left_out)}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": "nowhere"}, "`folder` is 'nowhere'; no such folder"),
        ({"repo": "not a name"}, "`repo` is 'not a name', which is no Hub id"),
        ({"adapter_merge": True}, "`adapter_merge` is True, but .* holds no adapters"),
        ({"base_model": "me/base"}, "`base_model` is 'me/base', but .* holds no adapters"),
    ],
)
def test_arguments(hub, complete, options, message):
    with pytest.raises(ValueError, match=message):
        push(**{"folder": complete, "repo": "me/model"} | options)
    assert not hub.requests


# Transformers' own way


def test_push_to_hub_of_model_and_processor(hub, complete, tmp_path):
    """They bring what they save, and that is all of it; only the card is Transformers' own."""
    model, processor = load_model()
    model.push_to_hub("me/direct", private=True)
    processor.push_to_hub("me/direct")
    pushed = dict(hub.repos["me/direct"])
    assert set(pushed) == set(contents(complete))
    card = ModelCard(pushed.pop("README.md").decode())
    assert card.data.library_name == "transformers"
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert pushed == contents(tmp_path / "saved")
    assert push_folder(complete, "me/direct", report=quiet).kind == "model"


# Adapters


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", str(DEMO_MODEL))


def test_adapters_name_their_model_by_its_id(hub, adapter):
    before = state(adapter)
    with pytest.raises(ValueError, match=r"`base_model_name_or_path` in .*demo_model'.*`base_model` gives its Hub id"):
        push(adapter, "me/adapter")
    with pytest.raises(ValueError, match="`base_model` is '/tmp/x'; allowed is a Hub id"):
        push(adapter, "me/adapter", base_model="/tmp/x")
    assert not hub.requests
    push(adapter, "me/adapter", base_model="me/model")
    pushed = hub.repos["me/adapter"]
    assert set(pushed) == set(contents(adapter)) and state(adapter) == before
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "me/model"
    assert not any(str(DEMO_MODEL).encode() in data for data in pushed.values())
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.base_model == "me/model" and "base_model:adapter:me/model" in card.data.tags


def test_adapters_merged(hub, adapter, tmp_path):
    before = state(adapter)
    with pytest.raises(ValueError, match="`adapter_merge` is True, but these adapters and their model '/no/model'"):
        push(adapter, "me/merged", adapter_merge=True, base_model="/no/model")
    push(adapter, "me/merged", adapter_merge=True)
    assert state(adapter) == before and "adapter_config.json" not in hub.repos["me/merged"]
    card = ModelCard(hub.repos["me/merged"]["README.md"].decode())
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert str(DEMO_MODEL) not in str(card) and "merged into these weights" in card.text
    merged = LLaDAMedVForConditionalGeneration.from_pretrained("me/merged", dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(load_model()[0], adapter).eval()
    inputs = {"input_ids": image_prompt()[:, -3:]}
    with torch.no_grad():
        wanted, plain = adapted(**inputs).logits, load_model()[0](**inputs).logits
        got = merged(**inputs).logits
    # The demo model's weights are stored as float16.
    assert (got - wanted).abs().max() < 0.02 * (plain - wanted).abs().max()


# Loading back, in a process without this package

STRANGER = """
import json, os, torch
import transformers as t
from peft import PeftModel
from PIL import Image
first = json.load(open(folder / "first.json"))
load = {"pretrained_model_name_or_path": "me/model", "trust_remote_code": True}
full = {"dtype": torch.float32}
processor = t.AutoProcessor.from_pretrained(**load)
model = t.AutoModelForImageTextToText.from_pretrained(**load, **full).eval()
body = t.AutoModel.from_pretrained(**load, **full).eval()
pinned = t.AutoModelForImageTextToText.from_pretrained(**load, **full, revision=first).eval()
image = Image.open(folder / "picture.png")
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Is it healthy?"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
pipe = t.pipeline("image-text-to-text", model="me/model", trust_remote_code=True, **full)
with torch.no_grad():
    logits = {"new": model(**inputs).logits, "body": model.lm_head(body(**inputs).last_hidden_state)}
    logits["pinned"] = pinned(**inputs).logits
    logits["adapter"] = PeftModel.from_pretrained(pinned, "me/adapter").eval()(**inputs).logits
    whole = t.AutoModelForImageTextToText.from_pretrained(
        "me/adapter", trust_remote_code=True, revision="main", **full
    ).eval()
    logits["adapter by Auto class"] = whole(**inputs).logits
answer = pipe(text=chat, return_full_text=False)[0]["generated_text"]
logits = {name: value[0, -2:].tolist() for name, value in logits.items()}
json.dump({"logits": logits, "answer": answer}, open(folder / "out.json", "w"))
"""


def test_a_stranger_loads_what_was_pushed(hub, complete, tmp_path, monkeypatch):
    newer = write_model(tmp_path / "newer", seed=1)
    first = push(complete).url.rpartition("/")[2]
    push(newer)
    adapter = write_adapter(tmp_path / "adapter", "me/model")
    write_card(adapter)
    push(adapter, "me/adapter")
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "first.json").write_text(json.dumps(first))
    image = random_image(64, 64)
    image.save(folder / "picture.png")

    processor = LLaDAMedVProcessor.from_pretrained(complete)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Is it healthy?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    old, new, base = (
        LLaDAMedVForConditionalGeneration.from_pretrained(each, dtype=torch.float32).eval()
        for each in (complete, newer, newer)
    )
    sequences = new.generate(**inputs)
    answer = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    with torch.no_grad():
        wanted = {"new": new(**inputs).logits, "body": new(**inputs).logits, "pinned": old(**inputs).logits}
        wanted["adapter"] = PeftModel.from_pretrained(old, adapter).eval()(**inputs).logits
        wanted["adapter by Auto class"] = PeftModel.from_pretrained(base, adapter).eval()(**inputs).logits
    assert not torch.equal(wanted["new"], wanted["pinned"]) and not torch.equal(wanted["adapter"], wanted["pinned"])

    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        hub.requests.clear()
        run_as_stranger(STRANGER, folder, tmp_path)
        assert bool(hub.requests) == (offline == "0")
        out = json.loads((folder / "out.json").read_text())
        (folder / "out.json").unlink()
        for name, value in wanted.items():
            torch.testing.assert_close(torch.tensor(out["logits"][name]), value[0, -2:], rtol=1e-4, atol=1e-4)
        assert out["answer"].strip() == answer.strip()


# Data sets

DATASET_STRANGER = """
import json, datasets
data = datasets.load_dataset("me/data")
json.dump({name: [[row["id"], row["answer"], list(row["image"].getpixel((5, 5)))] for row in rows]
           for name, rows in data.items()}, open(folder / "out.json", "w"))
streamed = datasets.load_dataset("me/data", split="test", streaming=True)
assert next(iter(streamed))["id"] == data["test"][0]["id"]
"""


def test_a_data_set(hub, tmp_path):
    plan = push_dataset("phantoms", "me/data", path="5:6", report=quiet)
    repo = "datasets/me/data"
    assert plan.kind == "dataset" and hub.private[repo] is True and hub.commits == [repo]
    assert set(hub.repos[repo]) == {"README.md", "data/test-00000-of-00001.parquet", "recipe.json"}
    card = DatasetCard(hub.repos[repo]["README.md"].decode())
    assert card.data.license == "apache-2.0" and "| questions | 6 |" in card.text
    wanted, _ = load_vqa("phantoms", path="5:6")
    run_as_stranger(DATASET_STRANGER, tmp_path, tmp_path)
    out = json.loads((tmp_path / "out.json").read_text())
    assert out == {"test": [[row["id"], row["answer"], list(row["image"].getpixel((5, 5)))] for row in wanted]}

    push_dataset("phantoms", "me/data", path="5:6", report=quiet)
    assert hub.commits == [repo], "the same data are the same files"
    with pytest.raises(ValueError, match="which holds dataset, not recipe; `replace`"):
        push_dataset("phantoms", "me/data", path="5:6", recipe_only=True, report=quiet)


def write_path_vqa(folder: Path) -> Path:
    """Local data of LLaVA-Med's form, two splits that share no picture."""
    for split, count in (("train", 3), ("test", 2)):
        records = []
        for number in range(count):
            name = f"{split}_{number}.png"
            random_image(seed=number + 10 * (split == "test")).save(folder / name)
            answer = ("yes", "a cell")[number % 2]
            turns = [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{split}{number}", "image": name, "answer_type": "CLOSED", "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(records))
    return folder


def test_data_that_must_not_be_passed_on(hub, tmp_path):
    place = tmp_path / "jane"
    place.mkdir()
    options = {"path": write_path_vqa(place), "splits": ["train", "test"], "report": quiet}
    with pytest.raises(ValueError, match=r"`benchmark` is 'path-vqa', which must not be .*copyright.*`recipe_only`"):
        push_dataset("path-vqa", "me/data", **options)
    assert not hub.requests
    plan = push_dataset("path-vqa", "me/data", recipe_only=True, **options)
    files = hub.repos["datasets/me/data"]
    assert plan.kind == "recipe" and set(files) == {"README.md", "recipe.json"}
    assert not any(str(tmp_path).encode() in data or b"jane" in data for data in files.values())
    assert json.loads(files["recipe.json"])["rows"] == {"train": 3, "test": 2}
    card = DatasetCard(files["README.md"].decode())
    assert "| questions | 5 |" in card.text and "| images | 5 |" in card.text and "must not be passed on" in card.text
    # The card's program runs as it stands, with the place of the data.
    found = {}
    exec(card.text.split("```python\n")[1].split("```")[0].replace("…", str(place)), found)
    assert found["report"].split == "test" and found["dataset"]["id"][:] == ["test0", "test1"]


def test_unknown_data(hub):
    with pytest.raises(ValueError, match="`benchmark` is 'mimic'; allowed are"):
        push_dataset("mimic", "me/data", report=quiet)
    with pytest.raises(ValueError, match="`source` is 'x'; allowed for slake are"):
        push_dataset("slake", "me/data", source="x", report=quiet)


# The command line


def test_command_line(hub, complete, tmp_path, monkeypatch):
    def run(*arguments):
        return CliRunner().invoke(app, [str(each) for each in arguments])

    done = run("push", complete, "me/model", "--dry-run")
    assert done.exit_code == 0 and "nothing was sent" in done.output and not hub.requests
    done = run("push", complete, "me/model", "--branch", "v1")
    assert done.exit_code == 0 and f"pushed to {hub.url}/me/model" in done.output and "v1" in hub.branches["me/model"]
    done = run("push-dataset", "phantoms", "me/data", "--path", "1:3", "--public")
    assert done.exit_code == 0 and hub.private["datasets/me/data"] is False
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    failed = run("push", complete, "me/model")
    assert failed.exit_code == 1 and failed.stderr.startswith("lladamedv: REPO is 'me/model', but the Hub")
    assert failed.stderr.count("\n") == 1 and "hf_wrong" not in failed.output
