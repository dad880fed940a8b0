"""Everything that TRL's SFTTrainer and SFTConfig take: it works as TRL says, or it is refused before any work."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from lladamedv.demo import DEMO_MODEL
from lladamedv.processing.processing_lladamedv import CHAT_TEMPLATES
from lladamedv.trainers import DataCollatorForMaskedDiffusion, MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer
from lladamedv.trainers.masked_diffusion_sft_config import NOT_APPLICABLE
from tests.test_masked_diffusion_sft_trainer import arguments, make_trainer, rows, seen_by, trained
from tests.training import LORA, losses, tiny_model, tiny_processor


# Every field of SFTConfig that is not refused. A new one fails the test below until it is found to work, or refused.
WORKS = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps
    auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps save_only_model save_strategy
    save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
    hub_model_id hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
    train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval
    do_predict resume_from_checkpoint local_rank model_init_kwargs trust_remote_code chat_template_path dataset_kwargs
    max_length shuffle_dataset pad_to_multiple_of assistant_only_loss activation_offloading
    """.split()
)
ASKED = {
    "packing": True, "packing_strategy": "wrapped", "padding_free": True, "eval_packing": True,
    "completion_only_loss": True, "loss_type": "dft", "label_smoothing_factor": 0.1, "router_aux_loss_coef": 0.01,
    "dataset_text_field": "prompt", "dataset_num_proc": 2, "truncation_mode": "keep_end", "eos_token": "<|eot_id|>",
    "pad_token": "<|eot_id|>", "use_cache": True, "use_liger_kernel": True, "liger_kernel_config": {"rope": True},
    "average_tokens_across_devices": False, "include_num_input_tokens_seen": "all", "label_names": ["labels"],
    "include_for_metrics": ["inputs"], "batch_eval_metrics": True, "hub_strategy": "every_save",
    "hub_always_push": True, "cache_image_features": "cache",
}  # fmt: skip


def test_everything_is_known():
    """Without this a field or an argument that TRL adds would be accepted and do nothing."""
    inherited = {each.name for each in fields(SFTConfig)}
    assert not WORKS & NOT_APPLICABLE.keys() and inherited <= WORKS | NOT_APPLICABLE.keys()
    assert ASKED.keys() == NOT_APPLICABLE.keys()
    ours, theirs = (inspect.signature(each.__init__) for each in (MaskedDiffusionSFTTrainer, SFTTrainer))
    assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_means_nothing_here_is_refused(tmp_path, name):
    """In our own arguments and in TRL's, by name, value and reason."""
    ours_only = name in ("hub_strategy", "cache_image_features")  # TRL's default, and no option of TRL's
    for kind in (MaskedDiffusionSFTConfig, SFTConfig)[: 2 - ours_only]:
        with pytest.raises(ValueError, match=rf"`{name}` is .*{ASKED[name]!r}.*, which does not apply.*: .{{10,}}\.$"):
            args = kind(str(tmp_path), use_cpu=True, **{name: ASKED[name]})
            MaskedDiffusionSFTTrainer(tiny_model(), args, train_dataset=rows(2), processing_class=tiny_processor())


def test_neutral_values_pass(tmp_path):
    defaults = {each.name: each.default for each in fields(SFTConfig) if each.default is not MISSING}
    neutral = {name: defaults[name] for name in NOT_APPLICABLE if name in defaults and name != "hub_strategy"}
    neutral |= {"eval_packing": False, "router_aux_loss_coef": 0.0, "include_num_input_tokens_seen": "non_padding"}
    neutral |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    neutral |= {"assistant_only_loss": True, "prediction_loss_only": True}
    assert losses(trained(tmp_path, max_steps=1, **neutral)) == losses(trained(tmp_path, max_steps=1))


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
STREAM = rows(2).to_iterable_dataset()


def given(**options):
    return lambda folder: {"args": arguments(folder, **options), "train_dataset": STREAM}


def adapted(**options):
    return get_peft_model(tiny_model(), LoraConfig(**LORA, **options))


def projector_unfrozen():
    model = adapted()
    model.get_base_model().model.multi_modal_projector.requires_grad_(True)
    return model


