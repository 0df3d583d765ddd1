"""What the runtime costs, and how it behaves under load: `python -m vsurge.benchmarks.serving`."""
