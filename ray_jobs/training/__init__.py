"""Training on Ray Train: the order of the data, the batches, the recipe and the worker's loop."""
