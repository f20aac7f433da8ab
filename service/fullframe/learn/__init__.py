"""Nets, training and export; the only room, with engine/fused.py, that needs torch."""
