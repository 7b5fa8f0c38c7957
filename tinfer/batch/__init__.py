"""`tinfer batch`: a file of requests in, a file of answers out, both in OpenAI's batch format.

On top of `client/`; the formats are in docs/batch.md.
"""
