"""What a user holds, and the steps it measures: from the batch that is entered to the report that is delivered."""
