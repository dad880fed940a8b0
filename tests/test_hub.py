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
from tests.hub_folders import change, contents, state, write_adapter, write_card, write_model
from tests.stranger import run_as_stranger
from tests.test_masked_diffusion_sft_trainer import make_trainer, rows
from tests.tiny import image_prompt, random_image


ROOT = Path(__file__).parents[1]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKEN = "hf_" + "aB3" * 12


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


def push(folder, repo="me/model", **options):
    return push_folder(folder, repo, **{"report": str} | options)


# Models


def test_a_folder_becomes_one_private_commit(hub, complete):
    before, lines = state(complete), []
    plan = push(complete, "model", report=lines.append)  # without an owner it is one's own
    assert plan.repo == "me/model" and plan.kind == "model" and plan.url.endswith(hub.commit("me/model"))
    assert hub.repos["me/model"] == contents(complete) and hub.private["me/model"] is True
    assert plan.files == {name: len(data) for name, data in contents(complete).items()}
    assert lines[-1].startswith(f"pushed to {hub.url}/me/model: model me/model: {len(plan.files)} files")
    assert push(complete).url == plan.url and state(complete) == before
    assert hub.commits == ["me/model"] and len(hub.uploads) == 1, "what is there is not sent again"


def test_a_dry_run_lists_and_makes_no_request(hub, complete):
    lines = []
    plan = push(complete, dry_run=True, report=lines.append)
    assert not hub.requests and plan.url is None
    assert f"{(complete / WEIGHTS).stat().st_size:>14,}  {WEIGHTS}" in lines and "nothing was sent" in lines[-1]
    assert f"{sum(plan.files.values()) / 1e6:.1f} MB" in lines[-1]


def test_stale_files_go_in_the_same_commit(hub, complete, tmp_path):
    """One file of weights left beside new shards would be loaded instead of them."""
    shards, theirs = write_model(tmp_path / "shards", "2MB"), {"figure.webp": b"theirs", ".gitattributes": b"theirs"}
    push(complete)
    hub.repos["me/model"] |= theirs | {"old_lladamedv.py": b""}
    for number, folder in enumerate((shards, complete)):
        push(folder)
        assert hub.repos["me/model"] == contents(folder) | theirs and len(hub.commits) == number + 2


def test_a_branch(hub, complete):
    push(complete)
    hub.repos["me/model"] |= {"README.md": b"---\nlicense: mit\n---\nOther"}
    main = dict(hub.repos["me/model"])
    push(complete, revision="v2")
    assert hub.repos["me/model"] == main and hub.branches["me/model"]["v2"] == contents(complete)


