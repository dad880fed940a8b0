"""The cache of vision features: the same bits as the tower's, no needless runs, no stale or half files."""

import copy
import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lladamedv import LLaDAMedVConfig, LLaDAMedVForConditionalGeneration, LLaDAMedVProcessor
from lladamedv.trainers.image_feature_cache import ImageFeatureCache
from tests.tiny import image_prompt, random_image, small_vocabulary_config, tiny_model, tiny_processor


def frozen(aspect_ratio="square", seed=0):
    model = tiny_model(aspect_ratio, seed)
    model.model.vision_tower.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def anyres_processor():
    return tiny_processor("anyres_max_4")


@pytest.fixture
def processors(processor, anyres_processor):
    return {"square": processor, "pad": processor, "anyres_max_4": anyres_processor}


def batch(processor, *prompts):
    """Model inputs for images: a number stands for one image in a prompt of its own, a tuple for several in one."""
    sizes = [(40, 30), (30, 100), (64, 64), (100, 20), (32, 32)]
    images = [
        [random_image(*sizes[number % 5], seed=number) for number in (row if isinstance(row, tuple) else [row])]
        for row in prompts
    ]
    return dict(processor.image_processor(images, return_tensors="pt"))


@contextmanager
def tower_runs(model):
    """The tiles of each run of the vision tower."""
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, inputs, output: runs.append(inputs[0]))
    yield runs
    hook.remove()


def files(folder):
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("aspect_ratio", ["square", "pad", "anyres_max_4"])
def test_the_same_bits_as_the_tower_and_then_without_it(processors, aspect_ratio, tmp_path):
    model = frozen(aspect_ratio)
    inputs = batch(processors[aspect_ratio], 0, 1, (2, 3), 4)
    # The prompts show the third and fourth image together, and the first one twice.
    inputs |= {"image_index": torch.tensor([0, 1, 2, 3, 4, 0]), "batch_num_images": torch.tensor([1, 1, 2, 1, 1])}
    with torch.no_grad():
        expected = model.model.get_vision_features(**inputs)
    tiles = {"square": 5, "pad": 5, "anyres_max_4": (1 + 1 * 2) + (1 + 4 * 1) + 1 + 1 + (1 + 1)}[aspect_ratio]
    with tower_runs(model) as runs:
        cache = ImageFeatureCache(tmp_path / "new" / "cache", model, processors[aspect_ratio])
        computed = cache.vision_features(model, **inputs)
        assert [len(run) for run in runs] == [tiles] and (cache.hits, cache.misses) == (0, 5)
        again = cache.vision_features(model, **inputs)
        assert len(runs) == 1 and (cache.hits, cache.misses) == (5, 5)
        cache = ImageFeatureCache(str(cache.folder), model, processors[aspect_ratio])
        later = cache.vision_features(model, **inputs)
        assert len(runs) == 1 and (cache.hits, cache.misses) == (5, 0)
    for features in (computed, again, later):
        assert torch.equal(features, expected) and features.dtype == expected.dtype and not features.requires_grad


def test_only_what_is_missing_runs(anyres_processor, tmp_path):
    """Known images are read, wherever they stand and with whatever they are padded; a new one runs alone, and once if
    it is there twice; beside another image in its prompt an image is another one."""
    model = frozen("anyres_max_4")
    cache = ImageFeatureCache(tmp_path, model, anyres_processor)
    first = batch(anyres_processor, 0, 4)  # 3 and 2 tiles
    cache.vision_features(model, **first)
    second = batch(anyres_processor, 4, 2, 0, 2)  # 2, 5, 3 and 5 tiles
    with tower_runs(model) as runs, torch.no_grad():
        features = cache.vision_features(model, **second)
        assert (cache.hits, cache.misses) == (3, 3)
        assert len(runs) == 1 and torch.equal(runs[0], second["pixel_values"][1, : 1 + 2 * 2])
        torch.testing.assert_close(features, model.model.get_vision_features(**second), atol=1e-5, rtol=1e-5)
        runs.clear()
        together = batch(anyres_processor, (0, 1))
        features = cache.vision_features(model, **together)
        assert (cache.hits, cache.misses) == (3, 5) and features.shape[1] == 1 and [len(run) for run in runs] == [2]


