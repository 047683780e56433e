"""`python -m duolect` is `duolect`, and so is `torchrun -m duolect`."""

from duolect.cli import main

main()
