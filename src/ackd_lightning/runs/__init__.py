"""The folder of a run: claim, find, read, write, export, resume; nothing that trains."""
