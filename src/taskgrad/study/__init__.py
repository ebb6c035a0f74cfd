"""Small, self-contained studies of overwriting in mixtures of tasks: what `taskgrad demo` runs."""
