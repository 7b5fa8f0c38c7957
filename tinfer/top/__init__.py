"""`tinfer top`: what a running server does right now, on the terminal or as JSON.

`scrape` reads what the server says, `change` and `compare` make of two scrapes a `view.View`, all
of it pure; `drawing` turns a view into lines, `app` asks the server and `screen` holds the terminal.
"""
