"""A small ATP backend on loopback, for development: what a toolkit connects to on your own machine.

`hub` is the state, `app` the web side, `embedded` starts both as a child process.
"""
