"""Real games as PufferLib environments, one module each. Nothing is imported until asked for."""
