"""A run's folder: find, read, write, export, resume; nothing that trains."""
