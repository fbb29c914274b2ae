"""The report page and the figures, from stored results alone."""
