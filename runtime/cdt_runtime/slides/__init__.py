"""Whole slides: pyramid to tiles to answers, in memory that does not grow with the slide."""
