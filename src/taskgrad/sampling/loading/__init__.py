"""Where a run is in its stream of batches, and what is handed to the loaders that draw them."""
