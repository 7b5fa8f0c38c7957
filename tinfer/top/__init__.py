"""`tinfer top`: what a running server does right now, on the terminal or as JSON.

`scrape` reads what the server says, `change` and `compare` make of two scrapes a `view.View`,
`drawing` turns that into lines, all of it pure; `app` asks the server, `screen` holds the terminal.
"""
