"""What is typed: each function parses settings, calls one function and prints what it gave."""
