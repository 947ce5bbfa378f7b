"""Tile sizes that were found good, by target (`attnopt.codegen.shipped` reads them)."""
