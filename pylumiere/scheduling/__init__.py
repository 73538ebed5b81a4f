"""Many requests on one machine: jobs, the scheduler, batching, memory, tracing.

Nothing here knows what a step computes or where weights come from.
"""
