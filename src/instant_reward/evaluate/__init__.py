"""What a run brought: figures over texts, comparisons of two sets of them, curves and the report."""
