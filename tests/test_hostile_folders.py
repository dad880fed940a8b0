"""Model folders and data sets from strangers: no code of theirs runs, nothing outside of them is read, and what they
claim is refused before memory is taken for it.

Every model comes through `check_model`, from the commands and from training; the tables below are what it must refuse.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration, LLaDAMedVImageProcessor, LLaDAMedVProcessor
from lladamedv.conversion import convert_checkpoint, initialize_checkpoint
from lladamedv.hub_cards.checks import AUTO_CLASSES, check_model
from lladamedv.hub_cards.push import push_folder
from lladamedv.loading import DEMO_MODEL, load_model
from lladamedv.modeling_lladamedv.generation_options_lladamedv import GenerationOptionError
from lladamedv.processing.datasets import load_vqa
from lladamedv.trainers import sft
from tests import released
from tests.fuzzing.mutations import mend_png
from tests.hub_folders import change, write_adapter, write_card
from tests.test_masked_diffusion_sft_trainer import make_trainer
from tests.tiny import tiny_model, tiny_processor, tiny_tokenizer


ROOT = Path(__file__).parents[1]
AUTOMATIC = (AutoConfig, AutoModelForImageTextToText, AutoProcessor)
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of this package's own format, of two files; tests change copies of it."""
    folder = tmp_path_factory.mktemp("own") / "model"
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    """The same in a released layout."""
    folder = tmp_path_factory.mktemp("llada") / "model"
    tiny_tokenizer().save_pretrained(released.write(folder, released.LLAMA_CONFIG, released.llama_weights(), 2))
    return folder


@pytest.fixture
def mine(own, tmp_path):
    return shutil.copytree(own, tmp_path / "mine")


@pytest.fixture
def theirs(llada, tmp_path):
    return shutil.copytree(llada, tmp_path / "theirs")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What a new model is made of, besides the projector."""
    root = tmp_path_factory.mktemp("parts")
    tiny_tokenizer().save_pretrained(released.write_olmo(root / "llada"))
    return root / "llada", released.write_tower(root / "siglip")


def convert(folder):
    return convert_checkpoint(folder, folder.with_name("out"))


def load_to_train(folder):
    return sft.load_model(sft.SFTScriptArguments(), ModelConfig(str(folder)))


def refuse(message: str, action, *arguments, **options) -> None:
    """See that an action fails with one line of text that says why."""
    with pytest.raises(ValueError, match=message) as caught:
        action(*arguments, **options)
    assert type(caught.value) in (ValueError, GenerationOptionError) and "\n" not in str(caught.value)


# Pickles


class Payload:
    """What an unpickler without `weights_only` would make a file of."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_pickle(file: Path, path: Path, kind: str = "zip") -> None:
    file.write_bytes(pickle.dumps({"x": Payload(path)}))
    if kind != "bare":
        torch.save({"x": Payload(path)}, file, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_pickles_are_not_loaded(tmp_path, mine, theirs, parts, kind):
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(ran)))
    ran.unlink()  # the payload works
    for folder in (mine, theirs):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        write_pickle(folder / "pytorch_model.bin", ran, kind)
        for load in (load_model, load_to_train, LLaDAMedVForConditionalGeneration.from_pretrained):
            with pytest.raises((ValueError, OSError), match=r"pickled weights are not|no file named model"):
                load(folder)
    refuse("pickled weights are not loaded", convert, theirs)
    write_pickle(tmp_path / "mm_projector.bin", ran, kind)
    new = (*parts, tmp_path / "new", tmp_path / "mm_projector.bin")
    refuse("`projector` is .* is refused", initialize_checkpoint, *new)
    assert not ran.exists()


def test_pickled_adapters(tmp_path):
    ran, folder = tmp_path / "ran", write_adapter(tmp_path / "adapter", str(DEMO_MODEL))
    write_card(folder)
    (folder / "adapter_model.safetensors").unlink()
    write_pickle(folder / "adapter_model.bin", ran)
    refuse(r"adapter_model\.safetensors is missing", push_folder, folder, "me/x", adapter_merge=True, dry_run=True)
    refuse(r"adapters without adapter_model\.safetensors; pickled weights are not loaded", load_model, folder)
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        LLaDAMedVForConditionalGeneration.from_pretrained(folder)
    assert not ran.exists()


