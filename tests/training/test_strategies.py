from __future__ import annotations

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from ackd_lightning.cli import main
from ackd_lightning.errors import ACKDError
from ackd_lightning.training.strategies import refuse_sharding


def name(given: object) -> str:
    return given if isinstance(given, str) else type(given).__name__


FSDP = ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_3", "xla_fsdp", "lightning.pytorch.strategies.FSDPStrategy"]


@pytest.mark.parametrize("strategy", [*FSDP, FSDPStrategy(), ModelParallelStrategy()], ids=name)
def test_strategies_that_divide_weights_are_refused(strategy):
    with pytest.raises(ACKDError, match="ddp"):
        refuse_sharding(strategy)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_spawn", DDPStrategy(), SingleDeviceStrategy("cpu")], ids=name)
def test_others_are_not(strategy):
    refuse_sharding(strategy)


@pytest.mark.parametrize("method", ["ce", "kd"])
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_the_command_line_refuses_them_before_anything_starts(tmp_path, monkeypatch, capsys, method, strategy):
    monkeypatch.chdir(tmp_path)
    code = main(
        [
            "fit",
            "--config",
            "digits_resnet20_resnet8.yaml",
            "--config",
            f"methods/{method}",
            "--trainer.strategy",
            strategy,
        ]
    )
    assert code == 2
    assert "ddp" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
