"""The Triton kernels, one stem a file, imported when a GPU first needs one: importing triton takes 0.2 s.

Sizes that change from batch to batch (rows, entries, segments) are in ``do_not_specialize``: else Triton would compile
anew, for seconds in the middle of training, where one becomes 1 or a multiple of 16. Feature sizes and the strides that
follow from them are specialised: loads vectorise where they are multiples of 16.
"""