def injected():
    model = tiny_model()
    model._hf_peft_config_loaded = True  # what `AutoModel.from_pretrained(adapters)` leaves
    return model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compute_loss_func": print}, ValueError, "`compute_loss_func` does not apply.*`loss_weighting`"),
        ({"compute_metrics": print}, ValueError, "`compute_metrics` does not apply.*`log_answers`"),
        ({"preprocess_logits_for_metrics": print}, ValueError, "`preprocess_logits_for_metrics` does not apply"),
        ({"formatting_func": print}, ValueError, "`formatting_func` does not apply.*`messages`"),
        ({"data_collator": print}, TypeError, "`data_collator` is a builtin.*; needed is a DataC"),
        ({"train_dataset": None}, ValueError, "`train_dataset` is required"),
        ({"train_dataset": rows(2).to_list()}, TypeError, r"`train_dataset` is of type list.*Dataset.from_list\(rows"),
        ({"train_dataset": datasets.DatasetDict(train=rows(2))}, TypeError, "`train_dataset` is of type DatasetDict"),
        ({"eval_dataset": rows(2).to_list()}, TypeError, "`eval_dataset` is of type list"),
        ({"eval_dataset": {"a": [1]}}, TypeError, r"`eval_dataset\['a'\]` is of type list"),
        ({"eval_dataset": rows(2).select([])}, ValueError, "`eval_dataset` is empty|of which none can be trained on"),
        ({"train_dataset": datasets.IterableDataset.from_generator(lambda: iter(()))}, ValueError, "is empty"),
        ({"args": {"max_steps": 1}}, TypeError, "`args` is of type dict; allowed are MaskedDiffusionSFTConfig"),
        ({"processing_class": tiny_processor().tokenizer}, TypeError, "needed is the processor .*AutoProcessor"),
        ({"model": torch.nn.Linear(2, 2)}, ValueError, "`model` is a Linear; needed is a LLaDAMedVForConditionalGen"),
        ({"model": torch.nn.Linear(2, 2), "args": None}, ValueError, "`model` is a Linear; needed is a LLaDAMedVFor"),
        (  # before any row is read
            {"peft_config": PrefixTuningConfig(**VIRTUAL), "train_dataset": rows(2).select([])}, ValueError,
            "Adapters that learn a prompt",
        ),
        ({"peft_config": PromptTuningConfig(**VIRTUAL)}, ValueError, "Adapters that learn a prompt"),
        (
            {"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), None)}, ValueError,
            "`optimizers` holds an optimizer of none of the weights",
        ),
        (given(chat_template_path="Qwen/Qwen3"), ValueError, "`chat_template_path` is 'Qwen/Qwen3'; allowed is a Jinj"),
        (given(train_sampling_strategy="group_by_length"), ValueError, "but `train_dataset` is a stream"),
        # Weights that could not be trained, or would not be saved.
        ({"model": adapted().requires_grad_(False)}, ValueError, "adapters, all of them frozen; .*is_trainable=True"),
        ({"model": projector_unfrozen()}, ValueError, "projector.* is trainable, but not saved .*`modules_to_save`"),
        ({"model": injected()}, ValueError, "`model` holds adapters of its own; .*`PeftModel.from_pretrained"),
        (
            lambda folder: {"model": adapted(), "args": arguments(folder, trainable="projector")}, ValueError,
            "`trainable` is 'projector', but adapters are trained instead",
        ),
        (
            {"model": adapted(), "peft_config": LoraConfig(**LORA)}, ValueError,
            "`PeftModel` instance together with a `peft_config`",
        ),
        ({"model": tiny_model().requires_grad_(False)}, ValueError, "comes with a projector that is frozen; .*require"),
        (
            lambda folder: {
                "data_collator": DataCollatorForMaskedDiffusion(processor=tiny_processor(), max_length=400),
                "args": arguments(folder, eos_padding=4),
            },
            ValueError, "`args` ask for eos_padding=4, but `data_collator` has 0",
        ),
    ],
)  # fmt: skip
def test_what_the_constructor_refuses(tmp_path, options, error, message):
    options = options(tmp_path) if callable(options) else options
    defaults = {"args": arguments(tmp_path), "train_dataset": rows(2), "processing_class": tiny_processor()}
    with pytest.raises(error, match=message):
        MaskedDiffusionSFTTrainer(**{"model": tiny_model(), **defaults, **options})


# What TRL accepts instead of our own classes


