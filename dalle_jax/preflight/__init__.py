"""Preflight: whether a config fits a pod that is not here, how fast it would be, what would make it fit."""
