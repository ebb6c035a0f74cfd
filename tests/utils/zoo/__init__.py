"""Toy architectures, one file per family; ``utils.architectures`` lists them all."""
