"""Programs that a lab runs outside and inside its hosts: standard library only, started without ``site``, so in 20 ms.

They see each other as the package ``processes`` (see daemon.python) and the rest of tests.lab sees them as its own.
"""
