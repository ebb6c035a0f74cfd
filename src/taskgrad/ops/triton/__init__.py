"""The Triton kernels, one stem a file, imported when a GPU first needs one: importing triton takes 0.2 s."""
