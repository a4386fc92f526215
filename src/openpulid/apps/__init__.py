"""Ways in from outside: arguments are read and parts are wired here, nothing is computed."""