def test_repositories_of_another_kind(hub, complete, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", "me/model")
    hub.repos |= {
        "me/model": contents(complete), "me/notes": {"notes.csv": b"3"},
        "me/bert": {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"1", ".gitattributes": b"2"},
        "me/new": {"README.md": b"---\nlicense: mit\n---\n", ".gitattributes": b"4"},
    }  # fmt: skip
    hub.private |= dict.fromkeys(hub.repos, True)
    for repo, pushed, there in (
        ("me/model", adapter, "holds model, not adapter"),
        ("me/bert", complete, "holds a model of type 'bert', not model"),
        ("me/notes", complete, "holds other files, not model"),
    ):
        with pytest.raises(ValueError, match=rf"`repo` is '{repo}', which {there}; `replace` deletes"):
            push(pushed, repo)
    assert not hub.commits
    push(complete, "me/new")
    push(complete, "me/bert", replace=True)
    assert hub.repos["me/bert"] == contents(complete) | {".gitattributes": b"2"}


def test_nothing_private_becomes_public_by_mistake(hub, complete):
    hub.repos["me/model"], hub.private["me/model"] = {}, False
    with pytest.raises(ValueError, match=r"'me/model', which is public; allowed with `private=False` \(--public\)"):
        push(complete)
    assert hub.repos["me/model"] == {} and not hub.commits
    for repo in ("me/model", "me/open"):
        push(complete, repo, private=False)
    assert hub.private["me/open"] is False and hub.repos["me/model"] == hub.repos["me/open"]


def with_text(text):
    return lambda folder: (folder / "notes.txt").write_text(text)


def with_file(name, data=b"X"):
    return lambda folder: (folder / name).write_bytes(data)


def without(name):
    return lambda folder: (folder / name).unlink()


def with_values(name, **values):
    return lambda folder: change(folder / name, **values)


def with_link(name, target):
    return lambda folder: (folder / name).symlink_to(target)


def with_metadata(folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "from": "/home/jane/run"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("README.md"), "README.md is missing"),
        (with_file("README.md", b"# No front matter"), "README.md is no card"),
        (with_file("README.md", b"---\na: [\n---\n"), "README.md is no card"),
        (without("config.json"), "config.json is missing"),
        (with_values("config.json", auto_map={"AutoModel": ["x"]}), "`auto_map` in config.json lacks AutoModel"),
        # Else those who trust the pusher's code would run a stranger's.
        (with_values("config.json", auto_map={"AutoModel": "evil/it--modeling_lladamedv.LLaDAMedVModel"}),
         "names evil/it--modeling_lladamedv.py, which is missing"),
        (with_values("config.json", auto_map=["x"]), "`auto_map` in config.json lacks AutoConfig"),
        (with_values("processor_config.json", auto_map=5), "`auto_map` in processor_config.json lacks AutoProcessor"),
        (with_values("config.json", model_type="llava_llada"), "a model of type 'llava_llada'"),
        (without("modeling_lladamedv.py"), "names modeling_lladamedv.py, which is missing"),
        (with_file("modeling_lladamedv.py"), "which modeling_lladamedv.py has not"),
        (without("repetition_lladamedv.py"), "imports repetition_lladamedv.py, which is missing"),
        (with_file("generation_config.json", b"{"), "generation_config.json is no JSON"),
        (with_file("generation_config.json", b"[]"), "generation_config.json is no JSON object"),
        (with_file(INDEX, b'{"metadata": [1], "weight_map": {}}'), f"`metadata` in {INDEX} is no JSON"),
        (with_file("notes.txt", b"\xff"), "notes.txt is not UTF-8"),
        (lambda folder: with_file(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-5])(folder), "cannot be read: cut off"),
        (lambda folder: with_file(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"0")(folder), "cannot be read: cut off"),
        (without(WEIGHTS), "holds no weights"),
        (with_file("mm_projector.safetensors"), "cannot be read: cut off"),
        (with_file(INDEX, b'{"weight_map": 3}'), "is not an index of weights"),
        (with_file("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
        (with_file("config.json.new"), "config.json.new is left over"),
        (with_file(".env"), ".env is hidden"),
        (with_file("patients.csv"), "patients.csv is no part of a model"),
        (with_file("other.safetensors"), "other.safetensors is no part of a model"),
        (with_link("notes.txt", "/etc/hostname"), "notes.txt is a link to what is outside"),
        (with_link("gone.txt", "nothing"), "gone.txt is no file"),
        (with_text(f"use {TOKEN}"), "notes.txt holds what looks like a token"),
        (with_text("key: sk-proj-" + "Ab1" * 12), "notes.txt holds what looks like a token"),
        (with_text("my hf_test"), "notes.txt holds what looks like a token"),
        (with_values("config.json", _name_or_path="C:\\Users\\jane\\x"), "config.json holds the path 'C:"),
        (with_text("from file:///x"), "notes.txt holds the path 'file://"),
        (with_text("base:/home/jane/out"), "notes.txt holds the path '/home/jane/out'"),
        (with_metadata, "model.safetensors holds the path '/home/jane/run'"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_asked(hub, folder, spoil, message):
    spoil(folder)
    before = state(folder)
    with pytest.raises(ValueError) as caught:
        push(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert not hub.requests and state(folder) == before


def test_addresses_are_no_paths(hub, folder):
    """Neither are words with a slash, special tokens, or what serves a model."""
    with_text("https://example.org/home/jane/x, and/or/so, </s>, POST /v1/chat/completions, 1/2/3, ../model/x")(folder)
    assert push(folder, dry_run=True)


def test_shards(hub, tmp_path):
    """The index says which files they are, whatever their names."""
    folder = write_model(tmp_path / "model", max_shard_size="2MB")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    index = json.loads((folder / INDEX).read_text())
    key = next(key for key, name in index["weight_map"].items() if name == first.name)
    for spoil, message in (
        (with_values(INDEX, weight_map={key: second.name}), f"1 weights are not where the index of .* says, as {key}"),
        (with_values(INDEX, metadata={"total_size": 7}), f"bytes, but {INDEX} says 7"),
        (lambda _: second.rename(folder / "other.safetensors"), "other.safetensors is no part of a model"),
        (without(INDEX), f"without {INDEX}, which says whether"),
    ):
        before = contents(folder)
        spoil(folder)
        with pytest.raises(ValueError, match=message):
            push(folder)
        for name in contents(folder).keys() - before:
            (folder / name).unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
    second.rename(folder / "other.safetensors")
    places = {key: name.replace(second.name, "other.safetensors") for key, name in index["weight_map"].items()}
    change(folder / INDEX, weight_map=places)
    push(folder)
    assert hub.repos["me/model"] == contents(folder)
    wanted = load_model()[0].state_dict()
    assert all(value.equal(wanted[name]) for name, value in load_model(folder)[0].state_dict().items())


def test_what_is_left_out(hub, folder):
    for name in (".env", "weights.bin"):
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=r"\.env is hidden; weights.bin is a pickle, .*named in `leave_out`"):
        push(folder)
    plan = push(folder, leave_out=["*.bin", ".env"])
    assert plan.left_out == (".env", "weights.bin")
    assert set(hub.repos["me/model"]) == set(plan.files) == set(contents(folder)) - set(plan.left_out)


def test_what_a_training_leaves_is_pushed_as_it_is(hub, tmp_path):
    """Written by the trainer itself: its own states and reports are left out, listed, and stay on this machine."""
    folder, said = tmp_path / "run", []
    trainer = make_trainer(
        folder, max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2, log_answers=1,
        eval_dataset=rows(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("run")
    (folder / "data_report.json").write_text('{"source": "/home/me/secret.json"}')
    (folder / "completions.jsonl").write_text("{}")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1").write_bytes(b"x")
    before = state(folder)
    plan = push(folder, report=said.append)
    assert state(folder) == before and said[0] == f"left out: {', '.join(plan.left_out)}"
    own = {"answers.jsonl", "answers.html", "completions.jsonl", "training_args.bin", "data_report.json"}
    own |= {"runs/events.out.tfevents.1"}
    assert own | {"checkpoint-1/optimizer.pt", "checkpoint-2/model.safetensors"} < set(plan.left_out)
    assert set(hub.repos["me/model"]) == set(contents(folder)) - set(plan.left_out) > {WEIGHTS, "config.json"}


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (push, {"folder": "nowhere"}, "`folder` is 'nowhere'; no such folder"),
        (push, {"repo": "not a name"}, "`repo` is 'not a name', which is no Hub id"),
        (push, {"adapter_merge": True}, "`adapter_merge` is True, but .* holds no adapters"),
        (push, {"base_model": "me/base"}, "`base_model` is 'me/base', but .* holds no adapters"),
        (push_dataset, {"benchmark": "mimic"}, "`benchmark` is 'mimic'; allowed are"),
        (push_dataset, {"benchmark": "slake", "source": "x"}, "`source` is 'x'; allowed for slake are"),
    ],
)
def test_arguments(hub, complete, call, options, message):
    given = {"folder": complete} if call is push else {}
    with pytest.raises(ValueError, match=message):
        call(**given | {"repo": "me/model"} | options)
    assert not hub.requests


def test_push_to_hub_of_model_and_processor(hub, complete, tmp_path):
    """Transformers' own way: what the two save, and that is all of it; only the card is Transformers' own."""
    model, processor = load_model()
    model.push_to_hub("me/direct", private=True)
    processor.push_to_hub("me/direct")
    pushed = dict(hub.repos["me/direct"])
    assert ModelCard(pushed.pop("README.md").decode()).data.library_name == "transformers"
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert pushed == contents(tmp_path / "saved")
    assert push(complete, "me/direct").kind == "model"


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


@pytest.mark.parametrize(
    ("name", "message"), [("README.md", r"whose README.md is no card"), ("adapter_config.json", "cannot be read")]
)
def test_adapters_that_cannot_be_read(hub, adapter, name, message):
    (adapter / name).write_text("---\na: [\n---\n")
    for options in ({"base_model": "me/model"}, {"adapter_merge": True, "base_model": str(DEMO_MODEL)}):
        if name == "README.md" or "adapter_merge" not in options:
            with pytest.raises(ValueError, match=message) as caught:
                push(adapter, **options)
            assert "\n" not in str(caught.value) and not hub.requests


def test_adapters_merged(hub, adapter):
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
    with torch.no_grad():
        got, wanted, plain = (each(image_prompt()[:, -3:]).logits for each in (merged, adapted, load_model()[0]))
    # The demo model's weights are stored as float16.
    assert (got - wanted).abs().max() < 0.02 * (plain - wanted).abs().max()


# Loading back, in a process without this package

STRANGER = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText as Auto, AutoProcessor
load = {"trust_remote_code": True, "dtype": torch.float32}
pinned = Auto.from_pretrained("me/model", **load, revision=(folder / "first.txt").read_text()).eval()
whole = Auto.from_pretrained("me/adapter", **load, revision="main").eval()
models = {"new": Auto.from_pretrained("me/model", **load).eval(), "pinned": pinned, "adapter by Auto class": whole}
AutoProcessor.from_pretrained("me/model", trust_remote_code=True)
inputs = torch.load(folder / "inputs.pt")
with torch.no_grad():
    logits = {name: model(**inputs).logits[0, -2:].tolist() for name, model in models.items()}
    logits["adapter"] = PeftModel.from_pretrained(pinned, "me/adapter").eval()(**inputs).logits[0, -2:].tolist()
(folder / "out.json").write_text(json.dumps(logits))
"""


@pytest.mark.slow  # test_remote_code.py has strangers, too
def test_a_stranger_loads_what_was_pushed(hub, complete, tmp_path, monkeypatch):
    """The newest, a pinned commit and adapters, by both ways; `test_remote_code` has all else that a folder gives."""
    newer, adapter, place = write_model(tmp_path / "newer", seed=1), tmp_path / "adapter", tmp_path / "place"
    write_card(write_adapter(adapter, "me/model"))
    place.mkdir()
    (place / "first.txt").write_text(push(complete).url.rpartition("/")[2])
    push(newer)
    push(adapter, "me/adapter")
    content = [{"type": "image", "image": random_image(64, 64)}, {"type": "text", "text": "Is it healthy?"}]
    inputs = LLaDAMedVProcessor.from_pretrained(complete).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    torch.save(dict(inputs), place / "inputs.pt")

    def load(folder):
        return LLaDAMedVForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    models = {
        "new": load(newer), "pinned": load(complete), "adapter": PeftModel.from_pretrained(load(complete), adapter),
        "adapter by Auto class": PeftModel.from_pretrained(load(newer), adapter),
    }  # fmt: skip
    with torch.no_grad():
        wanted = {name: model.eval()(**inputs).logits[0, -2:] for name, model in models.items()}
    assert not any(torch.equal(wanted[name], wanted["pinned"]) for name in wanted if name != "pinned")
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        hub.requests.clear()
        run_as_stranger(STRANGER, place, tmp_path)
        assert bool(hub.requests) == (offline == "0")
        out = json.loads((place / "out.json").read_text())
        for name, value in wanted.items():
            torch.testing.assert_close(torch.tensor(out[name]), value, rtol=1e-4, atol=1e-4)


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
    options, repo = {"benchmark": "phantoms", "repo": "me/data", "path": "5:6", "report": str}, "datasets/me/data"
    assert push_dataset(**options).kind == "dataset" and hub.private[repo] is True
    assert set(hub.repos[repo]) == {"README.md", "data/test-00000-of-00001.parquet", "recipe.json"}
    card = DatasetCard(hub.repos[repo]["README.md"].decode())
    assert card.data.license == "apache-2.0" and "| questions | 6 |" in card.text
    run_as_stranger(DATASET_STRANGER, tmp_path, tmp_path)
    wanted, _ = load_vqa("phantoms", path="5:6")
    out = json.loads((tmp_path / "out.json").read_text())
    assert out == {"test": [[row["id"], row["answer"], list(row["image"].getpixel((5, 5)))] for row in wanted]}
    push_dataset(**options)
    assert hub.commits == [repo], "the same data are the same files"
    with pytest.raises(ValueError, match="which holds dataset, not recipe; `replace`"):
        push_dataset(**options, recipe_only=True)


def write_path_vqa(folder: Path) -> Path:
    """Local data of LLaVA-Med's form, two splits that share no picture."""
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        records = []
        for number in range(count):
            name = f"{split}_{number}.png"
            random_image(seed=number + 10 * (split == "test")).save(folder / name)
            turns = [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": ("yes", "no")[number % 2]}]
            records.append({"id": f"{split}{number}", "image": name, "answer_type": "CLOSED", "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(records))
    return folder


def test_data_that_must_not_be_passed_on(hub, tmp_path):
    place = write_path_vqa(tmp_path / "jane")
    options = {"path": place, "splits": ["train", "test"], "report": str}
    with pytest.raises(ValueError, match=r"`benchmark` is 'path-vqa', which must not be .*copyright.*`recipe_only`"):
        push_dataset("path-vqa", "me/data", **options)
    assert not hub.requests
    assert push_dataset("path-vqa", "me/data", recipe_only=True, **options).kind == "recipe"
    files = hub.repos["datasets/me/data"]
    assert set(files) == {"README.md", "recipe.json"}
    assert not any(str(tmp_path).encode() in data or b"jane" in data for data in files.values())
    assert json.loads(files["recipe.json"])["rows"] == {"train": 3, "test": 2}
    card = DatasetCard(files["README.md"].decode())
    assert "| questions | 5 |" in card.text and "| images | 5 |" in card.text and "must not be passed on" in card.text
    # The card's program runs as it stands, with the place of the data.
    found = {}
    exec(card.text.split("```python\n")[1].split("```")[0].replace("…", str(place)), found)
    assert found["report"].split == "test" and found["dataset"]["id"][:] == ["test0", "test1"]


def test_command_line(hub, complete, monkeypatch):
    def run(*arguments):
        return CliRunner().invoke(app, [str(each) for each in arguments])

    done = run("push", complete, "me/model", "--branch", "v1")
    assert done.exit_code == 0 and f"pushed to {hub.url}/me/model" in done.output and "v1" in hub.branches["me/model"]
    done = run("push-dataset", "phantoms", "me/data", "--path", "1:3", "--public")
    assert done.exit_code == 0 and hub.private["datasets/me/data"] is False
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    failed = run("push", complete, "me/model")
    assert failed.exit_code == 1 and failed.stderr.startswith("lladamedv: REPO is 'me/model', but the login")
    assert failed.stderr.count("\n") == 1 and "hf_wrong" not in failed.output