def test_pickles_in_a_checkpoint_of_training(tmp_path):
    """The library loads all of them with `weights_only=True`, and the arguments not at all."""
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, max_steps=2)
    checkpoint, ran = tmp_path / "checkpoint-1", tmp_path / "ran"
    write_pickle(checkpoint / "training_args.bin", ran)
    (checkpoint / "pytorch_model.bin").touch()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        whole = (checkpoint / name).read_bytes()
        write_pickle(checkpoint / name, ran)
        if name == "pytorch_model.bin":
            trainer.train(resume_from_checkpoint=str(checkpoint))
            assert trainer.state.global_step == 2
            (checkpoint / "model.safetensors").unlink()
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(whole)
    assert not ran.exists()


# Code


def add_code(folder: Path, ran: Path) -> None:
    """Have every file of a folder name a module of it, which makes a file when it is imported."""
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil:\n    pass\n")
    evil = dict.fromkeys(AUTO_CLASSES, "evil.Evil")
    for file in ("config.json", "processor_config.json"):
        change(folder / file, auto_map=evil)
    change(folder / "processor_config.json", image_processor={"auto_map": evil})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})


def test_code_of_a_folder_is_not_run(tmp_path, mine, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setattr(builtins, "input", lambda prompt="": pytest.fail(f"the user was asked: {prompt}"))
    add_code(mine, ran)
    for automatic in AUTOMATIC:
        for options in ({}, {"trust_remote_code": False}):
            automatic.from_pretrained(mine, **options)
    load_model(mine)
    load_to_train(mine)
    # Where the library has no class of its own, it would ask whether to run the folder's.
    change(mine / "tokenizer_config.json", tokenizer_class="Evil")
    change(mine / "processor_config.json", image_processor={"image_processor_type": "Evil"})
    for read in (LLaDAMedVProcessor.from_pretrained, load_model):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            read(mine)
    change(mine / "config.json", model_type="evil")
    for automatic in AUTOMATIC:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            automatic.from_pretrained(mine, trust_remote_code=False)
    assert not ran.exists()
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(mine, trust_remote_code=True)
    assert ran.exists(), "the code would run if it were trusted"


def test_no_command_trusts_a_folder():
    """Nor unpickles more than tensors, nor evaluates text."""
    packages = "lladamedv modeling_lladamedv processing trainers evaluation hub_cards benchmarks"
    for file in (file for package in packages.split() for file in (ROOT / package).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("trust_remote_code", "False") == "False", (file, call.lineno)
            assert name not in ("eval", "exec", "yaml.load", "pickle.load", "pickle.loads"), (file, call.lineno)
            assert name != "torch.load" or given["weights_only"] == "True", (file, call.lineno)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_kernels_from_elsewhere(mine, name):
    change(mine / "config.json", **{name: "evil/kernel"})
    with contextlib.suppress(ValueError):
        assert load_model(mine)[0].config._attn_implementation == "sdpa"


# Chat templates

CHAT = [{"role": "user", "content": "Hello"}]
TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__base__ }}",
    "{{ messages.append.__self__.__class__ }}", "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "{% set x = messages.append({}) %}", "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(100001) %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 / 0 }}",
    "{% for %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
)  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_chat_templates(mine, template):
    """They are programs, which the library runs in Jinja's sandbox."""
    (mine / "chat_template.jinja").write_text(template)
    processor = LLaDAMedVProcessor.from_pretrained(mine)
    refuse("`conversation` does not suit the chat template: ", processor.apply_chat_template, CHAT)


def test_chat_templates_see_nothing_else(mine):
    processor = LLaDAMedVProcessor.from_pretrained(mine)
    for template in ("{{ ''|attr('__class__') }}", "{{ '{0.__class__}'.format(messages) }}"):
        assert processor.apply_chat_template(CHAT, chat_template=template) == ""
    for template in ("{% include '/etc/passwd' %}", "{% import 'os' as os %}"):
        with pytest.raises(TypeError, match="no loader"):
            processor.apply_chat_template(CHAT, chat_template=template)


# Places


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", 3, None, ["x"]])
def test_names_of_files_that_lead_elsewhere(tmp_path, mine, theirs, name):
    for folder in (theirs, mine):
        shutil.copy(folder / SHARD, tmp_path / "x.safetensors")
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        index[min(index)] = str(tmp_path / "x.safetensors") if name == "/x.safetensors" else name
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
        refuse("lacks files that its index names", check_model, folder)
    change(mine / "config.json", quantization_config={"quant_method": "evil"})
    for load, folder in (
        (check_model, mine), (convert, theirs), (LLaDAMedVForConditionalGeneration.from_pretrained, theirs)
    ):  # fmt: skip
        refuse("lacks files that its index names", load, folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', "{" * 3, "[" * 100_000])
def test_indexes_that_are_none(mine, theirs, text):
    for folder in (mine, theirs):
        (folder / INDEX).write_text(text)
        refuse(r"model\.safetensors\.index\.json' (is no|holds a)", check_model, folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "chat_template.jinja"])
