"""Random tiny models of the architectures that the coverage table lists."""
