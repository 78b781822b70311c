"""Every mistake ends in one sentence and the right exit code, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning import create_model
from ackd_lightning.cli import main
from ackd_lightning.models.weights import save_weights

TEACHER = Path("weights/digits_resnet20.safetensors")
RUN = "runs/digits_resnet20/t"
LAST = f"{RUN}/checkpoints/last.ckpt"
QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
QUICK += ["--data.max_per_class", "4", "--data.batch_size", "20"]
CE = ["fit", "--config", "digits_resnet20.yaml", *QUICK]
KD = ["fit", "--config", "digits_resnet20_resnet8.yaml", "--config", "kd.yaml", *QUICK]
ACKD = ["fit", "--config", "digits_resnet20_resnet8.yaml", "--model.teacher.gate", "off", *QUICK]
ATSC = ["fit", "--config", "digits_resnet20_resnet8_atsc.yaml", *QUICK]
ACN = ["fit", "--config", "digits_resnet8_acn.yaml", *QUICK]
AIKD = ["fit", "--config", "digits_resnet8_aikd.yaml", "--model.teacher.network", "resnet20", *QUICK]
AIKD += ["--model.teacher.weights", str(TEACHER), "--model.teacher.gate", "off"]
MINE = ["fit", "--config", "mine.yaml", *QUICK]
AGAIN = [*CE, "--model.student", "resnet8", "--name", "t", "--weights_dir", "null", "--ckpt_path", LAST]
FOLDER = ["fit", "--data", "ackd_lightning.data.ImageFolderDataModule", "--data.root", "mine", "--name", "x"]
FOLDER += ["--config", "ce.yaml", "--model.student", "resnet8", *QUICK]
TABLE = ["reproduce", "mine.yaml", "--dry-run"]
PAIR = "pairs: {a: {config: digits_resnet20_resnet8}}\n"


# ------------------------------------------------------------------------------------------- what a case finds


def text(content: str | bytes, name: str = "mine.yaml") -> Callable[[], None]:
    """A file."""
    return lambda: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def settings(changes: str, base: str = "digits_resnet20_resnet8") -> Callable[[], None]:
    """A configuration of one's own on top of a packaged one."""
    return text(f"include: [{base}]\n{changes}\n")


def teacher(write: Callable[[Path], object]) -> Callable[[], None]:
    """Replace the weight file of the teacher."""
    return lambda: (TEACHER.unlink(), write(TEACHER))[0]


def stating(**metadata: str) -> Callable[[], None]:
    """A teacher whose weight file has these metadata."""
    return teacher(lambda path: save_weights(create_model("resnet20", 10), path, metadata))


def cut(path: Path | str, size: int) -> Callable[[], None]:
    """The first bytes of a file alone."""
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size])


def checkpoint(change: Callable[[dict], object]) -> Callable[[], None]:
    """A run whose last checkpoint was changed."""

    def prepare() -> None:
        content = torch.load(LAST, weights_only=True)
        change(content)
        torch.save(content, LAST)

    return prepare


def images(
    count: int = 3,
    *,
    parts: tuple[str, ...] = ("train", "test"),
    kind: str = "png",
    then: Callable[[Path], object] = id,
) -> Callable[[], None]:
    """A folder of images of two classes, and something done to it."""

    def prepare() -> None:
        for part in parts:
            for name in ("cat", "dog"):
                place = Path("mine", part, name)
                place.mkdir(parents=True)
                for number in range(count):
                    pixels = np.full((16, 16, 3), number, np.uint8)
                    Image.fromarray(pixels).save(place / f"{number}.{kind}")
        then(Path("mine"))

    return prepare


def drop(key: str) -> Callable[[dict], object]:
    return lambda content: content["state_dict"].pop(key)


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Case:
    """A command line that must not work.

    Attributes:
        name: Name of the case.
        arguments: Command line after ``ackd``.
        words: Texts that the message must contain: value, place, remedy.
        prepare: Function that makes the files of the case.
        made: Whether the case needs the run and the teacher of the fixture.
        code: Exit code.
    """

    name: str
    arguments: list[str]
    words: tuple[str, ...]
    prepare: Callable[[], object] = list
    made: bool = False
    code: int = 2


