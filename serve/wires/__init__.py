"""The languages clients speak, one file each: a client's message to a `Look`, a `Reply` to its words."""
