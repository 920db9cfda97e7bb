"""Features of a data set: workers on Ray Data compute what the store of features lacks, and keep it."""
