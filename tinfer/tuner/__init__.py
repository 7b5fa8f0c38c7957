"""`tinfer tune`: measures the engines of this box as they serve.

The workers are those of `tinfer serve`, from the same plan, started and ended by the same
supervisor and spoken to by the same messages: `box` has them running, `driver` and `handoff` give
them requests and read their reports, `design` and `stages` say what is measured, `app` makes it a
`Tuning`.
"""
