"""How fast the transports copy KV blocks between processes, against memcpy: `tinfer bench handoff`.

options   what to measure
cache     KV buffers: their geometry, and blocks as a busy allocator leaves them
exporter  the other process: fills a buffer and exports it
pieces    memcpy of scattered pieces in one C loop
copies    one transport, layout and page size: the ways to copy, measured in turns
report    medians, ratios, a table and a picture
"""
