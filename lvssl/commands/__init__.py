"""The commands: each function parses settings, calls one function and prints its result."""
