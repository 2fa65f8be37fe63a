"""Speed next to other packages, in turns on one machine."""
