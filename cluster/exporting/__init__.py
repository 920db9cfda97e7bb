"""Export of archives to files for other programs: in Hilbert order, in one process or on Ray Data.

Both ways divide the rows into the same ranges of the curve, so that they write the same rows in the same order.
"""
