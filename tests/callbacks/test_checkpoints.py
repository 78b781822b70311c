"""A checkpoint is written whole or not at all."""

from __future__ import annotations

import errno
import resource
import signal

import pytest
import torch

from ackd_lightning.callbacks.checkpoints import WholeCheckpoints, checkpoints
from ackd_lightning.errors import NotWrittenError
from ackd_lightning.methods import KD
from training.helpers import Blobs, build, trainer


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files has the effect of a full disk."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"number": torch.arange(3)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(NotWrittenError, match=f"^checkpoint {path} could not be written") as caught:
            WholeCheckpoints().save_checkpoint({"number": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert f"last.ckpt of before are kept; free disk space, then `ackd fit --resume {tmp_path}`" in str(caught.value)
    assert caught.value.__cause__.errno in (errno.EFBIG, errno.ENOSPC)
    assert path.read_bytes() == before
    frames = [entry.frame.f_locals for entry in caught.traceback]
    (buffer,) = [frame["buffer"] for frame in frames if "buffer" in frame]
    buffer.close()  # nothing that the error keeps alive holds the memory: else its release is an error without a place
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["number"].tolist() == [0, 1, 2]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotWrittenError, match="there is none of before; free disk space, then start the run again"):
        WholeCheckpoints().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


def test_the_last_checkpoint_knows_the_best_one_by_then(tmp_path):
    """A run that goes on from it must not replace a better one."""
    both = checkpoints(tmp_path, select=True)
    best = next(each for each in both if each.monitor)
    trainer(max_epochs=3, enable_checkpointing=True, callbacks=both).fit(build(KD()), datamodule=Blobs())
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (known,) = [each for each in states.values() if isinstance(each, dict) and each.get("monitor") == "val/acc"]
    assert known["best_model_score"] == best.best_model_score
    assert known["current_score"] == best.current_score
