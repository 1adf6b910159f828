"""Data sets: one module a layout."""
