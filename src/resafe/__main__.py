"""``python -m resafe``, as ``accelerate launch -m resafe`` calls it."""

from resafe.cli import main

main()
