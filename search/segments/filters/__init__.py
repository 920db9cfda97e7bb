"""Filters: their expressions, and the evaluation of conditions over the columns of a segment."""
