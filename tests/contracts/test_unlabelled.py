"""Images without labels: methods that read labels by the cross-entropy alone learn from them."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ackd_lightning import DataInfo, DistillationModule, TeacherConfig, create_model
from ackd_lightning.config.files import config_folder, load_configs
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.description import from_description
from ackd_lightning.methods.guides import GuidedMethod

NAMES = sorted(each.stem for each in (config_folder() / "methods").glob("*.yaml"))


def method_of(name):
    settings, _ = load_configs([f"methods/{name}"])
    given = settings["model"]["method"]
    plain = {"class_path": given} if isinstance(given, str) else dict(given)
    return from_description({"init_args": {}, **plain})


class HalfLabelled(L.LightningDataModule):
    train_targets = torch.tensor([0, -1] * 8)
    batch_size = 8

    def train_dataloader(self):
        images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, self.train_targets, torch.arange(16)), batch_size=8)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4), batch_size=8)


@pytest.mark.parametrize("name", NAMES)
def test_images_without_labels(name, tmp_path):
    method = method_of(name)
    teacher = TeacherConfig(network=create_model("resnet14", 4), gate="off")
    assistant = TeacherConfig(network=create_model("resnet8", 4), gate="off")
    several = name == "atsc" or isinstance(method, GuidedMethod)
    module = DistillationModule(
        "resnet8",
        method=method,
        teacher=[teacher, assistant] if several else teacher,
        data=DataInfo(4, 16, (0.5,) * 3, (0.5,) * 3),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3),
        seed=0,
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = L.Trainer(fast_dev_run=2, accelerator="cpu", **quiet)
    if method.labels == "mixed" and name != "ce":  # which has no other term
        trainer.fit(module, HalfLabelled())
        assert all(parameter.isfinite().all() for parameter in module.parameters())
    else:
        with pytest.raises(ACKDError, match="8 of 16"):
            trainer.fit(module, HalfLabelled())
