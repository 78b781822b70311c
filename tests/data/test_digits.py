from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from ackd_lightning.data import DigitsDataModule
from ackd_lightning.data.digits import all_digits


def test_images_are_the_scans():
    images, targets = all_digits()
    assert images.shape == (1797, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert torch.equal(images[:, 0], images[:, 2])
    scans = torch.from_numpy(load_digits()["images"]).float() * 255 / 16
    # by hand: the middle of pixel (5, 9) lies at (5.5, 9.5) / 2 - 0.5 = (2.25, 4.25) of the scan
    by_hand = 0.75 * (0.75 * scans[:, 2, 4] + 0.25 * scans[:, 2, 5])
    by_hand += 0.25 * (0.75 * scans[:, 3, 4] + 0.25 * scans[:, 3, 5])
    assert (images[:, 0, 5, 9] - by_hand).abs().max() <= 0.5
    assert by_hand.max() > 200
    assert targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_parts_and_constants():
    module = DigitsDataModule(val_fraction=0.1)
    module.setup()
    parts = [
        torch.cat([batch.image for batch in loader]) for loader in (module.val_dataloader(), module.test_dataloader())
    ]
    assert [len(part) for part in parts] == [126, 539]
    assert module.num_train_samples == 1797 - 126 - 539
    assert module.num_classes == 10
    assert DigitsDataModule(**module.hparams).hparams == module.hparams
    assert module.class_names == tuple("0123456789")
    source, rows = module._part("train")
    everything = torch.cat([source.images[rows], parts[0]]).float() / 255
    assert abs(everything.mean().item() - module.mean[0]) < 1e-4
    assert abs(everything[:, 0].std().item() - module.std[0]) < 1e-4


def test_digits_are_shifted_and_not_mirrored():
    module = DigitsDataModule(batch_size=64, seed=0)
    raw = next(iter(module.train_dataloader()))
    shifted = module.on_after_batch_transfer(raw._replace(epoch=raw.epoch), 0).image * module.std[0] + module.mean[0]
    plain = torch.nn.functional.pad(raw.image.float() / 255, (2, 2, 2, 2))
    windows = [plain[:, :, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    distance = torch.stack([(window - shifted).abs().amax((1, 2, 3)) for window in windows]).amin(0)
    assert distance.max() < 1e-5
    assert not torch.allclose(shifted, raw.image.float() / 255)
