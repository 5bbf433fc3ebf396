"""The command `taco`: one module for each subcommand, each with `HELP`, `add_arguments(parser)` and `run(args)`."""
