"""Healing: training what approximate rewrites touched until it says again what the original says.

`heal` trains layer by layer first (`local`), then all layers together (`whole`), and keeps the
outcome only where the loss on held-out batches fell.
"""