def test_files_that_are_none(tmp_path, mine, theirs, name):
    for folder in (folder for folder in (mine, theirs) if (folder / name).exists()):
        file, elsewhere = folder / name, tmp_path / f"{folder.name} elsewhere"
        file.rename(elsewhere)
        for target in (elsewhere, file, tmp_path / "nothing", "/dev/zero", "a pipe"):
            os.mkfifo(file) if target == "a pipe" else file.symlink_to(target)
            for load in (check_model, load_model, load_to_train, *([] if folder is mine else [convert])):
                refuse(rf"{name}' (is a link to what is outside|is no file)", load, folder)
            file.unlink()
        (folder / "files").mkdir()
        elsewhere.rename(folder / "files" / name)
        file.symlink_to(Path("files", name))
        check_model(folder)  # a link to what is within


@pytest.mark.parametrize("named", ["../other", "{}/other", "link"])
def test_a_tower_that_is_elsewhere(tmp_path, named):
    folder = released.write_llava(tmp_path / "x", mm_vision_tower=named.format(tmp_path))
    shutil.copytree(folder / "tower", tmp_path / "other")
    if named == "link":
        (folder / "link").symlink_to(tmp_path / "other")
        refuse("link to what is outside", check_model, folder)
    else:
        for load in (check_model, LLaDAMedVForConditionalGeneration.from_pretrained):
            refuse("`mm_vision_tower` is .* which is outside of .*; allowed", load, folder)


def write_cache(cache: Path, folder: Path, shared: bool) -> Path:
    """The Hub's cache with one repository, whose files are links to blobs, of its own or of the whole cache."""
    repository, common = cache / "models--me--model", cache / "blobs" / "ab"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    for place in (snapshot, repository / "blobs", repository / "refs", common):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(path for path in folder.iterdir() if path.is_file()):
        blob = repository / "blobs" / str(number)
        shutil.copy(file, common / str(number) if shared else blob)
        if shared:
            blob.symlink_to(Path("..", "..", "blobs", "ab", str(number)))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


@pytest.mark.parametrize("shared", [False, True], ids=["blobs of the repository", "blobs of the cache"])
def test_the_cache_of_the_hub_is_made_of_links(tmp_path, own, llada, shared):
    for number, folder in enumerate((own, llada)):
        cache = tmp_path / str(number)
        snapshot = write_cache(cache, folder, shared)
        LLaDAMedVForConditionalGeneration.from_pretrained("me/model", cache_dir=cache, local_files_only=True)
        load_model(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "0" / "models--me--model" / "blobs" / "0")
    refuse("is a link to", check_model, snapshot)


# Headers of safetensors


def with_header(text: str, size: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + b"\0" * size


TENSOR = '{"x": {"dtype": "F32", "shape": %s, "data_offsets": [%d, %d]}}'
HEADERS = {
    "nothing": b"", "no JSON": with_header("\0" * 100), "more than it says": with_header(TENSOR % ([2], 0, 8), 4096),
    "nested": with_header('{"x":' * 100_000), "longer than the file": with_header("{}", length=2**40),
    "terabytes": with_header(TENSOR % ([2**38], 0, 2**40), 1000),
    "terabytes in the shape alone": with_header(TENSOR % ([2**20, 2**18], 0, 1000), 1000),
    "product that overflows": with_header(TENSOR % ([2**32, 2**32], 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(tmp_path, mine, theirs, parts, kind):
    for folder in (mine, theirs):
        (folder / SHARD).write_bytes(HEADERS[kind])
        refuse(r"00001-of-00002\.safetensors' cannot be read: cut off or damaged", check_model, folder)
    refuse("cut off or damaged", convert, theirs)
    projector = tmp_path / "mm_projector.safetensors"
    projector.write_bytes(HEADERS[kind])
    refuse("cut off or damaged", initialize_checkpoint, *parts, tmp_path / "new", projector)


# Numbers

ABSURD = (10**9, 10**12, 10**30, 0, -1, 1.5, "8", float("nan"), float("inf"), True, [8], {})
SIZES = {
    "text_config": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "max_position_embeddings"),
    "vision_config": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
                      "image_size", "patch_size"),
}  # fmt: skip


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in SIZES.items() for name in names])
def test_sizes(mine, part, name):
    original = (mine / "config.json").read_bytes()
    for value in ABSURD:
        (mine / "config.json").write_bytes(original)
        change(mine / "config.json", **{part: {name: value}})
        refuse(rf"`{part}\.{name}` is .*; allowed are whole numbers from 1 to \d+", check_model, mine)


