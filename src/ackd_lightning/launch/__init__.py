"""From a command line to settings to a Trainer; no training logic."""

LIGHTNING = {
    "fit": "train a student or a teacher: ackd fit --config cifar100_resnet110_resnet20.yaml",
    "validate": "evaluate a run on its validation data: ackd validate RUN",
    "test": "evaluate a run on the test set, once: ackd test RUN [--which best]",
    "predict": "predict a run's test set: ackd predict RUN; or any images: ackd predict RUN|FILE --images FOLDER",
}
"""Subcommands of Lightning, each with its help text."""
