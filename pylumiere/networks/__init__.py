"""The networks in plain PyTorch, which every backend must match, and the registry of their families.

Nothing here knows samplers, requests, files or devices.
"""
