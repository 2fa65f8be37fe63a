"""How fast training, sampling and their parts are."""
