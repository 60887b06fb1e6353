"""Endurance: runs that are killed, resumed and laid out anew end where undisturbed ones do (``make soak``)."""
