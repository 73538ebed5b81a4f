"""Pixels in and out: readers, writers, and the fitting of a user's pictures, clips and masks to a frame.

Nothing here knows networks or noise.
"""
