"""What is asked before a number is believed: are the rows the batch's, do the parts add up to the whole."""
