"""CDT Edge export: from a checkpoint to a bundle that is proved to decide as before."""