@pytest.mark.parametrize("value", [10**9, 0, -1, 1.5, "8", float("nan"), True, [8]])
@pytest.mark.parametrize("name", ["d_model", "n_layers", "mlp_hidden_size", "embedding_size"])
def test_sizes_of_released_layouts(tmp_path, name, value):
    folder = released.write(
        tmp_path / "x", released.OLMO_CONFIG | {name: value}, {"model.transformer.x": torch.ones(1)}
    )
    refuse(r"`text_config\.\w+` is .*; allowed are whole numbers", check_model, folder)
    refuse(r"`text_config\.\w+` is .*; allowed", LLaDAMedVForConditionalGeneration.from_pretrained, folder)


def test_the_largest_models_are_not_refused():
    """Llama 3.1 405B with a context of ten million tokens and Gemma's vocabulary, and InternViT-6B on larger images."""
    LLaDAMedVConfig(
        text_config={"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                     "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 262144,
                     "max_position_embeddings": 10_485_760},
        vision_config={"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45,
                       "num_attention_heads": 25, "image_size": 1024, "patch_size": 14},
    )  # fmt: skip


# Values that a file states, by file and name, which the refusal names.
NAN = float("nan")
WRONG = {
    "config.json": {
        "text_config": ({"model_type": "bert"}, "llama", [{}],
                        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, {"hidden_act": "evil"},
                        {"vocab_size": 5}),
        "vision_config": ({"model_type": "timm_wrapper", "architecture": "resnet18"}, 3,
                          {"model_type": ["siglip_vision_model"]}),
        "image_grid_pinpoints": ([[384, 384]] * 5000, [[384, 10**9]], [[384, -384]], [[384, 384.5]], [384],
                                 "(1x1),...,(100000x100000)"),
        "vision_aspect_ratio": ("anyres_max_²",), "image_token_id": (10**30,), "mask_token_id": (NAN,),
        "tie_word_embeddings": ("yes",),
        "": ({"vision_aspect_ratio": "anyres_max_" + "9" * 5000}, {"to_dict": "shadow"}),
        "projector_hidden_act": ("evil",), "dtype": ("load", ["x"]), "auto_map": (5, None),
        "transformers_weights": ("../x.safetensors", "x.safetensors.index.json"),
    },
    "generation_config.json": {
        "max_new_tokens": (10**12, NAN), "steps": (10**12,), "": ({"max_new_tokens": 2**20, "block_length": 2**20},),
        "block_length": (10**30,),
        "eos_token_id": ([None],), "suppress_tokens": ([0, "x"], [1e400]), "pad_token_id": (-1,), "temperature": (NAN,),
        "evil": (1,), "custom_generate": ("evil/repository",),
    },
    "processor_config.json": {
        "size": ({"height": 10**6, "width": 10**6}, {"height": 0, "width": 0}), "patch_size": (0, -1, NAN, 10**9),
        "image_grid_pinpoints": ([[64, 64]] * 5000, "(1x1),...,(100000x100000)", [[64, 64 * 2**40]],
                                 [[64 * 33, 64 * 32]], ["64"]),
        "vision_aspect_ratio": ("anyres_max_x",),
    },
}  # fmt: skip
CASES = [(file, name, value) for file, names in WRONG.items() for name, values in names.items() for value in values]


@pytest.mark.parametrize(("file", "name", "value"), CASES, ids=lambda each: f"{each!r:.30}")
def test_values(mine, file, name, value):
    values = {name: value} if name else value
    change(mine / file, **({"image_processor": values} if file.startswith("processor") else values))

    def answer():
        model, processor = load_model(mine)
        model.generate(**processor(text="Hello", return_tensors="pt"))

    refuse(name or ".", answer)


