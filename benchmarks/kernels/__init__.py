"""The kernels beside what jax has: `vsurge bench kernels`, or pytest-benchmark's `benchmarks/kernels`."""
