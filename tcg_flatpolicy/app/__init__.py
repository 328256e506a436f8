"""Training, evaluation and audits of the command line, and their run folders."""