@pytest.mark.parametrize(
    "values", [{"architectures": {"a": {"b": "c"}}}, {"quantization_config": {"quant_method": "x"}}]
)
def test_values_that_are_ignored(mine, values):
    change(mine / "config.json", **values)
    load_model(mine)


def test_an_image_of_millions_of_tokens(mine):
    small = {"size": {"height": 1, "width": 1}, "patch_size": 1, "image_grid_pinpoints": [[13_000, 13_000]]}
    change(mine / "processor_config.json", image_processor=small)
    refuse("`image_grid_pinpoints` holds", load_model, mine)
    size = {"height": 2048, "width": 2048}
    processor = LLaDAMedVImageProcessor(size=size, patch_size=1, vision_aspect_ratio="square")
    refuse("`patch_size` is 1 .* makes 4194304 tokens", processor.get_number_of_image_tokens, 10, 10)


# JSON

TEXTS = {
    "nested": b'{"a":' * 100_000, "nested list": b"[" * 100_000, "nothing": b"", "zeros": b"\0" * 1000, "list": b"[1]",
    "long number": b'{"model_type": ' + b"9" * 10_000 + b"}", "text": b'"x"', "number": b"1e999", "NaN": b"NaN",
    "UTF-16": '{"model_type": "llada"}'.encode("utf-16"), "BOM": b"\xef\xbb\xbf" + b'{"model_type": "llada"}',
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["config", "generation_config", "processor_config", "tokenizer_config", "tokenizer"])
def test_json(mine, theirs, name, kind):
    (mine / f"{name}.json").write_bytes(TEXTS[kind])
    refuse("json|JSON|cannot be read|cannot be loaded|4300 digits", load_model, mine)
    if name == "config":
        (theirs / "config.json").write_bytes(TEXTS[kind])
        for load in (check_model, load_to_train, convert):
            refuse(r"config\.json", load, theirs)


# Archives


def picture(width: int = 20) -> bytes:
    Image.new("RGB", (width, 10)).save(file := BytesIO(), "PNG")
    return file.getvalue()


def write_archive(file: Path) -> list[str]:
    """An archive of everything that is wrong, and the names of its images."""
    wide = picture()  # a PNG of a few bytes that states 60,000 by 60,000 pixels
    wide = mend_png(wide[:16] + struct.pack(">II", 60_000, 60_000) + wide[24:])
    inner, link = BytesIO(), zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x.jpg", picture())
    members = [
        *((name, picture()) for name in ("good/source.jpg", "../up.jpg", "/absolute.jpg", "imgs/../../up.jpg")),
        ("..\\up.jpg", picture()), ("wide/source.jpg", wide), ("inner.zip", inner.getvalue()), (link, "/etc/hostname"),
        ("twice.jpg", picture(20)), ("twice.jpg", picture(30)), ("bomb.jpg", b"\0" * 272 * 2**20),
        ("secret.jpg", picture()), ("packed.jpg", picture(), zipfile.ZIP_LZMA),
    ]  # fmt: skip
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        for member in members:
            archive.writestr(*member)
        names = archive.namelist()
    content = bytearray(file.read_bytes())
    for find, flags in ((content.index, 6 - 30), (content.rindex, 8 - 46)):  # a member that says that it is encrypted
        content[find(b"secret.jpg") + flags] |= 1
    file.write_bytes(content)
    return [*dict.fromkeys(names), "inner.zip/x.jpg", "imgs.zip::x.jpg"]


def test_archives(tmp_path):
    names = write_archive(tmp_path / "imgs.zip")
    asked = {"question": "Is it?", "answer": "Yes", "answer_type": "CLOSED", "q_lang": "en"}
    records = [asked | {"qid": number, "img_name": name} for number, name in enumerate(names)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    before = sorted(tmp_path.rglob("*"))
    dataset, report = load_vqa("slake", "train", path=tmp_path)
    # The last is no picture, the one before it has a name like any other, and the second one too many pixels.
    assert [row["image_id"] for row in dataset.remove_columns("image")] == [
        "good/source.jpg", "..\\up.jpg", "wide/source.jpg", "inner.zip",
    ]  # fmt: skip
    assert len(report.missing_images) == len(names) - 4
    assert dataset[0]["image"].size == (20, 10)
    for row in (2, 3):
        with pytest.raises((OSError, Image.DecompressionBombError)):
            dataset[row]
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "up.jpg").exists()


# Memory

