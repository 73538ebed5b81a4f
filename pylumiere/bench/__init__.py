"""Measurements: `pylumiere bench`, and what the scripts in benchmarks/ share."""
