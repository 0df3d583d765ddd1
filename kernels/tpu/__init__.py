"""What the Pallas kernels for TPU share."""
