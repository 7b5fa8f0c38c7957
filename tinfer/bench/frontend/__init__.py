"""What the front end costs: tinfer's master beside a bare relay and vLLM's own API server.

arms      the servers of each arm, as data
relay     the least that a master could do; it has engine stand-ins of its own (emitter)
clocks    processor time of a server's processes, by what they are for
points    what is sent, and what is counted of one run
session   all I/O: starts, runs, ends
summary   medians and ratios over the repetitions
"""
