"""The TPU kernels beside jax's own, by what the TPU compiler's schedules predict."""
