"""One file or folder for each subcommand that is not Lightning's; no command-line parsing."""
