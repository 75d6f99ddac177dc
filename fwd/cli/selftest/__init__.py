"""`fwd selftest`: whoever doubts the first promise tries it, on the own model and device."""
