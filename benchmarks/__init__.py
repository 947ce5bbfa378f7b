"""Side-by-side measurements; results are kept as JSON with device, versions and date."""
