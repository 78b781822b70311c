"""From a command line to settings to a Trainer; no training logic."""
