"""Requests a second and processor a request, of ours beside others. See `__main__`."""
