"""Descriptions of devices, one TOML file per target."""