def test_what_makes_an_image_another_one(anyres_processor, tmp_path):
    """Any pixel of a tile that counts, their type, and the size that the image had; not what fills up the batch."""
    model = frozen("anyres_max_4")
    cache = ImageFeatureCache(tmp_path, model, anyres_processor)
    pixels, size = torch.ones(1, 5, 3, 32, 32, dtype=torch.bfloat16), torch.tensor([[64, 32]])  # 3 tiles count
    filled, last_tile, base_tile = pixels.clone(), pixels.clone(), pixels.clone()
    filled[0, 3], last_tile[0, 2, 0, 0, 0], base_tile[0, 0, 2, 31, 31] = 5, 2, 2
    same_bytes = pixels.view(torch.float16)
    cache.vision_features(model, pixels, size)
    cache.vision_features(model, filled, size)
    assert (cache.hits, cache.misses) == (1, 1)
    others = [(last_tile, size), (base_tile, size), (same_bytes, size), (pixels, size - 1), (pixels, size.flip(1))]
    for known, (other, its_size) in enumerate(others, start=1):
        cache.vision_features(model, other, its_size)
        assert (cache.hits, cache.misses) == (1, known + 1)


@torch.no_grad()
def test_logits_are_those_of_the_pixels(processor, tmp_path):
    model = frozen()
    ids = torch.cat([image_prompt((5, 6, 98)), image_prompt((7, 8, 98))])
    inputs = batch(processor, 0, 1)
    cache = ImageFeatureCache(tmp_path, model, processor)
    cache.vision_features(model, **inputs)
    features = cache.vision_features(model, **inputs)
    layout = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert cache.hits == 2
    assert torch.equal(model(ids, vision_features=features, **layout).logits, model(ids, **inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_as_it_is(processor, dtype, tmp_path):
    model = frozen().to(dtype)
    inputs = batch(processor, 0, 1)
    cache = ImageFeatureCache(tmp_path, model, processor)
    cache.vision_features(model, **inputs)
    assert {load_file(file)["features"].dtype for file in files(tmp_path)} == {dtype}
    with torch.no_grad():
        expected = model.model.get_vision_features(**inputs)
    features = cache.vision_features(model, **inputs)
    assert cache.hits == 2 and features.dtype == dtype and torch.equal(features, expected)


def test_autocast_is_not_mixed_with_full_precision(processor, tmp_path):
    model = frozen()
    inputs = batch(processor, 0)
    cache = ImageFeatureCache(tmp_path, model, processor)
    full = cache.vision_features(model, **inputs)
    for hits in (0, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            rough = cache.vision_features(model, **inputs)
            assert cache.hits == hits and torch.equal(rough, model.model.get_vision_features(**inputs))
    assert not torch.equal(rough, full)
    assert torch.equal(cache.vision_features(model, **inputs), full) and cache.misses == 2


def test_features_have_the_dtype_of_the_tower(processor, tmp_path):
    """Even where it computes in another one; otherwise what is read would not be what was computed."""
    model = frozen()

    def widen(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.double()
        return output

    model.model.vision_tower.register_forward_hook(widen)
    cache = ImageFeatureCache(tmp_path, model, processor)
    computed, read = (cache.vision_features(model, **batch(processor, 0)) for _ in range(2))
    assert computed.dtype == torch.float32 and torch.equal(computed, read) and cache.hits == 1


def test_no_gradient_comes_out_of_the_tower(processor, tmp_path):
    """Gradient checkpointing makes its embeddings require one."""
    model = frozen()
    model.enable_input_require_grads()
    inputs = batch(processor, 0)
    cache = ImageFeatureCache(tmp_path, model, processor)
    assert not any(cache.vision_features(model, **inputs).requires_grad for _ in range(2))


def test_dropout_is_not_kept(processor, tmp_path):
    config = small_vocabulary_config().to_dict()
    config["vision_config"]["attention_dropout"] = 0.5
    model = LLaDAMedVForConditionalGeneration(LLaDAMedVConfig(**config)).train()
    model.model.vision_tower.requires_grad_(False)
    inputs = batch(processor, 0)
    features = ImageFeatureCache(tmp_path, model, processor).vision_features(model, **inputs)
    assert model.model.vision_tower.encoder.layers[0].training
    with torch.no_grad():
        assert not torch.equal(model.model.get_vision_features(**inputs), features)
        assert torch.equal(model.eval().model.get_vision_features(**inputs), features)


@torch.no_grad()
def change_tower(model, processor):
    model.model.vision_tower.encoder.layers[1].mlp.fc1.weight[3, 5] += 1e-3


def change_tower_config(model, processor):
    model.model.vision_tower.config.layer_norm_eps = 1e-5


def change_processor(model, processor):
    processor.image_processor.image_mean = [0.5, 0.4, 0.5]


def change_dtype(model, processor):
    model.to(torch.bfloat16)


def change_dtype_and_processor(model, processor):
    change_dtype(model, processor)
    change_processor(model, processor)


@pytest.mark.parametrize(
    ("change", "named", "unnamed"),
    [
        (change_tower, r"the vision tower \(sha256 \w{12}… there, \w{12}… here\)\. ", "dtype|settings|format"),
        (change_tower_config, "the vision tower", "dtype|settings|format"),
        (change_processor, r"the processor settings image_mean \(\[0.5, 0.5, 0.5\] there, \[0.5, 0.4", "tower|dtype"),
        (change_dtype, r"the dtype \(float32 there, bfloat16 here\)\. ", "tower|settings|format"),
        (change_dtype_and_processor, r"the dtype .*; the processor settings image_mean", "tower|format"),
    ],
)
def test_a_stale_cache_is_refused(change, named, unnamed, tmp_path):
    model, processor = frozen(), tiny_processor()
    ImageFeatureCache(tmp_path, model, processor).vision_features(model, **batch(processor, 0))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    change(model, processor)
    with pytest.raises(ValueError, match=named) as error:
        ImageFeatureCache(tmp_path, model, processor)
    message = str(error.value)
    assert message.startswith(f"`cache_image_features` is {str(tmp_path)!r}, which holds features of something else.")
    assert message.endswith("Name another folder, or delete this one.")
    described = message.replace(str(tmp_path), "").replace("holds features of something else", "")
    for word in unnamed.split("|"):
        assert word not in described
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_another_format_is_refused(processor, tmp_path):
    model = frozen()
    ImageFeatureCache(tmp_path, model, processor)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": "lladamedv image features, version 0"}))
    with pytest.raises(ValueError, match=r"`cache_image_features` is .* the format \('lladamedv .* version 0' there"):
        ImageFeatureCache(tmp_path, model, processor)


def test_what_has_nothing_to_do_with_the_tower_is_accepted(processor, tmp_path):
    """Another projector and language model, adapters on the latter, and a saved and loaded copy of model and
    processor."""
    model = frozen()
    inputs = batch(processor, 0, 1)
    features = ImageFeatureCache(tmp_path / "cache", model, processor).vision_features(model, **inputs)
    other = frozen(seed=1)
    other.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    adapters = LoraConfig(target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(copy.deepcopy(model), adapters)
    model.save_pretrained(tmp_path / "saved")
    loaded = LLaDAMedVForConditionalGeneration.from_pretrained(tmp_path / "saved")
    loaded.model.vision_tower.requires_grad_(False)
    processor.save_pretrained(tmp_path / "saved")
    loaded_processor = LLaDAMedVProcessor.from_pretrained(tmp_path / "saved")
    for twin, its_processor in ((other, processor), (adapted.get_base_model(), processor), (loaded, loaded_processor)):
        cache = ImageFeatureCache(tmp_path / "cache", twin, its_processor)
        with tower_runs(twin) as runs:
            assert torch.equal(cache.vision_features(twin, **inputs), features)
            assert not runs and (cache.hits, cache.misses) == (2, 0)


def make_text_file(folder):
    (folder / "thesis.tex").write_text("years of work")


def make_hidden_file(folder):
    (folder / ".git").mkdir()


def make_web_manifest(folder):
    (folder / "manifest.json").write_text('{"name": "a web page", "icons": []}')


def make_list(folder):
    (folder / "manifest.json").write_text("[1, 2]")


def make_other_text(folder):
    (folder / "manifest.json").write_text("dear diary")


@pytest.mark.parametrize("make", [make_text_file, make_hidden_file, make_web_manifest, make_list, make_other_text])
def test_a_folder_of_something_else_is_refused(processor, make, tmp_path):
    make(tmp_path)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"`cache_image_features` is .*(holds other files|the format \(None there)"):
        ImageFeatureCache(tmp_path, frozen(), processor)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_file_is_no_folder(processor, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`cache_image_features` is '.*file', which is a file; it must be a folder"):
        ImageFeatureCache(tmp_path / "file", frozen(), processor)


def test_a_half_written_manifest_is_no_foreign_file(processor, tmp_path, monkeypatch):
    """A run that was killed at its very beginning can start again."""
    model = frozen()
    monkeypatch.setattr(os, "replace", lambda source, target: os._exit(9))
    killed = multiprocessing.get_context("fork").Process(target=ImageFeatureCache, args=(tmp_path, model, processor))
    killed.start()
    killed.join()
    monkeypatch.undo()
    assert killed.exitcode == 9 and [file.name[:14] for file in tmp_path.iterdir()] == ["manifest.json."]
    ImageFeatureCache(tmp_path, model, processor)
    ImageFeatureCache(tmp_path, model, processor)


def test_a_full_disk_leaves_nothing_behind(processor, tmp_path, monkeypatch):
    model = frozen()
    cache = ImageFeatureCache(tmp_path, model, processor)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.vision_features(model, **batch(processor, 0))
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["manifest.json"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(file):
    file.write_bytes(file.read_bytes()[:20])


def empty(file):
    file.write_bytes(b"")


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def lose_a_tile(file):
    save_file({"features": load_file(file)["features"][:-1].clone()}, file)


def lose_precision(file):
    save_file({"features": load_file(file)["features"].half()}, file)


def rename_tensor(file):
    save_file({"other": load_file(file)["features"]}, file)


@pytest.mark.parametrize("damage", [cut, cut_header, empty, zero, lose_a_tile, lose_precision, rename_tensor])
def test_a_damaged_file_is_made_anew(anyres_processor, damage, tmp_path, caplog):
    model = frozen("anyres_max_4")
    inputs = batch(anyres_processor, 0)
    expected = ImageFeatureCache(tmp_path, model, anyres_processor).vision_features(model, **inputs)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    damage(file)
    cache = ImageFeatureCache(tmp_path, model, anyres_processor)
    assert torch.equal(cache.vision_features(model, **inputs), expected)
    assert (cache.hits, cache.misses) == (0, 1) and file.read_bytes() == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"] and str(file) in caplog.text
    assert torch.equal(cache.vision_features(model, **inputs), expected) and cache.hits == 1


def test_a_trained_tower_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match=r"`cache_image_features` is .* tower is trained \(embeddings\.patch_embed"):
        ImageFeatureCache(tmp_path / "cache", tiny_model(), processor)
    tower_adapters = get_peft_model(frozen(), LoraConfig(target_modules=["q_proj"])).get_base_model()
    with pytest.raises(ValueError, match=r"the vision tower is trained \(encoder\..*lora_A"):
        ImageFeatureCache(tmp_path / "cache", tower_adapters, processor)
    assert not (tmp_path / "cache").exists()
    model = frozen()
    cache = ImageFeatureCache(tmp_path / "cache", model, processor)
    model.model.vision_tower.encoder.layers[1].requires_grad_(True)
    with pytest.raises(ValueError, match="the vision tower is trained"):
        cache.vision_features(model, **batch(processor, 0))


def test_a_text_only_model_is_refused(processor, tmp_path):
    config = small_vocabulary_config().to_dict()
    config |= {"text_only": True, "vision_config": None, "image_grid_pinpoints": None}
    model = LLaDAMedVForConditionalGeneration(LLaDAMedVConfig(**config))
    with pytest.raises(ValueError, match=r"`cache_image_features` is .* text-only"):
        ImageFeatureCache(tmp_path, model, processor)


def test_bad_input_is_the_models_error(anyres_processor, tmp_path):
    model = frozen("anyres_max_4")
    cache = ImageFeatureCache(tmp_path, model, anyres_processor)
    with pytest.raises(ValueError, match="`image_sizes` is None, but"):
        cache.vision_features(model, torch.zeros(1, 1, 3, 32, 32))
    with pytest.raises(ValueError, match="expected 5 dimensions"):
        cache.vision_features(model, torch.zeros(1, 3, 32, 32))


# Processes: forked, because importing everything anew takes longer than all other tests together. Like a DataLoader's
# workers they must not use the thread pool that they inherit broken.


@contextmanager
def forked(function, *arguments):
    def run():
        torch.set_num_threads(1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def write_slowly(path, data):
    """`Path.write_bytes`, stretched so that a kill mostly falls into it."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 100):
            file.write(data[start : start + 100])
            time.sleep(0.001)


def write_until_killed(folder, model, processor, images, writing):
    Path.write_bytes = write_slowly
    cache = ImageFeatureCache(folder, model, processor)
    writing.set()
    while True:
        for image in images:
            cache.vision_features(model, **image)
        for file in files(folder):
            file.unlink()


def test_a_killed_process_leaves_no_half_file(processor, tmp_path, caplog):
    model = frozen()
    images = [batch(processor, number) for number in range(3)]
    with torch.no_grad():
        expected = [model.model.get_vision_features(**image) for image in images]
    delays = random.Random(0)
    whole = interrupted = 0
    for round_number in range(10):
        folder = tmp_path / str(round_number)
        writing = multiprocessing.get_context("fork").Event()
        with forked(write_until_killed, folder, model, processor, images, writing) as process:
            assert writing.wait(60)
            time.sleep(delays.uniform(0, 0.1))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
        for file in files(folder):
            assert load_file(file)["features"].shape == (1, 16, 16)
            whole += 1
        interrupted += sum(1 for file in folder.glob("*/*") if file.suffix != ".safetensors")
        cache = ImageFeatureCache(folder, model, processor)
        for image, features in zip(images, expected):
            assert torch.equal(cache.vision_features(model, **image), features)
    assert not caplog.records
    assert whole and interrupted, "no kill fell into a write: this test shows nothing"


def fill(folder, model, processor, inputs, together, out):
    together.wait()
    cache = ImageFeatureCache(folder, model, processor)
    for number in range(len(inputs["pixel_values"])):
        together.wait()
        image = {name: value[number : number + 1] for name, value in inputs.items()}
        torch.save(cache.vision_features(model, **image), out / f"{number}.pt")


def test_two_processes_share_a_folder(processor, tmp_path, caplog):
    model = frozen()
    inputs = batch(processor, *range(6))
    context = multiprocessing.get_context("fork")
    for round_number in range(8):
        folder, together = tmp_path / f"{round_number}-cache", context.Barrier(2, timeout=20)
        outs = [tmp_path / f"{round_number}-{name}" for name in ("a", "b")]
        for out in outs:
            out.mkdir()
        with (
            forked(fill, folder, model, processor, inputs, together, outs[0]) as one,
            forked(fill, folder, model, processor, inputs, together, outs[1]) as two,
        ):
            one.join(60)
            two.join(60)
            assert (one.exitcode, two.exitcode) == (0, 0)
        cache = ImageFeatureCache(folder, model, processor)
        features = cache.vision_features(model, **inputs)
        assert (cache.hits, cache.misses) == (6, 0) and not caplog.records
        for out in outs:
            assert torch.equal(torch.cat([torch.load(out / f"{number}.pt") for number in range(6)]), features)
        assert sum(1 for file in folder.rglob("*") if file.is_file()) == 1 + 6


@pytest.mark.parametrize("first_look", ["iterdir", "exists"])
def test_another_process_may_come_in_between(processor, tmp_path, monkeypatch, first_look):
    """While one looks whether the folder is empty, or whether there is a manifest, another one makes both untrue."""
    model = frozen()
    inputs = batch(processor, 0)
    look, others = getattr(Path, first_look), []

    def interrupted(path):
        seen = look(path)
        seen = list(seen) if first_look == "iterdir" else seen
        if path in (tmp_path, tmp_path / "manifest.json") and not seen and not others:
            others.append(None)
            others.append(ImageFeatureCache(tmp_path, model, processor).vision_features(model, **inputs))
        return seen

    monkeypatch.setattr(Path, first_look, interrupted)
    cache = ImageFeatureCache(tmp_path, model, processor)
    assert torch.equal(cache.vision_features(model, **inputs), others[1]) and cache.hits == 1


def test_two_towers_that_claim_a_folder_at_once(processor, tmp_path):
    """One of the manifests stays, but neither run is given features of the other one."""
    models = frozen(), frozen(seed=1)
    inputs = batch(processor, 0)
    caches = []
    for model in models:
        caches.append(ImageFeatureCache(tmp_path, model, processor))
        (tmp_path / "manifest.json").unlink()
    for model, cache in zip(models, caches):
        features = cache.vision_features(model, **inputs)
        with torch.no_grad():
            assert torch.equal(features, model.model.get_vision_features(**inputs))
