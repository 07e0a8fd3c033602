"""Options of training, their parsing and help texts."""
