"""Images to scores: samples, extractors, references, and the pass that feeds the metrics."""
