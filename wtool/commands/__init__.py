"""The hall's own verbs, one file each: a thin skin from options to one call."""