def test_a_model_by_name_and_no_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (str(DEMO_MODEL), Path(DEMO_MODEL)):
        trainer = MaskedDiffusionSFTTrainer(name, train_dataset=rows(2))
        assert trainer.args.output_dir == f"{Path(DEMO_MODEL).name}-SFT"
        assert isinstance(trainer.args, MaskedDiffusionSFTConfig)
        assert trainer.model.dtype == torch.float32  # TRL's default, whatever the checkpoint's
    args = arguments(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert MaskedDiffusionSFTTrainer(str(DEMO_MODEL), args, train_dataset=rows(2)).model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_arguments_of_others(tmp_path, kind):
    """Their values are kept, in training too; what TRL cuts at is no limit here."""
    given = {"max_steps": 2, "learning_rate": 3e-3, "logging_steps": 1, "seed": 3, "hub_token": "secret", "bf16": False}
    given |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "warmup_steps": 0, "report_to": []}
    args = kind(str(tmp_path), use_cpu=True, save_strategy="no", **given)
    theirs = MaskedDiffusionSFTTrainer(tiny_model(), args, train_dataset=rows(4), processing_class=tiny_processor())
    assert {name: getattr(theirs.args, name) for name in given} == given
    assert theirs.args.max_length is None and theirs.args.hub_private_repo is True
    theirs.train()
    assert losses(theirs) == pytest.approx(losses(trained(tmp_path, dataset=rows(4), **given)), rel=1e-5)


def test_a_collator_of_ones_own(tmp_path):
    collator = DataCollatorForMaskedDiffusion(processor=tiny_processor(), max_length=400, eos_padding=2)
    options = {"train_dataset": rows(2), "processing_class": tiny_processor()}
    assert MaskedDiffusionSFTTrainer(tiny_model(), arguments(tmp_path), collator, **options).data_collator is collator


def test_the_template_of_a_file_is_trained_with_and_saved(tmp_path):
    """The tokens of a batch are those that the template renders."""
    processor, file = tiny_processor(), tmp_path / "chat.jinja"
    file.write_text(next(text for text in CHAT_TEMPLATES.values() if text != processor.chat_template))
    trainer = make_trainer(tmp_path, chat_template_path=str(file), dataset=rows(1))
    messages = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
                for turn in rows(1)[0]["messages"]]  # fmt: skip
    messages[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(messages, chat_template=file.read_text(), tokenize=False)
    expected = processor(text=text, images=rows(1)[0]["images"], add_special_tokens=False, return_tensors="pt")
    assert torch.equal(trainer.data_collator([trainer.train_dataset[0]])["input_ids"], expected["input_ids"])
    trainer.save_model()
    assert type(processor).from_pretrained(tmp_path).chat_template == file.read_text()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_of_a_length_come_together(tmp_path, strategy):
    """Lengths are those of the tokens with the images; two long rows among six short ones share a batch."""
    data = rows(8).to_list()
    for number in (1, 6):
        data[number]["messages"][0]["content"] = "Why is that so? " * 12
    trainer = make_trainer(
        tmp_path, dataset=datasets.Dataset.from_list(data), train_sampling_strategy=strategy, num_train_epochs=1,
        max_steps=-1, gradient_accumulation_steps=4, eval_dataset=rows(4),
    )  # fmt: skip
    assert trainer.train_dataset["length"] == [len(trainer.data_collator([row])["input_ids"][0]) for row in data]
    seen = seen_by(trainer)
    trainer.train()
    assert {"row-1", "row-6"} in [{*seen[start : start + 2]} for start in range(0, 8, 2)]
    assert sorted(seen) == [f"row-{number}" for number in range(8)]
    trainer.evaluate()


def test_rows_given_to_evaluate_are_looked_at(tmp_path):
    """As those given to the trainer: packed, and refused when they are bad."""
    trainer = make_trainer(tmp_path, pack_questions=4, eval_dataset=rows(4))
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows(4))["eval_loss"] == trainer.predict(rows(4)).metrics["test_loss"] == expected
    assert trainer.row_reports["eval_dataset"].packed_into == 1
    bad = rows(2).to_list()
    bad[1]["messages"] = bad[1]["messages"][:1]
    with pytest.raises(ValueError, match=r"row-1.* has a problem: no assistant turn"):
        trainer.evaluate({"new": datasets.Dataset.from_list(bad)})


# Processes that do not know of each other


# Older versions of accelerate have such processes find each other, and wait for each other here.
apart = pytest.mark.skipif(Version(accelerate.__version__) < Version("1.15"), reason="accelerate is older than 1.15")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({"WORLD_SIZE": "2"}, "started as one of 2, but trains as one of 1.*--use_cpu true", marks=apart),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "4"}, "started as one of 4, but trains as one of 1", marks=apart),
        ({"MASTER_ADDR": "127.0.0.1"}, "started as one of several, but trains as one of 1.*MULTI_CPU starts one"),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}, None),
    ],
)
def test_an_environment_of_several_processes(tmp_path, monkeypatch, environment, message):
    """With `use_cpu=True` such processes would find each other, and wait for each other here."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        assert MaskedDiffusionSFTConfig(str(tmp_path), bf16=False).world_size == 1
    else:
        with pytest.raises(ValueError, match=message):
            MaskedDiffusionSFTConfig(str(tmp_path), bf16=False)
