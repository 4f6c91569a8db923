"""The `sslkit` command: one module for each subcommand."""
