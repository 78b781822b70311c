"""Measuring tools that the benchmark programs share; no program and no threshold."""
