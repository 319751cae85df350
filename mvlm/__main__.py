"""`python -m mvlm` is the same program as `mvlm`, as torchrun needs it."""

from mvlm.cli import main

main()
