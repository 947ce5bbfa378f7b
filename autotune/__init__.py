"""Measuring speed and accuracy, and the search under a budget."""
