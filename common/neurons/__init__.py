"""Some of the neurons of a model's MLPs: which are loaded, and which are computed for whom."""
