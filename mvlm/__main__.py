"""Entry point of `python -m mvlm`, which torchrun needs. The same program as `mvlm`."""

from mvlm.cli import main

main()
