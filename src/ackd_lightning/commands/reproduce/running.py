"""Runs jobs in separate processes: skips finished ones, resumes interrupted ones, and collects failures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from ackd_lightning.commands.processes import Processes, say
from ackd_lightning.commands.reproduce.jobs import Job
from ackd_lightning.runs.claim import IN_USE
from ackd_lightning.runs.files import measured_last, read_summary

OUTPUT_IN = " (output in "


class Runner(Processes):
    """Runs every job after the jobs that it needs, one job per device at a time.

    Args:
        logs: Folder for the full output of the runs.
        devices: Values of CUDA_VISIBLE_DEVICES, one per concurrent job; [None]: one job with all visible devices.
    """

    def __init__(self, logs: Path, devices: Sequence[str | None]) -> None:
        super().__init__(devices)
        self.logs = logs
        self.total = self.started = 0

    def run_all(self, jobs: Sequence[Job]) -> dict[Path, str]:
        """Run the jobs that are not finished.

        Args:
            jobs: Jobs, teachers before their students.

        Returns:
            Reasons of failures by folder of the run.
        """
        waiting = {job.folder: job for job in jobs if not self._done(job)}
        self.total = len(waiting)
        failed: dict[Path, str] = {}
        running: dict[Future[str | None], Job] = {}
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            try:
                while waiting or running:
                    self._start(waiting, running, failed, pool)
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(done)
                        reason = self._reason(done)
                        if reason:
                            failed[job.folder] = reason
                            say(f"failed: {job.title}: {reason}")
            except (KeyboardInterrupt, SystemExit):
                self.stop()
                raise
        elsewhere = {job.folder for job in jobs if job.folder in failed and self._done(job)}  # by another process
        return {folder: reason for folder, reason in failed.items() if folder not in elsewhere}

    @staticmethod
    def _reason(done: Future[str | None]) -> str | None:
        """Reason of a failure; an exception in this process, such as a full disk, must not end the other runs."""
        error = done.exception()
        return done.result() if error is None else f"{type(error).__name__}: {error}"

    def _start(
        self,
        waiting: dict[Path, Job],
        running: dict[Future[str | None], Job],
        failed: dict[Path, str],
        pool: ThreadPoolExecutor,
    ) -> None:
        for folder, job in list(waiting.items()):
            if lost := [need for need in job.needs if need in failed]:
                failed[folder] = f"not run, because {lost[0]} failed"
                say(f"{job.title}: {failed[folder]}")
                del waiting[folder]
            elif len(running) < self.workers and not any(
                need in waiting or any(need == each.folder for each in running.values()) for need in job.needs
            ):
                running[pool.submit(self._fit_and_test, job)] = job
                del waiting[folder]

    def _done(self, job: Job) -> bool:
        return job.finished and self._tested(job)

    @staticmethod
    def _tested(job: Job) -> bool:
        summary = read_summary(job.folder)
        tested = set(summary.get("test", {}))
        if summary["shown"] == "test":  # nothing was selected, so only the last epoch counts
            return bool(measured_last(summary)) or "last" in tested
        return set(_checkpoints(job)) <= tested

    def _fit_and_test(self, job: Job) -> str | None:
        """Fit and test; return the reason of a failure, or None."""
        device = self.devices.get()
        with self.lock:
            self.started += 1
            number = self.started
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            log = self.logs / f"{job.folder.parent.name}-{job.folder.name}.log"
            begin = time.monotonic()
            resumed = ["--resume", str(job.folder)] if job.checkpoint else []
            label = f"[{number}/{self.total}] {job.title}"
            say(f"{label}: {'resumes' if resumed else 'starts'}")
            if not job.finished:
                reason = self.process(["fit", *job.arguments, "--test", *resumed], log, device, label)
                if reason is None and not job.finished:
                    reason = "ended without a summary.json"
                if reason and IN_USE in reason:
                    return f"{job.folder} is being trained {IN_USE}; run the same command again when it has ended"
                if reason:
                    return f"{reason}{OUTPUT_IN}{log})"
            if not self._tested(job):
                for which in _checkpoints(job):
                    reason = self.process(["test", str(job.folder), "--which", which], log, device, label)
                    if reason:
                        return f"{reason}{OUTPUT_IN}{log})"
            say(f"{label}: {_accuracy(job)} ({time.monotonic() - begin:.0f} s)")
            return None
        finally:
            self.devices.put(device)


def _checkpoints(job: Job) -> list[str]:
    """Checkpoints of a run that are tested."""
    return [name for name in ("last", "best") if (job.folder / "checkpoints" / f"{name}.ckpt").is_file()]


def _accuracy(job: Job) -> str:
    summary = read_summary(job.folder)
    values = summary.get("test", {}).get("last") or summary["last"]
    return f"test accuracy {values['test/acc']:.2%}" if "test/acc" in values else "done"
