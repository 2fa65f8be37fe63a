"""Complete configs as Python: `get_config(variant)` of each file. `base` holds what all of them share."""
