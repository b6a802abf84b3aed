"""Datasets, the batches made of them, and the values that a network expects of its images."""
