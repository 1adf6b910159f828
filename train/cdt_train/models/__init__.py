"""The parts of the model and the whole."""
