"""Capture of real routing with torch hooks; needs the extra `moesim[capture]`."""
