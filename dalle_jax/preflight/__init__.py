"""A pod that is not here: does a config fit it, how fast would it be, what would make it fit."""
