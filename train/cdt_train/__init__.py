"""CDT Edge training: from CT series and a handful of labelled tiles to a checkpoint."""
