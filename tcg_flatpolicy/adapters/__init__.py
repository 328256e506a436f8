"""Environments of other libraries with a legal list in their observations, one file a library."""
