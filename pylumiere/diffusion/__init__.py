"""The arithmetic and the order of sampling: schedules, samplers, guidance, windows, and the plan of a request.

Nothing here knows other requests, threads or the files that weights lie in.
"""