MEGABYTES = 600  # above what the imports take, for all of these
WRONG_SHAPE, FEW = "holds weights of the wrong shape", "bytes, too few for its"
VOCABULARY = {"text_config": {"vocab_size": 2**24}}
# What is stated, and what refuses it.
OWN_BOMBS = {
    "own-wide": ({"text_config": {"hidden_size": 2**20, "num_attention_heads": 2**14, "head_dim": 2**14}}, WRONG_SHAPE),
    "own-long": ({"text_config": {"intermediate_size": 2**22}}, WRONG_SHAPE),
    "own-tower": ({"vision_config": {"image_size": 2**14, "patch_size": 1}}, WRONG_SHAPE),
    "own-vocabulary": (VOCABULARY, f"{WRONG_SHAPE}: lm_head.weight (100, 16) instead of (16777216, 16)"),
    "own-deep": ({"text_config": {"num_hidden_layers": 200}}, "lacks weights of the model"),
    "own-gigabytes": ({}, "bytes; allowed are at most"), "own-devices": (VOCABULARY, FEW),
    "own-quantised": (VOCABULARY | {"quantization_config": {"a": "b"}}, FEW),
}  # fmt: skip
BOMBS = {name: message for name, (_, message) in OWN_BOMBS.items()} | {
    "released-wide": WRONG_SHAPE, "adapter-rank": "cannot be loaded: ", "merge-rank": "cannot be loaded",
    "projector-packed.bin": "it is compressed", "projector-bytes.bin": "it names '__builtin__ bytearray' in its pickle",
}  # fmt: skip
# In a process of its own, whose memory is limited: beyond the limit is a `MemoryError` or a `RuntimeError` of torch.
_CHILD = """
import resource, sys
from pathlib import Path
import torch
from lladamedv.conversion import initialize_checkpoint
from lladamedv.hub_cards.push import push_folder
from lladamedv.loading import load_model
import peft
root, megabytes = Path(sys.argv[1]), int(sys.argv[2])
load_model()
def memory():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (memory() + megabytes * 2**20,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tries = {
    "projector": lambda file: initialize_checkpoint(root / "llada", root / "siglip", root / "new", file),
    "merge": lambda folder: push_folder(folder, "me/x", adapter_merge=True, dry_run=True),
}
for path in sorted(root.glob("*-*")):
    try:
        tries.get(path.name.partition("-")[0], load_model)(path)
        outcome = "loaded"
    except ValueError as error:
        outcome = "refused: " + " ".join(str(error).split())
    except BaseException as error:
        outcome = repr(error)
    print(path.name, outcome, sep="\\t", flush=True)
print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, sep="\\t")
"""


def write_bombs(root: Path, own: Path) -> None:
    for name, (values, _) in OWN_BOMBS.items():
        change(shutil.copytree(own, root / name) / "config.json", **values)
    # As several devices save their weights.
    save_file({"x": torch.ones(1)}, root / "own-devices" / "shard-00001-model-00001-of-00001.safetensors")
    with (root / "own-gigabytes" / "config.json").open("wb") as file:  # of nothing: a file with a hole
        file.truncate(2**35)
    adapter = write_adapter(root / "adapter-rank", str(DEMO_MODEL))
    write_card(adapter)
    change(adapter / "adapter_config.json", r=10**9)
    shutil.copytree(adapter, root / "merge-rank")
    tiny_tokenizer().save_pretrained(released.write_olmo(root / "llada"))
    released.write_tower(root / "siglip")
    wide = released.OLMO_CONFIG | {"d_model": 2**20, "n_layers": 300}
    released.write(root / "released-wide", wide, released.olmo_weights())
    # A thousandth of the size when it is packed, and a call that `weights_only` allows.
    plain = BytesIO()
    torch.save({"model.mm_projector.0.weight": torch.zeros(2**24)}, plain)
    packed = zipfile.ZipFile(root / "projector-packed.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(plain) as source, packed as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    torch.save({"x": _Bytes()}, root / "projector-bytes.bin")


class _Bytes:
    def __reduce__(self):
        return bytearray, (2**31,)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are Linux's")
def test_refusals_take_no_memory(tmp_path, own):
    write_bombs(tmp_path, own)
    command = [sys.executable, "-c", _CHILD, str(tmp_path), str(MEGABYTES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, (_, peak) = [line.split("\t") for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == set(BOMBS)
    assert all(outcome.startswith("refused: ") and BOMBS[name] in outcome for name, outcome in lines), lines
    assert int(peak) < MEGABYTES
