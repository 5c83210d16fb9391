"""Damaged files and contradicting inputs, made at random: nothing may fail silently or raw."""
