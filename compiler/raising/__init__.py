"""Turning every spelling of attention into the one canonical op, by probing."""
