"""What the guide costs over the bare libraries: ``make bench``, or ``python -m benchmarks``."""
