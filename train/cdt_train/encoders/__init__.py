"""Encoders that turn a tile or a CT into tokens."""
