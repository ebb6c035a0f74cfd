"""Which tasks there are, and which example is of which: ids, indices in memory and in files, shares of streams."""
