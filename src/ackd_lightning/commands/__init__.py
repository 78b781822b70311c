"""Subcommands of ``ackd`` that are not Lightning's, one file or folder each; no command line is parsed here."""
