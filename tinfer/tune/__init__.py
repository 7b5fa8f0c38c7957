"""What was measured of this box for a model, kept for the server and the simulator.

`tinfer tune` measures (`tinfer.tuner`) and stores a `Tuning` here; `store.load_for` finds it.
`points` are the measurements, `fit` and `chunk` what follows; `table` and `plots` show it all.
"""
