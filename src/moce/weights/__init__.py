"""Weights of other libraries, in and out: formats/ knows their names, models/ only moce's own."""
