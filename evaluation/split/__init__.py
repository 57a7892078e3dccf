"""One session cut in one process, stage by stage, beside the two ways not to cut it."""
