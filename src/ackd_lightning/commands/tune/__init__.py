"""``ackd tune``: a search over a few settings with Optuna; every trial is a normal run."""
