"""What lies on disk: model folders, bundles, adapters, the table of GPUs. All of it is untrusted until it is checked.

Nothing here computes with a network.
"""
