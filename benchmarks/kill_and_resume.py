"""Kill real runs at random moments and resume them: do they end with the weights of an uninterrupted one, bit for bit?

python benchmarks/kill_and_resume.py --times 20

In each trial a run of ACKD on scanned digits is killed once with SIGKILL and once with SIGTERM, each at a random moment
after its first epoch has begun, and resumed with ``--resume auto``. Its student is then compared with that of a run
that was not interrupted. Prints ``20 of 20`` and exits with 0 if all are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

EPOCHS = 8
SETTINGS = ["--data.max_per_class", "30", "--data.batch_size", "10", "--trainer.max_epochs", str(EPOCHS)]
SETTINGS += [
    "--model.lr_scheduler.milestones",
    "[4, 6]",
    "--trainer.enable_progress_bar",
    "false",
]


def command(config: str, name: str, *more: str) -> list[str]:
    """Return the command of a fit of a configuration."""
    start = [sys.executable, "-m", "ackd_lightning", "fit", "--config", config, "--name", name]
    gate = [] if name == "teacher" else ["--model.teacher.gate", "warn"]
    return [*start, *SETTINGS, *gate, *more]


def weights(run: Path) -> str:
    """Return a hash of the tensors of a run's student, without metadata such as times."""
    digest = hashlib.sha256()
    with safe_open(run / "student.safetensors", framework="pt") as file:
        for key in sorted(file.keys()):
            digest.update(key.encode() + file.get_tensor(key).numpy().tobytes())
    return digest.hexdigest()


def interrupt(arguments: list[str], number: int, delay: float, folder: Path) -> int:
    """Start a run, send a signal some time after its first line of training, and return the exit code."""
    child = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("ACKD: student"):
            break
    time.sleep(delay)
    child.send_signal(number)
    child.stdout.read()
    return child.wait()


def trial(number: int, folder: Path, length: float, expected: str, chance: random.Random) -> bool:
    """Kill a run twice, resume it until it ends, and return whether its student is the expected one."""
    name = f"trial{number}"
    pair = "digits_resnet20_resnet8"
    codes = []
    for signal_number in chance.sample([signal.SIGKILL, signal.SIGTERM], 2):
        delay = chance.uniform(0.0, length / 2)
        code = interrupt(command(pair, name, "--resume", "auto"), signal_number, delay, folder)
        codes.append(f"{signal.Signals(signal_number).name} after {delay:.1f} s (exit code {code})")
    done = subprocess.run(
        command(pair, name, "--resume", "auto"), cwd=folder, capture_output=True, text=True, check=False
    )
    run = folder / "runs" / pair / name
    same = done.returncode == 0 and weights(run) == expected
    print(f"{number}: {', '.join(codes)}: {'equal' if same else 'DIFFERENT ' + done.stderr[-300:]}", flush=True)
    return same


def main() -> int:
    """Run all trials; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="number of trials")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run(command("digits_resnet20", "teacher"), cwd=folder, check=True, stdout=subprocess.DEVNULL)
        begin = time.monotonic()
        first = subprocess.Popen(
            command("digits_resnet20_resnet8", "whole"), cwd=folder, stdout=subprocess.PIPE, text=True
        )
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("ACKD: student"):
                begin = time.monotonic()
        first.wait()
        length = time.monotonic() - begin
        expected = weights(folder / "runs" / "digits_resnet20_resnet8" / "whole")
        print(f"uninterrupted: {length:.1f} s of training, {expected[:12]}", flush=True)
        good = sum(trial(number, folder, length, expected, chance) for number in range(1, chosen.times + 1))
    print(f"{good} of {chosen.times}")
    return 0 if good == chosen.times else 1


if __name__ == "__main__":
    sys.exit(main())
