"""Plan a run before it is started: parameters, operations, memory, traffic and time of a config (paper Table 1)."""
