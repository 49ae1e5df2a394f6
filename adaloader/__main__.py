"""`python -m adaloader inspect`, `export` and `run`: looking into checkpoints, and running jobs that come back."""

from adaloader.command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
