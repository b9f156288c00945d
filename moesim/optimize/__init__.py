"""Placement of experts: what is asked, methods that answer, bounds that say how good an answer is at best."""
