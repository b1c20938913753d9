"""Every benchmark beside its baseline, in one run: ``python -m benchmarks``. What it says is in docs/BENCHMARKS.md."""
