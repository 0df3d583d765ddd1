"""Measurements with a denominator: what the hardware allows, measured in the same run."""
