"""What `tinfer doctor` looks at: one small function per check, from plain inputs to findings.

Checks never change anything; only `leftovers.remove` does, and only what a dead run has provably
left behind. `examination.examine` runs them all, side by side where they do not disturb each other.
"""
