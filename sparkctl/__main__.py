"""`python -m sparkctl` is `sparkctl`: agents and torchrun start ranks so, whatever is on PATH."""

from sparkctl.cli import main

main()
