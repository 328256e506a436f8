"""Games to train on, one folder each. Nothing is imported until it is asked for."""
