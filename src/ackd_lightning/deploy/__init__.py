"""A trained network outside its run: what it is, in which formats, how it is checked, predictions, report, hub."""
