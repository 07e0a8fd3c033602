"""Options of training: what there is, and how it is read."""
