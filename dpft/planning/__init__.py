"""Predictions of a step's time and memory, by running it on a copy of the model without data."""