FC = "student.backbone.fc.weight"
CASES = [
    # ------------------------------------------------------------------ keys
    Case("key_section", MINE, ("'trainr.max_epochs'", "mine.yaml", "did you mean 'trainer.max_epochs'"),
         settings("trainr: {max_epochs: 1}")),
    Case("key_top", MINE, ("'wat'", "mine.yaml", "known are"), settings("wat: 1")),
    Case("key_trainer", MINE, ("'trainer.max_epoch'", "mine.yaml", "did you mean 'trainer.max_epochs'"),
         settings("trainer: {max_epoch: 1}")),
    Case("key_of_a_class", MINE, ("'init_arg'", "model.optimizer.init_arg in mine.yaml", "did you mean 'init_args'"),
         settings("model: {optimizer: {init_arg: {lr: 1}}}")),
    Case("option_of_the_optimizer", [*CE, "--model.lr", "0.1"], ("'model.lr'", "did you mean 'model.optimizer.lr'")),
    Case("argument_beside_class_path", MINE, ("'temperature'", "below init_args"),
         settings("model: {method: {class_path: ackd_lightning.methods.KD, temperature: 2}}")),
    Case("key_of_a_method", MINE, ("'init_arg'", "model.method.init_arg in mine.yaml", "did you mean 'init_args'"),
         settings("model: {method: {init_arg: {}}}")),
    Case("key_model", MINE,
         ("warmup_epoch'", "model.recipe.warmup_epoch in mine.yaml", "did you mean", "warmup_epochs'"),
         settings("model: {recipe: {warmup_epoch: 1}}")),
    Case("key_method", MINE, ("model.method.temprature in mine.yaml", "did you mean 'model.method.temperature'"),
         settings("model: {method: {init_args: {temprature: 1}}}")),
    Case("key_data", MINE, ("data.batchsize in mine.yaml", "did you mean 'data.batch_size'"),
         settings("data: {init_args: {batchsize: 1}}")),
    Case("option_data", [*CE, "--data.batchsize", "3"], ("--data.batchsize", "did you mean 'data.batch_size'")),
    Case("option_section", [*CE, "--dat.batch_size", "3"], ("'dat.batch_size'", "did you mean")),
    Case("option_dash", [*CE, "--runs-dir", "x"], ("'runs-dir'", "did you mean 'runs_dir'")),
    Case("option_foreign_to_method", [*KD, "--model.method.branches", "[D3B1]"],
         ("--model.method.branches", "branches belongs to ACKD")),
    Case("option_abbreviated", [*CE, "--trainer.max_ep", "3"], ("'trainer.max_ep'", "did you mean")),
    Case("key_optimizer", MINE, ("model.optimizer.lrr in mine.yaml", "did you mean 'model.optimizer.lr'"),
         settings("model: {optimizer: {init_args: {lrr: 1}}}")),
    Case("key_teacher", MINE, ("gat'", "model.teacher.gat in mine.yaml", "did you mean"),
         settings("model: {teacher: {gat: 1}}")),
    Case("option_teacher", [*ACKD, "--model.teacher.gat", "x"],
         ("--model.teacher.gat", "did you mean 'model.teacher.gate'")),
    Case("option_teacher_elsewhere", [*ACKD, "--model.teacher.name", "x"],
         ("'model.teacher.name'", "did you mean 'model.teacher.network'")),
    Case("class_of_data", ["fit", "--config", "ce", "--model.student", "resnet8", "--data", "ImageFolder"],
         ("'ImageFolder'", "did you mean 'ImageFolderDataModule'")),
    Case("value_teacher", [*CE, "--model.teacher", "{name: resnet20}", "--name", "x"],
         ("'model.teacher.name'", "did you mean 'model.teacher.network'", "(--model.teacher)")),
    Case("option_foreign_to_optimizer", [*CE, "--model.optimizer", "AdamW", "--model.optimizer.momentum", "0.9"],
         ("--model.optimizer.momentum", "momentum belongs to", "SGD")),
    Case("option_without_value", [*CE, "--model.optimizer.lr"], ("--model.optimizer.lr needs a value",)),
    Case("stray_word", [*CE, "stray"], ("'stray'", "without an option")),
    # ----------------------------------------------------------------- types
    Case("type_text_for_list", [*CE, "--model.lr_scheduler.milestones", "3"],
         ("'3'", "--model.lr_scheduler.milestones", "a list, such as")),
    Case("type_in_list", [*CE, "--model.lr_scheduler.milestones", "[a]"],
         ("'a'", "--model.lr_scheduler.milestones", "whole number")),
    Case("type_fraction_for_int", [*CE, "--data.batch_size", "2.5"], ("'2.5'", "--data.batch_size", "whole number")),
    Case("type_trainer", [*CE, "--trainer.max_epochs", "two"], ("'two'", "--trainer.max_epochs", "whole number")),
    Case("type_seed", [*CE, "--seed_everything", "x"], ("'x'", "--seed_everything", "whole number")),
    Case("type_in_file", MINE, ("'hot'", "model.method.temperature in mine.yaml", "a number"),
         settings("model: {method: {init_args: {temperature: hot}}}")),
    Case("type_bool", [*ACKD, "--model.teacher.bf16", "perhaps"], ("'perhaps'", "--model.teacher.bf16", "true or false")),
    Case("type_mapping", [*CE, "--model.student.options", "3"], ("'3'", "--model.student.options", "a mapping")),
    Case("type_name_for_list", [*ACKD, "--model.method.branches", "D3B1"],
         ("'D3B1'", "--model.method.branches", "a list, such as")),
    Case("type_of_student", [*CE, "--model.student", "[resnet8]"], ("'[resnet8]'", "did you mean 'resnet8'")),
    Case("type_of_teacher", [*CE, "--model.teacher", "resnet20"],
         ("'resnet20'", "it holds settings, such as model.teacher.network and model.teacher.weights")),
    Case("type_model", [*CE, "--model", "3"], ("model", "set model.NAME")),
    Case("type_data", [*CE, "--data", "3"], ("'3'", "--data", "a class, such as")),
    Case("type_trainer_section", [*CE, "--trainer", "3"], ("trainer", "set trainer.NAME")),
    Case("type_model_in_file", MINE, ("setting model is '3'", "mine.yaml", "each on its own line"), text("model: 3\n")),
    Case("type_data_in_file", MINE,
         ("setting data is '[1]'", "mine.yaml", "each on its own line"), text("data: [1]\n")),
    Case("type_trainer_in_file", MINE, ("'hello'", "mine.yaml", "each on its own line"), text("trainer: hello\n")),
    Case("type_init_args", MINE, ("model.method.init_args is '3'", "mine.yaml"),
         settings("model: {method: {init_args: 3}}")),
    Case("type_class_path", MINE, ("model.method.class_path is '5'", "mine.yaml", "name of a class"),
         settings("model: {method: {class_path: 5}}")),
    Case("type_method", MINE, ("method is '5'", "mine.yaml", "a class, such as"),
         settings("model: {method: 5}")),
    Case("type_callbacks", [*CE, "--trainer.callbacks", "3"], ("'3'", "--trainer.callbacks", "a class, such as")),
    # ----------------------------------------------------------------- names
    Case("name_of_teacher", [*ACKD, "--model.teacher.network", "resnet21"], ("'resnet21'", "did you mean"), made=True),
    Case("name_in_timm", [*CE, "--model.student", "timm:resnet999"], ("'resnet999'", "did you mean")),
    Case("name_of_dataset", [*CE, "--data", "MNIST"], ("'MNIST'", "data", "package.Class")),
    Case("name_of_dataset_with_path", [*CE, "--data", "ackd_lightning.data.MNIST"],
         ("'ackd_lightning.data.MNIST'", "cannot be imported", "check its spelling")),
    Case("name_of_method", [*ACKD, "--model.method", "ackd_lightning.methods.KDD"],
         ("'ackd_lightning.methods.KDD'", "cannot be imported", "did you mean 'KD'")),
    Case("name_of_option_of_network", [*CE, "--model.student.options", "{widht: 3}"],
         ("'widht'", "'resnet20'", "leave it out")),
    Case("name_of_accelerator", [*CE, "--trainer.accelerator", "gpus"], ("'gpus'", "trainer.accelerator", "cuda")),
    Case("name_of_strategy", [*CE, "--trainer.strategy", "dpp"], ("'dpp'", "trainer.strategy", "ddp")),
    Case("name_of_profiler", [*CE, "--trainer.profiler", "foo"], ("trainer.profiler", "'simple'")),
    Case("name_of_precision", [*CE, "--trainer.precision", "fp8"], ("'fp8'", "--trainer.precision", "'bf16-mixed'")),
    Case("name_of_metric", TABLE, ("'foo'", "mine.yaml", "acc_top5"), text(PAIR + "metrics: [foo]\nrows: {kd: }\n")),
    Case("class_that_runs_code", MINE,
         ("'os.system'", "model", "leave class_path"), text("model: {class_path: os.system}\n")),
    Case("class_of_another_kind", [*KD, "--model.method", "torch.optim.AdamW"],
         ("'torch.optim.AdamW'", "model.method", "sub-class of Method")),
    Case("class_of_a_teacher", MINE, ("'os.system'", "model.teacher.network"),
         settings("model: {teacher: {network: {class_path: os.system}}}")),
    # --------------------------------------------------------------- branches
    Case("branch_of_other_depth", [*ACKD, "--model.method.branches", "[D3B1,D9B9]"], ("'D9B9'", "3 stages", "D2B2")),
    Case("branch_zero", [*ACKD, "--model.method.branches", "[D0B4,D3B1]"], ("'D0B4'", "3 stages", "D2B2")),
    Case("branch_that_is_none", [*ACKD, "--model.method.branches", "[foo,bar]"], ("'foo'", "3 stages", "D2B2")),
    Case("branches_empty", [*ACKD, "--model.method.branches", "[]"], ("branches is empty", "ACKD", "D3B1")),
    # ---------------------------------------------------------------- numbers
    Case("epochs_negative", [*CE, "--trainer.max_epochs", "-5"], ("trainer.max_epochs is -5", "at least 1")),
    Case("epochs_zero", [*CE, "--trainer.max_epochs", "0"], ("trainer.max_epochs is 0", "at least 1")),
    Case("steps_zero", [*CE, "--trainer.max_steps", "0"], ("trainer.max_steps is 0", "at least 1")),
    Case("dry_run_negative", [*CE, "--trainer.fast_dev_run", "-1"], ("trainer.fast_dev_run is -1", "at least 0")),
    Case("validation_every_0", [*CE, "--trainer.check_val_every_n_epoch", "0"],
         ("trainer.check_val_every_n_epoch is 0", "at least 1")),
    Case("accumulate_0", [*CE, "--trainer.accumulate_grad_batches", "0"],
         ("trainer.accumulate_grad_batches is 0", "at least 1")),
    Case("batches_0", [*CE, "--trainer.limit_train_batches", "0"], ("trainer.limit_train_batches is 0", "above 0")),
    Case("batches_share", [*CE, "--trainer.limit_train_batches", "1.5"], ("1.5", "trainer.limit_train_batches")),
    Case("mean_of_bytes", [*CE, "--data.mean", "[124, 116, 104]", "--data.std", "[58, 57, 57]"],
         ("mean is (124.0, 116.0, 104.0) in DigitsDataModule", "divide mean and std by 255")),
    Case("std_of_bytes", [*CE, "--data.mean", "[0.5, 0.5, 0.5]", "--data.std", "[58, 57, 57]"],
         ("std is (58.0, 57.0, 57.0) in DigitsDataModule", "divide it by 255")),
    Case("interval_0", [*CE, "--trainer.val_check_interval", "0"], ("trainer.val_check_interval is 0", "above 0")),
    Case("nodes_0", [*CE, "--trainer.num_nodes", "0"], ("trainer.num_nodes is 0", "at least 1")),
    Case("seed_negative", [*CE, "--seed_everything", "-1"], ("seed_everything is -1", "from 0")),
    Case("seed_huge", [*CE, "--seed_everything", "99999999999"], ("99999999999", "seed_everything", "4294967295")),
    Case("lr_infinite", MINE, ("lr is 'Infinity'", "model.optimizer.lr in mine.yaml"),
         settings("model: {optimizer: {init_args: {lr: .inf}}}")),
    Case("lr_decay", [*CE, "--model.lr_scheduler.gamma", "0"], ("gamma is 0", "above 0")),
    Case("warmup", [*CE, "--model.recipe.warmup_epochs", "-3"], ("warmup_epochs is -3", "at least 0")),
    Case("milestones", [*CE, "--model.lr_scheduler.milestones", "[-5]"], ("milestones is -5", "at least 0")),
    Case("momentum", [*CE, "--model.optimizer.momentum", "1.5"], ("momentum is 1.5", "below 1")),
    Case("clip", [*CE, "--model.recipe.gradient_clip_val", "-1"], ("gradient_clip_val is -1", "above 0")),
    Case("temperature_zero", [*KD, "--model.method.temperature", "0"], ("temperature is 0", "KD", "above 0")),
    Case("temperature_infinite", [*KD, "--model.method.temperature", ".inf"],
         ("model.method.temperature is inf", "finite")),
    Case("weight_negative", [*KD, "--model.method.weight_kd", "-1"], ("weight_kd is -1", "at least 0")),
    Case("lambda_negative", [*ACKD, "--model.method.lambda_adv", "-1"],
         ("lambda_adv is -1", "at least 0")),
    Case("attention_hidden", [*ACKD, "--model.method.attention_hidden", "0"], ("attention_hidden is 0", "at least 1")),
    Case("val_fraction_one", [*CE, "--data.val_fraction", "1"], ("val_fraction is 1", "below 1")),
    Case("val_fraction_negative", [*CE, "--data.val_fraction", "-0.1"], ("val_fraction is -0.1", "at least 0")),
    Case("train_fraction_zero", [*CE, "--data.train_fraction", "0"], ("train_fraction is 0", "above 0")),
    Case("max_per_class_zero", [*CE, "--data.max_per_class", "0"], ("max_per_class is 0", "at least 1")),
    Case("workers_negative", [*CE, "--data.num_workers", "-1"], ("num_workers is -1", "at least 0")),
    Case("eval_batch_zero", [*CE, "--data.eval_batch_size", "0"], ("eval_batch_size is 0", "at least 1")),
    # ---------------------------------------------------------------- devices
    Case("gpu_that_is_not_there", [*CE, "--trainer.accelerator", "gpu"],
         ("trainer.accelerator is gpu", "no GPU", "use cpu")),
    Case("more_processes_than_processors", [*CE, "--trainer.accelerator", "cpu", "--trainer.devices", "4096"],
         ("trainer.devices is 4096", "processors", "use at most")),
    Case("devices_zero", [*CE, "--trainer.accelerator", "cpu", "--trainer.devices", "0"],
         ("devices='0'", "change trainer.")),
    Case("batch_does_not_divide", [*CE, "--trainer.accelerator", "cpu", "--trainer.devices", "2",
         "--trainer.strategy", "ddp", "--data.batch_size", "21"], ("batch_size 21", "2 processes", "multiple of 2")),
    # ------------------------------------------------------------------- YAML
    Case("yaml_broken", MINE, ("mine.yaml, line 1", "not YAML", "--print_config"), text("a: [1,")),
    Case("yaml_bytes", MINE, ("mine.yaml", "not YAML", "0xff"), text(b"\xff\xfe\x00bad")),
    Case("yaml_list", MINE, ("mine.yaml holds a list", "key: value"), text("- a\n- b\n")),
    Case("yaml_text", MINE, ("mine.yaml holds a str", "key: value"), text("just text")),
    Case("yaml_empty", MINE, ("model", "missing", "--config"), text("")),
    Case("yaml_date", MINE, ("mine.yaml", "date '2020-01-01'", "quotes"), settings("name: 2020-01-01")),
    Case("yaml_date_that_is_none", MINE, ("mine.yaml", "not YAML", "month"), settings("name: 2020-13-01")),
    Case("yaml_circle", MINE, ("mine.yaml", "aliases"), text("x: &a [*a]\n")),
    Case("yaml_bomb", MINE, ("mine.yaml", "aliases"),
         text("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)))),
    Case("yaml_deep", MINE, ("mine.yaml", "not YAML"), text("[" * 5000)),
    Case("yaml_python", MINE, ("mine.yaml, line 1", "python/object", "correct it"),
         text("!!python/object:os.system {}\n")),
    Case("yaml_folder", ["fit", "--config", "mine.yaml"], ("mine.yaml", "no such file"),
         lambda: Path("mine.yaml").mkdir()),
    Case("include_missing", MINE, ("mine.yaml includes 'nothing_here'", "known are"),
         text("include: [nothing_here]\n")),
    Case("include_near", MINE, ("'data/digit'", "did you mean 'data/digits'"), text("include: [data/digit]\n")),
    Case("include_no_list", MINE, ("'digits_resnet20'", "mine.yaml", "include: [digits_resnet20]"),
         text("include: digits_resnet20\n")),
    Case("include_itself", MINE, ("mine.yaml includes itself", "remove it"), text("include: [mine]\n")),
    Case("include_outside", MINE, ("'../../../etc/passwd'", "mine.yaml"), text("include: [../../../etc/passwd]\n")),
    Case("config_missing", ["fit", *QUICK], ("model", "missing", "--config")),
    # ---------------------------------------------------------------- teacher
    Case("teacher_of_other_classes", ACKD, ("resnet20", "100 classes", "have 10", "class_map"),
         teacher(lambda path: save_weights(create_model("resnet20", 100), path)), made=True),
    Case("teacher_of_other_architecture", ACKD,
         ("weights/digits_resnet20", "resnet20", "unexpected", "give weights of this network"),
         teacher(lambda path: save_weights(create_model("resnet32", 10), path)), made=True),
    Case("teacher_half", ACKD, ("weights/digits_resnet20", "truncated", "fetch or make it again"),
         cut(TEACHER, 100_000), made=True),
    Case("teacher_header_alone", ACKD, ("weights/digits_resnet20", "truncated"), cut(TEACHER, 20), made=True),
    Case("teacher_empty", ACKD, ("weights/digits_resnet20", "is empty"), cut(TEACHER, 0), made=True),
    Case("teacher_text", ACKD, ("weights/digits_resnet20", "neither"), text("hello", str(TEACHER)), made=True),
    Case("teacher_without_file", [*ACKD, "--model.teacher.weights", "null"], ("'resnet20'", "weights"),
         made=True),
    Case("teacher_at_an_address", [*ACKD, "--model.teacher.weights", "https://example.org/t.safetensors"],
         ("https://example.org", "weights"), made=True),
    Case("teacher_none", [*ACKD, "--model.teacher", "null"], ("ACKD needs a teacher",), made=True),
    Case("teacher_of_no_size", ACKD, ("input_size", "'-3'", "export the file again"),
         stating(input_size="-3"), made=True),
    Case("teacher_of_huge_size", ACKD, ("input_size", "'99999999'"), stating(input_size="99999999"), made=True),
    Case("teacher_size_text", ACKD, ("input_size", "'abc'"), stating(input_size="abc"), made=True),
    Case("teacher_mean_text", ACKD, ("mean", "'x'", "list of numbers"), stating(mean="x", std="[1]"), made=True),
    Case("teacher_std_zero", ACKD, ("std", "[0, 0, 0]", "above 0"),
         stating(mean="[0, 0, 0]", std="[0, 0, 0]"), made=True),
    Case("teacher_of_grey_images", ACKD, ("mean has 1 values", "resnet20", "3 channels", "one for each"),
         stating(mean="[0.5]", std="[0.5]"), made=True),
    Case("teacher_accuracy_text", ACKD, ("val_acc", "'high'", "from 0 to 1"), stating(val_acc="high"), made=True),
    Case("teacher_near_chance", [*KD], ("resnet20", "near chance", "gate"),
         stating(model="resnet20"), made=True),
    # ------------------------------------------------------------ checkpoints
    *(
        Case(f"{command[0]}_{what}", command, (LAST, *words), prepare, made=True)
        for command in (["test", RUN], ["validate", RUN], ["predict", RUN], ["export", RUN], AGAIN)
        for what, prepare, words in (
            ("half_checkpoint", cut(LAST, 100_000), ("cannot be read", "choose another one")),
            ("without_key", checkpoint(drop(FC)), ("1 of ", "missing")),
            ("without_facts", checkpoint(lambda content: content["ackd_lightning"].pop("num_classes")),
             ("damaged", "num_classes")),
        )
    ),
    Case("checkpoint_empty", ["test", RUN], (LAST, "cannot be read", "EOFError"), cut(LAST, 0), made=True),
    Case("checkpoint_list", ["test", RUN], (LAST, "not a checkpoint of ackd-lightning"),
         lambda: torch.save([1], LAST), made=True),
    Case("checkpoint_of_huge_classes", ["export", RUN], (LAST, "num_classes is 999999999"),
         checkpoint(lambda content: content["ackd_lightning"].update(num_classes=999_999_999)), made=True),
    Case("checkpoint_of_unknown_network", ["export", RUN], ("'resnet999'", "did you mean"),
         checkpoint(lambda content: content["ackd_lightning"].update(model="resnet999")), made=True),
    Case("checkpoint_other_student", ["test", RUN, "--model.student", "resnet20"],
         (LAST, "student resnet8", "student resnet20", "leave out what differs"), made=True),
    Case("checkpoint_other_method", [*ACKD, "--ckpt_path", LAST], (LAST, "method CE", "method ACKD"), made=True),
    Case("checkpoint_missing", [*CE, "--ckpt_path", "gone.ckpt"], ("gone.ckpt does not exist", "ackd fit")),
    Case("checkpoint_folder", [*CE, "--ckpt_path", "runs", "--weights_dir", "null"],
         ("runs does not exist",), made=True),
    # ---------------------------------------------------------- after training
    Case("which_worst", ["test", RUN, "--which", "worst"], ("'worst'", "last or best"), made=True),
    Case("run_no_run", ["test", "runs"], ("runs", RUN, "name one of them"), made=True),
    Case("run_none", ["test", *QUICK], ("ackd test RUN",)),
    Case("run_without_config", ["test", RUN], (RUN, "config.yaml", "--config"),
         lambda: Path(RUN, "config.yaml").unlink(), made=True),
    Case("run_with_broken_config", ["test", RUN], (f"{RUN}/config.yaml", "not YAML"),
         text("a: [", f"{RUN}/config.yaml"), made=True),
    Case("run_with_broken_summary", ["test", RUN], (f"{RUN}/summary.json", "cannot be read"),
         text("{", f"{RUN}/summary.json"), made=True),
    Case("validate_batch_zero", ["validate", RUN, "--data.batch_size", "0"], ("batch_size is 0",), made=True),
    Case("predict_over_a_folder", ["predict", RUN, "--output", "runs"], ("--output runs exists", "another file"),
         made=True),
    Case("predict_below_a_file", ["predict", RUN, "--output", "file/p.csv"], ("--output", "file", "choose a folder"),
         text("", "file"), made=True),
    Case("export_other_ending", ["export", RUN, "--out", "x.pth"], ("x.pth", ".safetensors"), made=True),
    Case("export_option", ["export", RUN, "--formats", "onnx"], ("--formats", "--help"), made=True),
    Case("export_over_a_folder", ["export", RUN, "--out", "d.safetensors", "--overwrite"], ("d.safetensors", "a file"),
         lambda: Path("d.safetensors").mkdir(), made=True),
    Case("export_below_a_file", ["export", RUN, "--out", "file/s.safetensors"], ("--out", "file", "choose a folder"),
         text("", "file"), made=True),
    Case("export_with_broken_summary", ["export", RUN], (f"{RUN}/summary.json", "summary"),
         text("[]", f"{RUN}/summary.json"), made=True),
    Case("compare_broken_summary", ["compare", "runs"], (f"{RUN}/summary.json", "cannot be read", "remove"),
         text("{", f"{RUN}/summary.json"), made=True),
    Case("compare_empty_summary", ["compare", "runs"], (f"{RUN}/summary.json", "config is missing"),
         text("{}", f"{RUN}/summary.json"), made=True),
    Case("compare_without_config", ["compare", "runs"], (f"{RUN}/config.yaml", "cannot be read"),
         lambda: Path(RUN, "config.yaml").unlink(), made=True),
    Case("compare_broken_curves", ["compare", "runs"], (f"{RUN}/metrics.csv", "cannot be read", "remove"),
         text(b"\xff", f"{RUN}/metrics.csv"), made=True),
    Case("compare_curves_of_words", ["compare", "runs"], (f"{RUN}/metrics.csv", "'y'"),
         text("epoch,val/acc\nx,y\n", f"{RUN}/metrics.csv"), made=True),
    Case("compare_no_picture", ["compare", "runs", "--figure", "c.xyz"], ("--figure is c.xyz", ".png"), made=True),
    Case("compare_nothing", ["compare"], ("runs", "--help")),
    Case("compare_option", ["compare", "runs", "--figur", "c.png"], ("--figur", "--help"), made=True),
    # --------------------------------------------------------- places of output
    Case("run_exists", [*CE, "--name", "t", "--weights_dir", "null"],
         (f"run {RUN} exists", "another --name"), made=True),
    Case("name_climbs", [*CE, "--name", "../../x"], ("--name is '../../x'", "separators")),
    Case("name_nothing", [*CE, "--name", ""], ("--name is ''",)),
    Case("runs_below_a_file", [*CE, "--runs_dir", "file"], ("--runs_dir", "file", "choose a folder"), text("", "file")),
    Case("weights_below_a_file", [*CE, "--weights_dir", "file"],
         ("--weights_dir file", "choose a folder"), text("", "file")),
    Case("demo_below_a_file", ["demo", "--out", "file"], ("--out file", "choose a folder"), text("", "file")),
    # ------------------------------------------------------------------ images
    Case("images_nowhere", FOLDER, ("no folder mine", "set --data.root")),
    Case("images_none", FOLDER, ("mine holds neither images", "one folder for each class"),
         lambda: Path("mine").mkdir()),
    Case("images_without_any", FOLDER, ("mine/train/cat holds no images", "add some"), images(0)),
    Case("images_of_other_classes", FOLDER, ("wolf", "mine/test", "add training images"),
         images(then=lambda root: (root / "test/dog").rename(root / "test/wolf"))),
    Case("images_corrupt_jpeg", FOLDER, ("mine/train/dog/1.jpg", "replace the file or delete it"),
         images(kind="jpg", then=lambda root: cut(root / "train/dog/1.jpg", 300)())),
    Case("images_corrupt_large_jpeg", [*FOLDER, "--data.image_size", "96", "--data.cache", "false"],
         ("mine/train/dog/1.jpg", "replace the file or delete it"),
         images(kind="jpg", then=lambda root: cut(root / "train/dog/1.jpg", 300)())),
    Case("images_text", FOLDER, ("mine/train/dog/1.png", "replace the file or delete it"),
         images(then=lambda root: (root / "train/dog/1.png").write_text("no"))),
    Case("images_without_training", FOLDER, ("test", "train_dir"), images(parts=("test",))),
    Case("images_of_size_0", [*FOLDER, "--data.image_size", "0"], ("image_size is 0", "at least 8"), images()),
    Case("images_of_huge_size", [*FOLDER, "--data.image_size", "99999999"], ("image_size is 99999999",), images()),
    Case("images_train_dir", [*FOLDER, "--data.train_dir", "trian"], ("mine/trian", "mine holds"), images()),
    Case("images_mean", [*FOLDER, "--data.mean", "[1, 2]"], ("mean has 2 values", "channels is 3"), images()),
    Case("images_std", [*FOLDER, "--data.std", "[0, 1, 1]"], ("std is [0", "above 0"), images()),
    # --------------------------------------------------------------- reproduce
    Case("table_unknown", ["reproduce", "table9"], ("'table9'", "did you mean")),
    Case("table_none", ["reproduce"], ("table", "--help")),
    Case("table_pair", ["reproduce", "table2", "--pair", "resnet110_resnet2"], ("table2", "did you mean")),
    Case("table_method", ["reproduce", "table2", "--methods", "kdd"], ("--methods names 'kdd'", "did you mean")),
    Case("table_against", ["reproduce", "table2", "--against", "kdd"], ("--against names 'kdd'", "did you mean")),
    Case("table_seeds_empty", ["reproduce", "table2", "--seeds", ""], ("--seeds is ''", "0,5")),
    Case("table_seeds_0", ["reproduce", "table2", "--seeds", "0"], ("--seeds is 0", "1 to 1000")),
    Case("table_seeds_gap", ["reproduce", "table2", "--seeds", "1,,2"], ("--seeds is '1,,2'", "0,5")),
    Case("table_seeds_many", ["reproduce", "table2", "--seeds", "99999999999"],
         ("--seeds is 99999999999", "1 to 1000")),
    Case("table_workers", ["reproduce", "table2", "--workers", "0"], ("--workers is 0", "1 or more")),
    Case("table_preset", ["reproduce", "table2", "--preset", "x"], ("'x'", "smoke")),
    Case("table_setting", ["reproduce", "table2", "--trainer.max_epoch", "3", "--dry-run"],
         ("'trainer.max_epoch'", "did you mean 'trainer.max_epochs'")),
    Case("table_row", TABLE, ("row 'kdd' of mine.yaml", "did you mean"), text(PAIR + "rows: {kdd: {}}\n")),
    Case("table_rows_list", TABLE, ("`rows` of mine.yaml", "name: value"), text(PAIR + "rows: [kd]\n")),
    Case("table_row_number", TABLE, ("row 'kd' of mine.yaml is '3'", "name: value"), text(PAIR + "rows: {kd: 3}\n")),
    Case("table_row_set", TABLE, ("`set` of row 'kd' of mine.yaml is '3'", "name: value"),
         text(PAIR + "rows: {kd: {set: 3}}\n")),
    Case("table_set", TABLE, ("`set` of mine.yaml is '3'", "name: value"), text(PAIR + "set: 3\nrows: {kd: {}}\n")),
    Case("table_pair_number", TABLE, ("`config` of pair 'a' of mine.yaml is 5", "write a name"),
         text("pairs: {a: {config: 5}}\n")),
    Case("table_pair_key", TABLE, ("pair 'a' of mine.yaml", "'x'", "known are"),
         text("pairs: {a: {config: digits_resnet20_resnet8, x: 1}}\n")),
    Case("table_early_stop", TABLE, ("`early_stop` of pair 'a' of mine.yaml is 'x'", "epochs"),
         text("pairs: {a: {config: digits_resnet20_resnet8, early_stop: x}}\nrows: {eskd: {}}\n")),
    Case("table_without_pairs", TABLE, ("mine.yaml has no pairs", "add one"), text("pairs: {}\n")),
    Case("table_no_table", TABLE, ("mine.yaml is not a table", "`pairs`"), text("- 1\n")),
    # ------------------------------------------------------------------ several teachers, peers, heads
    Case("two_teachers_for_at", [*KD, "--config", "methods/at", "--model.teacher",
                                 "[{network: resnet20}, {network: resnet8}]"], ("AT", "features", "2", "one of them")),
    Case("teachers_without_files", [*ATSC, "--model.teacher", "[{network: resnet20}, {network: resnet8}]"],
         ("'resnet20'", "no weight file", "teacher.weights")),
    Case("teachers_file_missing", [*ATSC, "--model.teacher",
                                   f"[{{network: resnet20, weights: {TEACHER}}}, "
                                   "{network: resnet8, weights: weights/gone.safetensors}]"],
         ("weights/gone.safetensors",), made=True),
    Case("anchor", [*ATSC, "--model.method.weight_anchor", "-1"], ("weight_anchor is -1", "at least 0")),
    Case("anchor_scope", [*ATSC, "--model.method.anchor_scope", "some"], ("anchor_scope", "'some'", "'weights'")),
    Case("classifier_that_is_none", [*ACN, "--model.method.classifiers", "[resnet9]"],
         ("'resnet9'", "D3B1", "did you mean")),
    Case("no_second_classifier", [*ACN, "--model.method.classifiers", "[]"], ("classifiers", "ACN", "peer")),
    Case("rho", [*ACN, "--model.method.rho", "1.5"], ("rho is 1.5", "ACN", "0", "1")),
    Case("previous", [*AIKD, "--model.method.previous", "yesterday"], ("previous", "'yesterday'", "'snapshot'")),
    Case("no_number_of_epochs", [*AIKD, "--trainer.max_epochs", "-1"], ("AIKD", "max_epochs"), made=True),
    Case("learner_number", ["export", RUN, "--learner", "1"], ("--learner is 1", "leave it out"), made=True),
    Case("learner_word", ["export", RUN, "--learner", "first"], ("--learner", "'first'")),
    # ------------------------------------------------------------------ the rest
    Case("demo_epochs", ["demo", "--epochs", "0"], ("--epochs is 0", "1 or more")),
    Case("demo_seeds", ["demo", "--seeds", "x"], ("--seeds", "'x'", "--help")),
    Case("configs_none", ["configs", "zzz"], ("'zzz'",)),
    Case("configs_option", ["configs", "--x"], ("--x", "--help")),
    Case("command", ["trian"], ("'trian'", "known are")),
]  # fmt: skip


def files(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every file with size and time of change, every folder; locks are opened by whoever asks."""
    found = (path for path in folder.rglob("*") if path.name != ".lock")
    stats = {str(path.relative_to(folder)): (path, path.lstat()) for path in found}
    return {name: (stat.st_size, stat.st_mtime_ns) if path.is_file() else None for name, (path, stat) in stats.items()}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_one_sentence_and_writes_nothing(case, here, request, capsys):
    if case.made:
        request.getfixturevalue("copied")
    case.prepare()
    before = files(here)
    code = main(case.arguments)
    shown = capsys.readouterr().err.strip()
    assert code == case.code, shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 3, shown
    missing = [word for word in case.words if word not in shown]
    assert not missing, shown
    assert files(here) == before


def test_there_are_enough_cases_with_names_of_their_own():
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
