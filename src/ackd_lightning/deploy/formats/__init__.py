"""File formats of trained networks, one file each: how a network is written and how the file is run."""
