"""The steps of a flat decision, each as one call of compiled code where there is some."""
