"""What this box measured of itself for a model: `tinfer tune` makes it, server and simulator read it.

`points` are the measurements, `fit` and `chunk` what follows from them, `tuning` all of it as one
file and `store` where those files are. `measure` gets the points from running workers. Reading a
stored tuning needs `store` and `identity` only, which load nothing heavy.
"""
