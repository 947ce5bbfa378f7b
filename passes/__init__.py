"""Graph rewrites of attention, one file per pass; the file is the registration."""
