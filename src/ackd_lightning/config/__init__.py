"""Configuration files: find, include, merge, and which classes they may name; nothing of Lightning."""
