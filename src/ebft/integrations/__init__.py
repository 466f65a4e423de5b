"""EBFT's parts inside other trainers, each in a module of its own that is imported by its full name."""
