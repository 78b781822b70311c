"""How many epochs a fit has, also where it is limited by steps."""

from __future__ import annotations

import math

import lightning.pytorch as L
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset


def epochs_of_fit(trainer: L.Trainer, batches: float | None = None) -> int | None:
    """Return the number of epochs of a fit, the last of which may be cut; None where it is not known.

    With manual optimization a skipped step does not count, so a fit with such steps and a limit of steps is longer.

    Args:
        trainer: Trainer.
        batches: Training batches of an epoch; None reads them from the trainer, which knows them in the fit.
    """
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    batches = trainer.num_training_batches if batches is None else batches
    if trainer.max_steps < 0 or math.isinf(batches) or batches < 1:
        return epochs
    needed = math.ceil(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches))
    return needed if epochs is None else min(epochs, needed)


def epochs_before_fit(trainer: L.Trainer) -> int | None:
    """Return the number of epochs of a fit whose loaders are not made yet; None where it is not known.

    Args:
        trainer: Trainer whose data module is set up.
    """
    source = trainer.fit_loop._data_source
    if trainer.max_steps < 0 or not source.is_defined():
        return epochs_of_fit(trainer, math.inf)
    given = source.instance
    loader = given.train_dataloader() if isinstance(given, L.LightningDataModule) else source.dataloader()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return epochs_of_fit(trainer, math.inf)
    shared = isinstance(loader.sampler, DistributedSampler)  # else Lightning will share it out
    whole = len(loader) if shared else math.ceil(len(loader) / trainer.world_size)
    limit = getattr(trainer, "overfit_batches", 0) or trainer.limit_train_batches
    return epochs_of_fit(trainer, min(whole, limit) if isinstance(limit, int) else int(whole * limit))


def is_whole_epoch(trainer: L.Trainer) -> bool:
    """Return whether an epoch has ended with its last batch, and not by steps, time or an early stop before it.

    Args:
        trainer: Trainer at the end of an epoch.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
