"""The commands of `python -m engine`, one module each: `add_arguments(parser)` and `run(args) -> exit
status`, or for `train`, whose arguments Hydra reads, `main(argv) -> exit status`.
"""
