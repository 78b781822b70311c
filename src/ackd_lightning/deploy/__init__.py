"""Trained networks outside their runs: what they are, in which formats, how files are checked, and how they are used.

Nothing that trains is in here, and no command line.
"""
