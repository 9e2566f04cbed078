"""One run from parameters to a row of the tables."""
