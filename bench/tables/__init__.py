"""Tables of comparisons and of papers, and the formats they are printed in."""
