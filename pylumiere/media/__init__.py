"""Pixels in and out: readers, writers, and the fitting of a user's pictures, clips and masks to a frame.

Nothing here knows networks, steps or noise: no other room is imported, only requests, arrays, errors and the C++
runtime.
"""
