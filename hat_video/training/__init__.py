"""Training: data, degradations, the loop. What it needs beyond the package is the extra `train`."""
