"""Torch, accelerate, files and processes; no rows and no losses."""
