"""What `GET /metrics` shows: the names (`catalogue`), the counts of what happens to requests
(`tally`), and what reads both and the rest of the master's state at a scrape (`collector`)."""
